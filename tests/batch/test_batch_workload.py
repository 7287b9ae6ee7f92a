"""How much there is to do: bounds that hold for any tokenizer, sums that follow what is left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import smollm2

from dsmoe_local.batch.workload import WorkloadMeter
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import Message, ModelOptions, Request


def meter(*requests: Request) -> WorkloadMeter:
    made = WorkloadMeter()
    for request in requests:
        made.add(request)
    return made


def test_longest_and_total() -> None:
    """Guards: a cache too small for one request; work that is done counted again."""
    short, long = Request("a", "xyz", max_tokens=5), Request("b", "é" * 10, max_tokens=7, n=2)
    made = meter(short, long)
    assert (made.n_sequences, made.n_longest) == (3, 27)
    assert made.n_total(3) == (0 + 5) + 2 * (5 + 7)
    assert made.n_total(1) == made.n_total(3) // 3
    assert meter(short, Request("c", (1, 2))).n_longest is None
    assert meter().n_longest == meter().n_total(0) == 0
    talk = (Message("user", "x"), Message("assistant", "y"), Message("user", "z"))
    assert meter(short, Request("c", talk), Request("d", talk[:1])).n_messages == 3
    assert meter(short, Request("c", (1, 2))).n_messages == 0


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(ModelOptions(smollm2(), n_context=512, n_threads=1)) as loaded:
        yield loaded


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_byte_is_at_most_a_token(engine: Engine, first: str, second: str) -> None:
    """Guards: a request refused as over its share of the cache, which was planned too small for it."""
    # An "a" before it: there are characters that a vocabulary does not know.
    text = f"a{first}"
    assert len(engine.encode(text)) <= (meter(Request("a", text, max_tokens=1)).n_longest or 0)
    messages = (Message("user", first), Message("assistant", second), Message("user", first))
    longest = meter(Request("a", messages, max_tokens=1)).n_longest or 0
    # 64 are added for what a template puts around the texts.
    assert len(engine.encode(messages)) <= longest + 64
