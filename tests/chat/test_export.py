"""Exported conversations: nothing of them is lost, never broken by what they hold, harmless in a browser."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_file_text
from dsmoe_local.chat.attachments import in_fence
from dsmoe_local.chat.export import FORMATS, export_as
from dsmoe_local.chat.export.formats import About, contained, export_json, export_markdown, title_of
from dsmoe_local.chat.export.html_page import export_html
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.types import FinishReason, Usage

ABOUT = About("A talk", "DeepSeekMoE 16B", datetime(2026, 2, 3, 4, 5, tzinfo=UTC), "digest")
USAGE = Usage(12, 3, 4, 0.5, 0.25, 7)


def talk(question: str, reply: str, system: str = "") -> Transcript:
    turns = (
        Turn(Role.USER, question),
        Turn(Role.ASSISTANT, reply, (1, 2, 3), FinishReason.STOP, USAGE),
    )
    return Transcript(turns, system)


# JSON.

ANY_TEXT = st.text(st.characters())
TURNS = st.builds(Turn, st.just(Role.USER), ANY_TEXT) | st.builds(
    Turn,
    st.just(Role.ASSISTANT),
    ANY_TEXT,
    st.lists(st.integers(0, 2**31)).map(tuple),
    st.none() | st.sampled_from(FinishReason),
    st.none() | st.just(USAGE),
)
TRANSCRIPTS = st.builds(
    Transcript, st.lists(TURNS).map(tuple), ANY_TEXT, st.integers(0, 9), st.integers(0, 999)
)


@given(TRANSCRIPTS, ANY_TEXT)
def test_json_has_everything(transcript: Transcript, title: str) -> None:
    """Guards: lost ids, endings or characters; a file that a terminal would obey when it is shown."""
    about = replace(ABOUT, title=title)
    text = export_json(transcript, about)
    document = json.loads(text)
    messages = document["messages"]
    system = messages.pop(0)["content"] if transcript.system else ""
    turns = tuple(
        Turn(
            Role(message["role"]),
            message["content"],
            tuple(message.get("token_ids", ())),
            FinishReason(message["finish_reason"]) if message.get("finish_reason") else None,
            Usage(**message["usage"]) if message.get("usage") else None,
        )
        for message in messages
    )
    assert Transcript(turns, system, document["n_left_out"], document["n_shifted"]) == transcript
    exported = datetime.fromisoformat(document["exported"])
    assert About(document["title"], document["model"], exported, document["vocabulary"]) == about
    assert safe_file_text(text) == text
    text.encode()


@pytest.mark.parametrize("ending", FORMATS)
def test_marks_of_right_to_left_text_stay(ending: str) -> None:
    """Guards: Hebrew and Arabic whose directional marks are replacement characters, in a file or its title;
    an override that is left in.
    """
    text = "\u05e9\u05dc\u05d5\u05dd C++\u200e, \u0645\u061c\u200f \u2067\u05d0\u2069"
    content = export_as(f"talk{ending}", talk(text, text), replace(ABOUT, title=text))
    shown = json.dumps(json.loads(content), ensure_ascii=False) if ending == ".json" else content
    assert shown.count(text) == (4 if ending == ".html" else 3)
    assert "\ufffd" not in content
    assert "\u202e" not in export_as(f"talk{ending}", talk("a\u202eb", "&#x202e;"), ABOUT)


def test_json_has_the_messages_of_the_chat_api() -> None:
    """Guards: a file that nothing but this program understands."""
    document = json.loads(export_json(talk("Hi", "你好", "Be kind."), ABOUT))
    assert [(message["role"], message["content"]) for message in document["messages"]] == [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "你好"),
    ]
    assert "你好" in export_json(talk("Hi", "你好"), ABOUT)


# Markdown.

WORDS = "``` ```` ~~~ py === --- <!-- --> <script> <pre> <div> <? <![CDATA[ [a]: ` * \\ | 你好 word".split()  # noqa: SIM905
PIECES = st.lists(
    st.sampled_from([*WORDS, "\n", "\n\n", "    ", " ", "- ", "1. ", "> ", "# "]), max_size=30
).map("".join)


def headings(document: str) -> list[str]:
    """The headings of the second rank that belong to the document itself."""
    tokens = MarkdownIt("commonmark").parse(document)
    return [
        tokens[index + 1].content
        for index, token in enumerate(tokens)
        if token.type == "heading_open" and token.level == 0 and token.tag == "h2" and token.markup == "##"
    ]


@given(PIECES, PIECES, PIECES)
def test_nothing_reaches_beyond_its_turn(question: str, reply: str, system: str) -> None:
    """Guards: a code block or comment that a reply leaves open and that swallows the rest of the document."""
    transcript = talk(question, reply.replace("## ", ""), system)
    document = export_markdown(replace(transcript, turns=transcript.turns * 2), ABOUT)
    whose = (["System"] if system else []) + ["You", "DeepSeekMoE 16B"] * 2
    assert headings(document) == whose


@given(PIECES)
def test_what_was_typed_is_quoted_line_by_line(question: str) -> None:
    """Guards: a line of a message that is lost, or outside the quotation."""
    document = export_markdown(Transcript((Turn(Role.USER, question),)), ABOUT)
    quoted = [line for line in document.split("\n") if line.startswith(">")]
    typed = question.strip("\n")
    assert quoted == ([f"> {line}".rstrip() for line in typed.split("\n")] if typed else [])


def test_a_reply_is_not_changed_without_need() -> None:
    """Guards: replies wrapped or escaped though they are fine as they are."""
    fine = "Look:\n\n````md\n```py\nx\n```\n````\n\nDone, *really*."
    assert contained(fine) == fine
    assert contained("See:\n```py\nx = 1") == "See:\n```py\nx = 1\n```"
    assert contained("````\n```") == "````\n```\n````"
    assert contained("<!-- begun") == "```\n<!-- begun\n```"


@given(st.text(st.sampled_from("`~\n a")))
def test_a_fence_holds_any_text(text: str) -> None:
    """Guards: a file that closes the fence around it."""
    blocks = MarkdownIt("commonmark").parse(in_fence(text, "py"))
    assert [block.type for block in blocks] == ["fence"]
    assert blocks[0].content == text.removesuffix("\n") + "\n"


def test_names_and_titles_are_text() -> None:
    """Guards: a model's name or a first message that becomes a link, a list or a control sequence."""
    about = replace(ABOUT, title="[a](b) `c` \x1b[31m\n# d", model="- *x* <b>")
    root = SyntaxTreeNode(MarkdownIt("commonmark").parse(export_markdown(talk("q", "a"), about)))
    kinds = {node.type for node in root.walk()}
    assert kinds == {"root", "heading", "inline", "text", "paragraph", "em", "blockquote"}
    assert "\x1b" not in export_markdown(talk("\x1b[2J", "\x9b31m"), about)


# HTML.

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](&#106;avascript:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "[click](//elsewhere.example/x)",
    "[click](file:///etc/passwd)",
    "<javascript:alert(1)>",
    "![picture](https://elsewhere.example/track.png)",
    '![a](https://x.example "onload=alert(1)")',
    '[a](https://x.example" onclick="alert(1)")',
    "[a]: javascript:alert(1)\n\n[a]",
    '```"><script>alert(1)</script>\nx\n```',
    "```js onclick=alert(1)\n</code></pre><script>alert(1)</script>\n```",
    "```html\n</pre><iframe src=x>\n```",
    "`</code><svg onload=alert(1)>`",
    "| <b> | a |\n|:--|--:|\n| </table><script> | x |",
    "</section></main><style>*{display:none}</style>",
    "&#x202e;&lrm;&#27;[31m&#155;",
    "<https://x.example/%E2%80%AE>",
    "<!--",
    "]]>",
    "\x00\x1b]8;;https://x.example\x07",
]
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "div", "p"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "pre", "code", "span", "a", "em", "strong", "s", "hr", "br"),
    *("ul", "ol", "li", "blockquote", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {
    "charset",
    "http-equiv",
    "content",
    "name",
    "class",
    "dir",
    "href",
    "title",
    "rel",
    "start",
    "style",
}


class Page(HTMLParser):
    """Another reading of the page: Python's own parser. Refuses what must not be in it."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {"user": [], "assistant": [], "system": [], "pre": []}
        self.links: list[str] = []
        self._kind = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        values = dict(attrs)
        assert set(values) <= ATTRIBUTES, values
        if "style" in values:
            assert values["style"] in {f"text-align:{side}" for side in ("left", "center", "right")}
        if "href" in values:
            assert tag == "a"
            assert str(values["href"]).startswith(("http://", "https://", "mailto:"))
            self.links.append(str(values["href"]))
        if tag == "section":
            assert self.open == ["html", "body", "main"]
            self._kind = str(values["class"])
        if tag in ("div", "pre"):
            self.texts["pre" if tag == "pre" else self._kind].append("")
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("br", "hr")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.texts["pre"][-1] += data
        elif "div" in self.open:
            self.texts[self._kind][-1] += data


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_harmless_in_a_page(hostile: str) -> None:
    """Guards: a reply, message, system text, title or model's name that runs, loads or hides something."""
    about = replace(ABOUT, title=hostile, model=hostile, vocabulary=hostile)
    page = export_html(talk(hostile, f"{hostile}\n\nafter", hostile), about)
    assert safe_file_text(page) == page
    parsed = Page(page)
    assert parsed.texts["user"] == [safe_file_text(hostile)]
    assert "default-src 'none'" in page


@given(
    st.lists(st.sampled_from([*HOSTILE, "\n", "\n\n", "> ", "- ", "**", "`", "```", "|", "a"])).map("".join)
)
def test_no_mixture_of_hostile_texts_does_harm(reply: str) -> None:
    """Guards: what two pieces of Markdown become together."""
    page = export_html(talk(reply, reply), ABOUT)
    assert safe_file_text(page) == page
    Page(page)


def test_a_page_needs_nothing_else() -> None:
    """Guards: fonts, styles or pictures that are fetched, and tell somebody who reads the page."""
    page = export_html(talk("q", "```py\nx = 1\n```"), ABOUT)
    for word in ("url(", "@import", "src=", "<link", "<script", "http:", "https:"):
        assert word not in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_a_page_shows_markdown() -> None:
    """Guards: replies as raw text; code that is not highlighted; messages that lose their lines."""
    reply = (
        "# Sum\n\n- *one*\n- [two](https://x.example)\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\ndef f(): ...\n```"
    )
    page = export_html(talk("a\n  b <i>", reply), ABOUT)
    for part in ("<h1>Sum</h1>", "<em>one</em>", "<table>", '<span class="k">def</span>'):
        assert part in page
    parsed = Page(page)
    assert parsed.texts["user"] == ["a\n  b <i>"]
    assert parsed.links == ["https://x.example"]


@given(
    st.text(st.sampled_from("ab \t\n<>&\"'\\/#*`=(){}[]:;0é你\x1b")),
    st.sampled_from(["", "py", "python", "html", "c++", "console", "diff", "nonsense", "json"]),
)
def test_code_in_a_page_is_exact(code: str, language: str) -> None:
    """Guards: highlighting that loses or adds characters, so that copied code does not run."""
    page = export_html(talk("q", in_fence(code, language)), ABOUT)
    assert Page(page).texts["pre"] == [safe_file_text(code).removesuffix("\n") + "\n"]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.CONTEXT_FULL, FinishReason.CANCELLED])
def test_a_cut_reply_says_so(ending: str, reason: FinishReason) -> None:
    """Guards: half an answer sent to somebody as a whole one."""
    cut = Transcript((Turn(Role.USER, "q"), Turn(Role.ASSISTANT, "half", ending=reason)))
    whole = Transcript((Turn(Role.USER, "q"), Turn(Role.ASSISTANT, "half", ending=FinishReason.STOP)))
    assert export_as(f"x{ending}", cut, ABOUT) != export_as(f"x{ending}", whole, ABOUT)


def test_formats_by_ending() -> None:
    """Guards: capitals or long forms of an ending refused; a format guessed for an unknown one."""
    transcript = talk("q", "a")
    assert export_as("A.HTM", transcript, ABOUT) == export_as("a.html", transcript, ABOUT)
    assert export_as("a.b.markdown", transcript, ABOUT) == export_as("a.md", transcript, ABOUT)
    for name in ("notes", "notes.txt", "model.gguf", ".md"):
        with pytest.raises(UsageError, match=r"\.md, \.json or \.html"):
            export_as(name, transcript, ABOUT)


def test_titles() -> None:
    """Guards: a title of many lines, or of none."""
    assert title_of(talk("  What is\n\tan  expert? ", "")) == "What is an expert?"
    assert len(title_of(talk("x" * 500, ""))) == 60
    assert title_of(Transcript()) == title_of(talk(" \n", "")) == "Conversation"
