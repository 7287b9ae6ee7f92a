"""What of a conversation is in the context: how much work it takes to tell, and that it can be ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.fake_engine import FakeEngine

from dsmoe_local.chat.context import Encoder, compacted, token_ids
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.settings import ChatSettings, OnFull
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.types import FinishReason, Prompt, TokenEvent


class CountingEngine(FakeEngine):
    """Counts what is encoded; `on_encode` is called with the count each time."""

    def __init__(self, n_context: int, on_encode: Callable[[int], None] = lambda count: None) -> None:
        super().__init__(lambda prompt: "ok", n_context=n_context)
        self.on_encode = on_encode
        self.n_encoded = 0

    def encode(self, prompt: Prompt, **options: Any) -> tuple[int, ...]:
        self.n_encoded += 1
        self.on_encode(self.n_encoded)
        return super().encode(prompt, **options)


def transcript(n_turns: int, system: str = "") -> Transcript:
    turns = [Turn((Role.USER, Role.ASSISTANT)[at % 2], f"{'x' * (at % 7)}{at}") for at in range(n_turns)]
    return Transcript(tuple(turns), system)


@pytest.mark.parametrize("n_turns", [3, 4, 17, 99, 100])
@pytest.mark.parametrize("n_context", [60, 150, 700, 1800])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_compacting_finds_the_first_cut_that_leaves_half(n_turns: int, n_context: int, system: str) -> None:
    """Guards: every cut measured, each by a conversation of its own; another cut than the first that fits."""
    kept = transcript(n_turns, system)
    engine = CountingEngine(n_context)
    found = compacted(kept, Encoder(engine, {}))
    assert engine.n_encoded <= 8
    cuts = [Transcript(kept.turns, system, at) for at in range(2, n_turns, 2)]
    lengths = [len(token_ids(cut, Encoder(engine, {}))) for cut in cuts]
    fitting = [cut for cut, length in zip(cuts, lengths, strict=True) if length <= n_context // 2]
    expected = fitting[0] if fitting else cuts[-1] if lengths[-1] < n_context else None
    assert (found[0] if found else None) == expected
    if found is not None:
        assert found[1].turns == kept.turns[: found[0].n_left_out]


@pytest.mark.parametrize("on_full", OnFull)
def test_a_message_is_encoded_once(on_full: OnFull) -> None:
    """Guards: the meter, the fitting and the engine each encoding a long conversation again."""
    engine = CountingEngine(4096)
    conversation = Conversation(engine, ChatSettings(on_full=on_full))
    for text in ("one", "two"):
        engine.n_encoded = 0
        list(conversation.send(text))
        assert engine.n_encoded == 1
    assert conversation.n_used == len(engine.requests[-1].prompt) + len("ok")


def test_shifting_encodes_each_beginning_once() -> None:
    """Guards: what is never shifted counted anew for every question about it."""
    engine = CountingEngine(200)
    conversation = Conversation(engine, ChatSettings(on_full=OnFull.SHIFT), "Be brief.")
    for at in range(12):
        engine.n_encoded = 0
        list(conversation.send(f"message {at}"))
        # The system text, all, all but the new message, and what is left of it before and after a shift.
        assert engine.n_encoded <= 5
    assert conversation.transcript.n_shifted


def test_cancel_ends_compacting() -> None:
    """Guards: Ctrl-C that waits until room is made for a reply that nobody wants."""
    engine = CountingEngine(1200)
    conversation = Conversation(engine, ChatSettings(on_full=OnFull.COMPACT))
    conversation.restore(transcript(98))
    engine.n_encoded = 0
    engine.on_encode = lambda count: conversation.cancel() if count == 2 else None
    *_, last = conversation.send("and now?")
    assert isinstance(last, TokenEvent)
    assert last.finish_reason is FinishReason.CANCELLED
    assert engine.n_encoded == 2
    assert conversation.finish_reason is FinishReason.CANCELLED
    assert conversation.transcript.n_left_out == 0
    assert conversation.unanswered
