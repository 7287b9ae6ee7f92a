"""The web page in headless Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from support.browser import CHROMIUM, Browser, Page, browser
from support.fake_engine import FakeEngine
from support.serving import Gate, Serving, serving

from dsmoe_local.engine.types import Message, Observation
from dsmoe_local.serve import generation
from dsmoe_local.serve import page as web_page
from dsmoe_local.serve.generation import OBSERVERS
from dsmoe_local.serve.models import ModelSource

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


READY = "document.querySelector('#model').options.length && !document.querySelector('#ask').hidden"


def opened(chromium: Browser, server: Serving) -> Page:
    """Return the page of a server, ready for a message."""
    page = chromium.open(server.url)
    page.wait(READY)
    return page


def reloaded(page: Page, server: Serving) -> None:
    """Load the page again, and wait until it is ready for a message."""
    page.go(server.url)
    page.wait(READY)


def ended(page: Page) -> None:
    """Wait for the end of a reply."""
    page.wait("!running && document.querySelector('#again')")


def sent(engine: FakeEngine) -> list[tuple[str, str]]:
    """Return the messages of the last request."""
    prompt = engine.requests[-1].prompt
    assert not isinstance(prompt, str)
    return [(message.role, message.content) for message in prompt if isinstance(message, Message)]


def test_a_conversation(chromium: Browser) -> None:
    """Guards: a reply that appears only at its end; Stop that goes on generating; Regenerate that also sends
    the old reply; a conversation that a reload of the page loses.
    """
    gate = Gate()
    engine = FakeEngine(replies=["one two", "three", "four"], gate=gate)
    with serving(engine) as server:
        page = opened(chromium, server)
        page.type("Hello")
        gate.let(4)
        page.wait("document.querySelector('.reply')?.innerText.startsWith('one')")
        assert page.run("document.querySelector('#send').hidden")
        page.click("#stop")
        ended(page)
        assert page.text(".assistant .quiet") == "stopped"
        gate.open()
        while server.send("/health").json["running"]:
            pass  # the engine sees that the client has hung up
        page.click("#again")
        ended(page)
        assert page.text(".reply") == "three"
        assert sent(engine) == [("user", "Hello")]
        assert re.fullmatch(r"5 tokens · [\d.]+ tokens/s", page.text(".assistant .quiet"))
        page.type("And?")
        ended(page)
        everything = [("user", "Hello"), ("assistant", "three"), ("user", "And?")]
        assert sent(engine) == everything
        reloaded(page, server)
        ended(page)
        assert page.run("[...document.querySelectorAll('.reply')].map((reply) => reply.innerText)") == [
            "three",
            "four",
        ]
        page.click("#new")
        page.type("New")
        ended(page)
        assert sent(engine) == [("user", "New")]
        assert page.complaints() == []


def test_a_reload_during_a_reply(chromium: Browser) -> None:
    """Guards: a reload during a reply, or a crash of the browser, that loses the question and the reply so
    far.
    """
    gate = Gate()
    engine = FakeEngine(replies=["one two three", "four"], gate=gate)
    with serving(engine) as server:
        page = opened(chromium, server)
        page.type("Hello")
        assert "Hello" in page.run("sessionStorage.turns")
        gate.let(3)
        page.wait("sessionStorage.turns.includes('one')")
        gate.let(4)
        page.wait("document.querySelector('.reply').innerText === 'one two'")
        reloaded(page, server)
        ended(page)
        assert page.text(".user .plain") == "Hello"
        assert page.text(".reply") == "one two"
        assert page.text(".assistant .bad") == "The connection ended before the reply was complete."
        gate.open()
        page.type("And?")
        page.wait("[...document.querySelectorAll('.reply')].at(-1).innerText === 'four'")
        assert sent(engine) == [("user", "Hello"), ("assistant", "one two"), ("user", "And?")]


HOSTILE = """<script>window.hacked = 1</script> <img src="x" onerror="window.hacked = 2">
[a](javascript:window.hacked=3) [b](JAVASCRIPT:x) [c](data:text/html,x) ![d](https://example.com/d.png)

<iframe src="https://example.com"></iframe>

```<img src=x onerror=alert(1)>
</code></pre><svg onload="window.hacked = 4">
```

| <b onmouseover="x">1</b> |
|---|
| <style>body { display: none }</style> |
"""


def test_hostile_text(chromium: Browser) -> None:
    """Guards: a model, or a web page that it quotes, that runs scripts or loads something in the page."""
    engine = FakeEngine(replies=[f"<think>{HOSTILE}</think>{HOSTILE}"], reasons=True)
    with serving(engine) as server:
        page = opened(chromium, server)
        page.type(HOSTILE, enter=False)
        page.key("Enter")
        ended(page)
        tags = page.run("[...new Set([...document.querySelectorAll('main *')].map((e) => e.tagName))].sort()")
        known = "A BUTTON CODE DETAILS DIV FOOTER H2 P PRE SECTION SUMMARY TABLE TBODY TD TH TR"
        assert set(tags) <= set(known.split())
        links = page.run("[...document.querySelectorAll('main a')].map((link) => link.href)")
        assert set(links) == {"https://example.com/"}
        assert '<img src="x" onerror="window.hacked = 2">' in page.text(".reply")
        assert page.run("document.querySelector('details .plain').textContent") == HOSTILE.rstrip()
        assert page.run("typeof window.hacked") == "undefined"
        assert page.complaints() == []


def test_the_policy(chromium: Browser) -> None:
    """Guards: a mistake in the page that a Content-Security-Policy would make harmless, without one."""
    with serving(FakeEngine()) as server:
        page = opened(chromium, server)
        refused = "try { %s; '' } catch (error) { error.name }"
        assert page.run(refused % "document.body.innerHTML = '<img src=x>'") == "TypeError"
        assert page.run("fetch('http://127.0.0.1:1/').catch(() => 'refused')") == "refused"
        page.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:1/a.png'}))")
        page.wait("true")
        assert "Content Security Policy" in " ".join(page.complaints())
        headers = server.send("/").headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


# Compared with markdown-it, without the elements that the page leaves out.
MARKDOWN = (
    "one *two* **three** `four` ~~five~~",
    "a_b_c 2*3*4 * 5 \\*x\\* `a*b*` ``a`b``",
    "*a **b** c* **a *b* c** __d__ _e_",
    "# One\n## Two ##\ntext\nmore\n\n### Three",
    "- a\n- b\n  - c\n    - d\n- e\n\n1. one\n2. two",
    "3. three\n4. four\n   ```\n   code\n     more\n   ```",
    "```py\n# no heading\n\n- no list <b>\n```\nafter\n\n~~~\nopen",
    "> quote\n> - item\n>\n> end\n\n---\n***",
    "| a | b |\n|:--|--:|\n| *1* | 2 \\| 3 |\n\nafter\n",
    "[a](https://example.com/x_(y)) <b>& text [not a link] (x)",
    "1986. A year\n- [ ] open",
    "**open *and* not closed `here",
)


def _plain(html: str) -> str:
    html = re.sub(r"</?t(?:head|body)>|<(?:div|/div)[^>]*>", "", html)
    html = re.sub(r"<(\w+)(?: (?!href|start)[^>]*)>", r"<\1>", html)
    html = re.sub(r'( href="[^"]*"| start="[^"]*")[^>]*>', r"\1>", html)
    html = html.replace(' start="1"', "").replace("<s>", "<del>").replace("</s>", "</del>")
    html = html.replace("&quot;", '"').replace("\n</code>", "</code>")
    return re.sub(
        r"\s*(</?(?:p|h\d|[uo]l|li|pre|blockquote|hr|table|t[hdr])\b[^>]*>)\s*", r"\1", html
    ).strip()


@pytest.fixture(scope="module")
def reader(chromium: Browser) -> Iterator[Page]:
    with serving(FakeEngine()) as server:
        yield opened(chromium, server)


@pytest.mark.parametrize("text", MARKDOWN)
def test_markdown(reader: Page, text: str) -> None:
    """Guards: formats of replies that are shown as characters, and characters that are shown as formats."""
    oracle = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    shown = "((made) => { showMarkdown(made, %r); return made.innerHTML; })(document.createElement('div'))"
    assert _plain(reader.run(shown % text)) == _plain(oracle.render(text))


@pytest.mark.parametrize(
    "text",
    [
        "> " * 3000 + "a",
        "- " * 3000 + "a",
        "*a " * 3000,
        "`" * 9000,
        "[" * 9000,
        "|" * 9000,
        "|\n" + " " * 300_000,
        "# " + " " * 300_000 + "a\rb",
        f"![c](data:{'a' * 4880}\n\n" * 200,
    ],
    ids=["quotes", "lists", "stars", "ticks", "brackets", "bars", "divider", "heading", "urls"],
)
def test_markdown_that_is_slow(reader: Page, text: str) -> None:
    """Guards: a page that hangs because of a reply."""
    # Quadratic regular expressions take minutes. The browser then ends the script.
    shown = f"showMarkdown(document.createElement('div'), {text!r})"
    assert "exceptionDetails" not in reader.call("Runtime.evaluate", expression=shown, timeout=60_000)


def test_a_page_with_crlf(chromium: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: digests that no browser computes, if Git checks the page out with CRLF: nothing on it works."""
    copy = tmp_path / "page.html"
    text = web_page._PAGE.read_bytes().replace(b"\r\n", b"\n")
    copy.write_bytes(text.replace(b"\n", b"\r\n"))
    monkeypatch.setattr(web_page, "_PAGE", copy)
    web_page._page.cache_clear()
    try:
        with serving(FakeEngine()) as server:
            page = opened(chromium, server)
            assert page.complaints() == []
    finally:
        web_page._page.cache_clear()


class Observed(FakeEngine):
    """An engine whose routers have chosen expert 0 once more whenever they are asked."""

    def __init__(self) -> None:
        super().__init__()
        self.options = replace(self.options, observers=OBSERVERS)
        self._n_tokens = 0

    def observe(self, name: str) -> Observation:
        """See TextEngine."""
        self._n_tokens += 1
        n = self._n_tokens
        layer = {"layer": 1, "tokens": n, "counts": [n, 0], "expert_mass": [0.0, 0.0], "sampled": 0}
        sums = ("captured_mass", "captured_mass_deviation", "router_entropy", "routed_norm", "shared_norm")
        layers = [{**layer, **dict.fromkeys(sums, 0.0)}]
        return {"n_routed_experts": 2, "gating": "softmax", "n_groups": 1, "layers": layers}


def test_experts(chromium: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: no heatmap below a reply; a heatmap of the reply to another client."""
    monkeypatch.setattr(generation, "ACTIVITY_SECONDS", 60)
    engine = Observed()
    with serving(engine, experts=True) as server:
        page = opened(chromium, server)
        page.type("Hi")
        page.wait("document.querySelector('canvas')")
        # Another client's reply ends after ours, before the page asks for its experts.
        page.run("""{
            const asked = window.request;
            request = async (path, options) => {
              if (path === "/v1/experts/last") {
                const body = JSON.stringify({ messages: [{ role: "user", content: "other" }] });
                const headers = { "content-type": "application/json" };
                await asked("/v1/chat/completions", { method: "POST", headers, body });
              }
              const response = await asked(path, options);
              if (path === "/v1/experts/last") setTimeout(() => { window.shown = true; });
              return response;
            };
        }""")
        page.type("Hi again")
        page.wait("window.shown")
        ended(page)
        assert page.run("document.querySelectorAll('canvas').length") == 1
        assert page.complaints() == []


def test_the_end_is_in_view(chromium: Browser) -> None:
    """Guards: an error, the remark or the buttons below a reply that are outside the window."""
    with serving(FakeEngine(replies=["line\n\n" * 100, "short"])) as server:
        page = opened(chromium, server)
        end = "chat.scrollHeight - chat.scrollTop - chat.clientHeight < 2"
        for text in ("long " * 500, "Hi"):
            page.type(text)
            ended(page)
            assert page.run(end)
        reloaded(page, server)
        ended(page)
        assert page.run(end)


def test_models(chromium: Browser) -> None:
    """Guards: a reply of another model than the chosen one."""
    other = FakeEngine(replies=["I am other"])
    source = ModelSource(lambda: {"other": Path("other.gguf")}, lambda path: other, lambda path: True)
    with serving(FakeEngine(), source=source) as server:
        page = opened(chromium, server)
        assert page.run(
            "[...document.querySelector('#model').options].map((o) => [o.value, o.selected])"
        ) == [
            ["fake", True],
            ["other", False],
        ]
        page.run("model.value = 'other'")
        page.type("Who?")
        ended(page)
        assert page.text(".reply") == "I am other"


def test_a_key(chromium: Browser) -> None:
    """Guards: a page that cannot be used with --api-key, or that does not say what is missing."""
    with serving(FakeEngine(), api_key="sesame") as server:
        page = chromium.open(server.url)
        page.wait("document.querySelector('#notice').innerText === 'This server needs its API key.'")
        assert page.run("ask.hidden")
        page.type("wrong")
        page.wait("document.querySelector('#notice').innerText.startsWith('This is not the API key')")
        page.type("sesame")  # replaces the wrong key
        page.wait("model.options.length && !ask.hidden")
        page.type("Hi")
        ended(page)
        assert page.text(".reply") == "user: Hi"


def test_errors(chromium: Browser) -> None:
    """Guards: errors as codes, or not at all; a question without an answer that later requests repeat."""
    engine = FakeEngine(n_context=64)
    with serving(engine) as server:
        page = opened(chromium, server)
        page.type("x" * 100)
        ended(page)
        assert "context" in page.text(".assistant .bad")
        assert page.run("text.value") == "x" * 100  # to be shortened
        page.run("text.value = ''")
        page.type("short")
        ended(page)
        assert sent(engine) == [("user", "short")]
        page.type("Hello again")
        ended(page)
        assert "ended early" in page.text("section:last-child .quiet:not(footer)")
    page.type("Still there?")
    ended(page)
    assert page.text("section:last-child .bad") == "The server does not answer. Is it still running?"
