"""One answer from the fake engine: outputs, endings, JSON for a schema."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_engine import FakeEngine

from dsmoe_local.base.errors import DsmoeError, InterruptedRunError
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.one_shot import IndentedJson, answer
from dsmoe_local.chat.settings import ChatSettings, OnFull

SCHEMA = '{"type": "object"}'


class Terminal(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Asked:
    """One prompt to the fake engine, and what became of it."""

    def __init__(
        self,
        reply: str,
        *,
        schema: str | None = None,
        settings: ChatSettings | None = None,
        gate: Callable[[int], None] = lambda index: None,
        n_context: int = 4096,
        out: io.StringIO | None = None,
        template: bool = True,
    ) -> None:
        self.out = out or io.StringIO()
        self.beside = io.StringIO()
        engine = FakeEngine(replies=[reply], gate=gate, n_context=n_context, template=template)
        self.conversation = Conversation(engine, settings or ChatSettings())
        self.conversation.json_schema = schema
        self.engine = engine

    def answer(self, *, as_json: bool = False, stats: bool = False) -> str:
        answer(self.conversation, "q", self.out, notes=self.beside, as_json=as_json, stats=stats)
        return self.out.getvalue()


def test_the_answer_alone() -> None:
    """Guards: notes or statistics in the output; a last line that does not end."""
    asked = Asked(" \n  Blue.\x1b[31m")
    assert asked.answer() == "Blue.\x1b[31m\n"
    assert asked.beside.getvalue() == ""
    assert Asked(" then", template=False).answer() == " then\n"
    assert Asked("one\n").answer() == "one\n"
    assert Asked("").answer() == "\n"


def test_statistics_go_beside() -> None:
    """Guards: statistics that are lost, or in the answer."""
    asked = Asked("Blue.")
    assert asked.answer(stats=True) == "Blue.\n"
    assert "reply 5 tokens" in asked.beside.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_control_characters_on_a_terminal(as_json: bool) -> None:
    """Guards: a model that writes to the terminal's clipboard, or turns lines around."""
    out = Asked("a\x1b]52;c;eA==\x07\u202eb", out=Terminal()).answer(as_json=as_json)
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "b" in out


def test_schema_answers_are_indented_on_a_terminal() -> None:
    """Guards: long JSON on one line on a terminal; JSON changed where a program reads it."""
    reply = '{"a":[1,{}],"b":"x{, y"}\n'
    assert Asked(reply, schema=SCHEMA).answer() == reply
    shown = Asked(reply, schema=SCHEMA, out=Terminal()).answer()
    assert shown == json.dumps(json.loads(reply), indent=2) + "\n"
    assert Asked(reply, out=Terminal()).answer() == reply
    assert Asked(reply, schema=SCHEMA, out=Terminal()).answer(as_json=True).count("\n") == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.sampled_from([None, 1, "\t"]), st.integers(1, 9))
def test_layout_is_that_of_json_dumps(value: object, indent: str | int | None, step: int) -> None:
    """Guards: a value whose strings or brackets are changed by laying it out. The oracle is json.dumps."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    layout = IndentedJson()
    pieces = [layout.feed(text[at : at + step]) for at in range(0, len(text), step)]
    assert "".join(pieces) == json.dumps(value, ensure_ascii=False, indent=2)


def test_cut_replies_say_so_beside() -> None:
    """Guards: half an answer taken for a whole one."""
    cut = Asked("long answer", settings=ChatSettings(max_tokens=4))
    assert cut.answer() == "long\n"
    assert cut.beside.getvalue().startswith("note: ")
    assert "-n" in cut.beside.getvalue()
    full = Asked("long answer", n_context=14)
    assert "long answer".startswith(full.answer().rstrip("\n"))
    assert "trained for no more" in full.beside.getvalue()
    smaller = Asked("long answer", n_context=14)
    smaller.engine.info = replace(smaller.engine.info, n_context_trained=2048)
    smaller.answer()
    assert "-c" in smaller.beside.getvalue()


def test_json() -> None:
    """Guards: an envelope of several lines, or without the finish reason."""
    asked = Asked("a\nb 你", settings=ChatSettings(max_tokens=4))
    out = asked.answer(as_json=True)
    assert out.count("\n") == 1
    envelope = json.loads(out)
    assert envelope.pop("usage")["completion_tokens"] == 4
    assert envelope == {"text": "a\nb ", "finish_reason": "length", "model": "fake"}


@pytest.mark.parametrize(
    "reply",
    [
        '{"a": 1}',
        ' {\n "a" : [1.50, 1e400, 123456789012345678901234567890],\n "b": "\\n你"}\n',
        "null",
        '"x"',
        "0",
    ],
)
def test_a_schema_gives_the_value_too(reply: str) -> None:
    """Guards: changed numbers, null taken for invalid JSON, an envelope of several lines."""
    asked = Asked(reply, schema=SCHEMA)
    out = asked.answer(as_json=True)
    assert asked.engine.requests[0].json_schema == SCHEMA
    assert out.count("\n") == 1

    def exact(text: str) -> object:
        return json.loads(text, parse_float=str, parse_int=str)

    assert exact(out)["value"] == exact(reply)  # type: ignore[index]
    plain = Asked(reply, schema=SCHEMA)
    assert plain.answer().strip() == reply.strip()


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("settings", "remedy"),
    [(ChatSettings(max_tokens=5), "-n"), (ChatSettings(stop=("]",)), "stop string")],
)
def test_cut_json_is_an_error(settings: ChatSettings, remedy: str, as_json: bool) -> None:
    """Guards: a script that goes on with half an object."""
    asked = Asked('{"a": [1, 2]}', schema=SCHEMA, settings=settings)
    with pytest.raises(DsmoeError, match="before it was valid JSON") as caught:
        asked.answer(as_json=as_json)
    assert caught.value.exit_code == 1
    assert remedy in str(caught.value)
    if as_json:
        assert json.loads(asked.out.getvalue())["value"] is None
    else:
        assert '{"a": [1, 2]}'.startswith(asked.out.getvalue().rstrip("\n"))


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interruption_keeps_what_came(as_json: bool) -> None:
    """Guards: Ctrl-C that loses the answer so far; a handler that stays."""
    before = signal.getsignal(signal.SIGINT)
    asked = Asked("abcdef", gate=lambda index: os.kill(os.getpid(), signal.SIGINT) if index == 3 else None)
    with pytest.raises(InterruptedRunError) as caught:
        asked.answer(as_json=as_json)
    assert caught.value.exit_code == 130
    out = asked.out.getvalue()
    assert (json.loads(out)["text"] if as_json else out.rstrip("\n")) == "abc"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interruption_waits_for_nothing() -> None:
    """Guards: an engine that hangs and cannot be left."""

    def interrupt_twice(index: int) -> None:
        if index == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    asked = Asked("abcdef", gate=interrupt_twice, out=Terminal())
    with pytest.raises(KeyboardInterrupt):
        asked.answer()
    assert asked.out.getvalue() == "abc\n"


def test_a_background_job_ignores_the_terminals_interruption() -> None:
    """Guards: Ctrl-C for another program ending a job that the shell put in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asked = Asked("abcdef", gate=lambda index: os.kill(os.getpid(), signal.SIGINT))
        assert asked.answer() == "abcdef\n"
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_in_the_middle() -> None:
    """Guards: an error message on the answer's last line; half an object of JSON."""

    def fail(index: int) -> None:
        if index == 3:
            raise DsmoeError("broken")

    for out, as_json, expected in (
        (io.StringIO(), False, "abc"),
        (Terminal(), False, "abc\n"),
        (Terminal(), True, ""),
    ):
        asked = Asked("abcdef", gate=fail, out=out)
        with pytest.raises(DsmoeError, match="broken"):
            asked.answer(as_json=as_json)
        assert out.getvalue() == expected


def test_room_made_in_the_context_is_told() -> None:
    """Guards: a context that is shortened without a note."""
    asked = Asked("x" * 60, n_context=48, settings=ChatSettings(on_full=OnFull.SHIFT, max_tokens=60))
    asked.answer()
    assert "note: the context was full" in asked.beside.getvalue()
