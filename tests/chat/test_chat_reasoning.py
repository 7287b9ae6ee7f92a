"""Reasoning in the chat: shown, hidden or off; kept with the reply; outside of answers and earlier turns."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.talking import chat_with

from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.export import FORMATS, export_as
from dsmoe_local.chat.export.formats import About
from dsmoe_local.chat.one_shot import answer
from dsmoe_local.chat.saving import Drafts
from dsmoe_local.chat.settings import ChatSettings, Think
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.types import FinishReason, ReplyStart, Usage

WRITTEN = "<think>\nhm, well\n</think>\n\nyes"
N_REASONING = len("\nhm, well\n</think>")


def reasoner(*replies: str, gate: Callable[[int], None] = lambda index: None) -> FakeEngine:
    return FakeEngine(replies=replies or [WRITTEN], reasons=True, gate=gate)


def test_reasoning_is_shown_and_summed_up() -> None:
    """Guards: reasoning in the reply, in the search or in /copy; a summary that comes before its end."""
    chat, screen = chat_with(reasoner())
    chat.take("q")
    assert "".join(screen.reasonings) == "hm, well"
    assert screen.replies == ["yes"]
    assert screen.notices[-1].startswith("thought for ")
    assert screen.notices[-1].endswith(f" s, {N_REASONING} tokens")
    turn = chat.conversation.turns[-1]
    assert (turn.content, turn.reasoning) == ("yes", "hm, well")
    assert len(turn.token_ids) == len(WRITTEN)
    chat.take("/stats")
    assert f"({N_REASONING} of reasoning)" in "\n".join(screen.notices)
    chat.close()


def test_hidden_reasoning_is_one_line() -> None:
    """Guards: reasoning that is hidden and shown all the same; a wait without any sign of life."""
    chat, screen = chat_with(reasoner(), settings=ChatSettings(think=Think.HIDE))
    chat.take("q")
    assert screen.reasonings == []
    assert screen.hidden == sorted(screen.hidden) != []
    assert "tokens" in screen.notices[-1]
    assert screen.replies == ["yes"]
    chat.take("/think show")
    assert screen.shown == ["hm, well"]
    assert screen.notices[-1].startswith("think show: ")
    chat.close()


def test_think_off() -> None:
    """Guards: /think off that only hides; settings that do not come back."""
    engine = reasoner()
    chat, screen = chat_with(engine)
    chat.take("/think off")
    chat.take("q")
    assert engine.requests[-1].reasoning_budget == 0
    assert screen.replies == ["yes"]
    assert chat.conversation.turns[-1].reasoning == ""
    chat.take("/think")
    assert "think off: " in screen.notices[-1]
    chat.take("/think show")
    chat.take("/set reasoning_budget 5")
    chat.take("q")
    assert engine.requests[-1].reasoning_budget == 5
    assert chat.conversation.turns[-1].reasoning == "hm,"
    chat.take("/think loud")
    assert "think cannot be 'loud'" in screen.said
    chat.close()


def test_a_model_that_does_not_reason() -> None:
    """Guards: /think that promises what the model cannot do; tags in an ordinary model's reply."""
    chat, screen = chat_with(FakeEngine(replies=[WRITTEN]))
    chat.take("q")
    assert screen.replies == [WRITTEN]
    chat.take("/think off")
    assert "has no markers of reasoning" in screen.notices[-1]
    chat.close()


def test_empty_reasoning_is_not_mentioned() -> None:
    """Guards: "thought for 0 s" above every reply of a model that writes an empty block."""
    chat, screen = chat_with(reasoner("<think>\n\n</think>\n\nyes"))
    chat.take("q")
    assert screen.notices == []
    assert screen.replies == ["yes"]
    chat.close()


def test_earlier_reasoning_leaves_the_context() -> None:
    """Guards: a context that fills with what the template drops; numbers below zero in /context."""
    engine = reasoner()
    chat, screen = chat_with(engine)
    chat.take("q")
    with_reasoning = chat.conversation.n_used
    chat.take("and")
    prompt = "".join(engine.decode(engine.requests[-1].prompt))  # type: ignore[arg-type]
    assert prompt == "user: q\nassistant: yes\nuser: and\n"
    assert with_reasoning == len("user: q\n") + len(WRITTEN)
    chat.take("/context")
    assert [row[0] for row in screen.tables[-1]] == ["user", "assistant", "user", "assistant"]
    assert all(int(row[1]) > 0 for row in screen.tables[-1])
    chat.close()


@pytest.mark.parametrize("place", [len("<think>\nhm,"), len("<think>\nhm, well\n</think>\n\nye")])
def test_a_stopped_reply_goes_on_where_it_was(place: int) -> None:
    """Guards: an answer shown as reasoning, or reasoning lost, after /continue."""
    chat, _ = chat_with(reasoner(WRITTEN, WRITTEN[place:]), settings=ChatSettings(max_tokens=place))
    chat.take("q")
    first = chat.conversation.turns[-1]
    assert first.ending is FinishReason.LENGTH
    chat.conversation.settings = ChatSettings()
    chat.take("/continue")
    turn = chat.conversation.turns[-1]
    assert (turn.content, turn.reasoning, turn.ending) == ("yes", "hm, well", FinishReason.STOP)
    assert len(turn.token_ids) == len(WRITTEN)
    engine = chat.conversation.engine
    assert isinstance(engine, FakeEngine)
    expected = ReplyStart.ANSWER if first.content else ReplyStart.REASONING
    assert engine.requests[-1].reply_start is expected
    chat.close()


def test_sessions_keep_reasoning(tmp_path: Path) -> None:
    """Guards: reasoning lost with the program, or not shown when its session is continued."""
    store = SessionStore.open(tmp_path)
    chat, _ = chat_with(reasoner(), store)
    chat.take("q")
    chat.close()
    again, screen = chat_with(reasoner(), store)
    again.begin(store.latest())
    turn = again.conversation.turns[-1]
    assert (turn.content, turn.reasoning) == ("yes", "hm, well")
    assert turn.usage is not None
    assert turn.usage.reasoning_tokens == N_REASONING
    assert screen.shown[-2:] == ["hm, well", "yes"]
    assert f"thought for {N_REASONING} tokens" in screen.notices
    again.close()
    hiding, screen = chat_with(reasoner(), store, settings=ChatSettings(think=Think.HIDE))
    hiding.begin(store.latest())
    assert "hm, well" not in screen.shown
    hiding.close()
    store.close()


def test_drafts_keep_reasoning(tmp_path: Path) -> None:
    """Guards: minutes of reasoning lost in a crash, since there is no answer yet."""
    store = SessionStore.open(tmp_path)
    found: list[str] = []

    def look(index: int) -> None:
        now[0] += 10
        if index == len("<think>\nhm, w"):
            latest = store.latest()
            assert latest is not None
            found.append(latest.load("bytes").turns[-1].reasoning)

    now = [0]
    chat, _ = chat_with(reasoner(gate=look), store, drafts=Drafts(lambda: now[0]))
    chat.take("q")
    assert found == ["hm, w"]
    chat.close()
    store.close()


def test_variables_of_the_template() -> None:
    """Guards: variables that only some prompts get, so that the cache never fits."""
    engine = reasoner()
    given: list[object] = []
    encode = engine.encode

    def recording(prompt: object, **options: object) -> tuple[int, ...]:
        given.append(options["chat_template_kwargs"])
        return encode(prompt, **options)  # type: ignore[arg-type]

    engine.encode = recording  # type: ignore[method-assign]
    chat, screen = chat_with(engine)
    chat.take('/set chat_template_kwargs {"enable_thinking": true, "level": [1]}')
    chat.take("q")
    assert given
    assert all(each == {"enable_thinking": True, "level": [1]} for each in given)
    given.clear()
    chat.take("/think off")
    chat.take("q")
    assert all(each == {"enable_thinking": True, "thinking": False, "level": [1]} for each in given)
    chat.take("/set chat_template_kwargs [1]")
    assert "chat_template_kwargs cannot be '[1]'" in screen.said
    chat.take('/set chat_template_kwargs {"messages": 1}')
    assert "out of range" in screen.said
    chat.close()


class Terminal(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("out", "think", "expected"),
    [
        (io.StringIO, Think.SHOW, "yes\n"),
        (Terminal, Think.HIDE, "yes\n"),
        (Terminal, Think.OFF, "yes\n"),
        (Terminal, Think.SHOW, "hm, well\n\nyes\n"),
    ],
)
def test_one_answer(
    out: type[io.StringIO], think: Think, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: reasoning in the output of a pipe."""
    monkeypatch.setenv("TERM", "xterm")
    written = out()
    answer(Conversation(reasoner(), ChatSettings(think=think)), "q", written)
    assert written.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "") == expected


def test_one_answer_as_json() -> None:
    """Guards: an object without the reasoning, or with an empty field for other models."""
    written = io.StringIO()
    answer(Conversation(reasoner(), ChatSettings()), "q", written, as_json=True)
    document = json.loads(written.getvalue())
    assert (document["text"], document["reasoning_content"]) == ("yes", "hm, well")
    assert document["usage"]["reasoning_tokens"] == N_REASONING
    plain = io.StringIO()
    answer(Conversation(FakeEngine(), ChatSettings()), "q", plain, as_json=True)
    assert "reasoning_content" not in json.loads(plain.getvalue())


ABOUT = About("A talk", "m", datetime(2026, 2, 3, 4, 5, tzinfo=UTC))
HOSTILE = "</details><script>x</script> ``` \u202e & *b*"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


@pytest.mark.parametrize("ending", FORMATS)
def test_exports_fold_reasoning(ending: str) -> None:
    """Guards: reasoning mixed with the answer, or text in it that opens the fold or runs as HTML."""
    usage = Usage(1, 0, 1, 0.0, 0.0, None, 1)
    reply = Turn(Role.ASSISTANT, "yes", (1,), FinishReason.STOP, usage, f"\n{HOSTILE}\n")
    transcript = Transcript((Turn(Role.USER, "q"), reply))
    content = export_as(f"x{ending}", transcript, ABOUT)
    assert "\u202e" not in content
    if ending == ".json":
        assert json.loads(content)["messages"][1]["reasoning_content"] == reply.reasoning
    elif ending == ".md":
        head, _, after = content.partition("<summary>Reasoning</summary>\n\n````\n")
        assert head.endswith("## m\n\n<details>\n")
        assert after.partition("\n````\n\n</details>\n\n")[2] == "yes\n"
    else:
        parser = _Tags()
        parser.feed(content)
        assert parser.tags.count("details") == parser.tags.count("summary") == 1
        assert "script" not in parser.tags
    bare = replace(transcript, turns=(transcript.turns[0], replace(reply, reasoning="")))
    assert "easoning_content" not in export_as(f"x{ending}", bare, ABOUT)
    assert "<details" not in export_as(f"x{ending}", bare, ABOUT)


def test_one_reply_that_is_all_reasoning_says_so() -> None:
    """Guards: an empty line, and no word of why there is no answer."""
    chat, _ = chat_with(reasoner(), settings=ChatSettings(max_tokens=len("<think>\nhm,")))
    out, notes = io.StringIO(), io.StringIO()
    answer(chat.conversation, "q", out, notes=notes)
    assert out.getvalue() == ""
    assert notes.getvalue().splitlines() == [
        "note: the reply has no answer: it ended while the model was still reasoning",
        "note: the reply was cut at the token limit: -n N allows more tokens",
    ]
    chat.close()
