"""States of the KV cache are found again for the model, and the options, that they were written with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.fake_engine import FakeEngine


@pytest.mark.parametrize("more", [{"n_experts_per_token": 2}, {"cache_type_v": "q8_0"}], ids=str)
def test_a_state_is_of_what_was_loaded(more: dict[str, Any]) -> None:
    """Guards: a state of other experts found, and of a file that took the loaded one's place refused."""
    engine, other = FakeEngine(), FakeEngine()
    assert engine.info.cache_identity == other.info.cache_identity != ""
    other.reload(replace(other.options, **more))
    assert other.info.cache_identity != engine.info.cache_identity
