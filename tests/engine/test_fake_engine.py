"""The fake engine keeps to the real one's interface, so that tests on it mean something."""

from __future__ import annotations

import inspect

import pytest

from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineError, PromptError
from dsmoe_local.engine.fake import FakeEngine
from dsmoe_local.engine.types import FinishReason, Message, Request, TextEngine


def test_both_engines_have_the_interface() -> None:
    """Guards: the fake drifting from the real engine."""
    accepted: list[TextEngine] = [FakeEngine()]
    for name in ("submit", "cancel", "encode", "close"):
        expected = inspect.signature(getattr(TextEngine, name))
        assert inspect.signature(getattr(Engine, name)) == expected
        assert inspect.signature(getattr(type(accepted[0]), name)) == expected


def test_streams_like_the_real_one() -> None:
    """Guards: events that no real engine would send."""
    engine = FakeEngine(replies=["é!"])
    *tokens, last = engine.submit(Request("r", (Message("user", "q"),), max_tokens=9))
    assert [event.text for event in tokens] == ["", "é", "!"]
    assert last.finish_reason is FinishReason.STOP
    assert last.usage is not None
    assert (last.usage.completion_tokens, last.token_id) == (3, 0)
    with pytest.raises(PromptError):
        list(FakeEngine(template=False).submit(Request("r", (Message("user", "q"),))))
    engine.close()
    with pytest.raises(EngineError):
        engine.submit(Request("r", "q"))
