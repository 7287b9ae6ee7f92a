"""Estimates of the work: bounds that hold for any tokenizer, totals that follow what is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.batches import batch
from support.models import smollm2

from dsmoe_local.batch.job import prepared
from dsmoe_local.batch.workload import WorkloadMeter, prefix_hashes, shared_bytes
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.load.parallel import Workload
from dsmoe_local.engine.types import Message, ModelOptions, Prompt, Request


def meter(*requests: Request) -> WorkloadMeter:
    made = WorkloadMeter()
    for request in requests:
        made.add(request)
    return made


def test_longest_and_total() -> None:
    """Guards: a KV cache too small for one request; finished work counted again."""
    short, long = Request("a", "xyz", max_tokens=5), Request("b", "é" * 10, max_tokens=7, n=2)
    made = meter(short, long)
    assert (made.n_sequences, made.n_longest) == (3, 27)
    assert made.n_tokens == (0 + 5) + 2 * (5 + 7)
    assert made.remaining(1, 3, 0).n_total == made.n_tokens // 3
    assert meter(short, Request("c", (1, 2))).n_longest is None
    assert meter().n_longest == meter().n_tokens == 0
    assert meter(Request("c", (1, 2, 3), max_tokens=5)).n_longest == 8
    talk = (Message("user", "x"), Message("assistant", "y"), Message("user", "z"))
    assert meter(short, Request("c", talk), Request("d", talk[:1])).n_messages == 3
    assert meter(short, Request("c", (1, 2))).n_messages == 0


def test_what_is_left(tmp_path: Path) -> None:
    """Guards: a request for sixteen replies counted as one; a resumed run planned for all lines."""
    lines: list[dict[str, Any]] = [{"prompt": "a", "n": 16, "max_tokens": 2}]
    with prepared(batch(tmp_path, *lines)) as job:
        assert job.workload == Workload(16, 3, 32)
    with prepared(batch(tmp_path, {"prompt": "a" * 100, "n": 2, "max_tokens": 5}, restart=True)) as job:
        assert job.prompt_ratio == 2.5
    assert not meter(Request("a", "a", echo=True), Request("b", "b", logprobs=True)).scores_prompts
    assert meter(Request("a", "a", echo=True, logprobs=True), Request("b", "b")).scores_prompts
    made = meter(Request("a", "a", n=16, max_tokens=2), *(Request("b", "b", max_tokens=2) for _ in range(3)))
    assert made.remaining(4, 4, 0) == Workload(19, 3, 38)
    assert made.remaining(2, 4, 5) == Workload(9, 3, 13)
    assert made.remaining(0, 4, 5) == Workload(1, 3, 1)
    assert meter().remaining(0, 0, 0) == Workload(1, 0, 1)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("s" * 5000, "s" * 5000, 4096),
        ("s" * 2000 + "a", "s" * 2000 + "b", 1024),
        ("s" * 2000, "s" * 100 + "other", 64),
        ("s" * 100, "unrelated " * 300, 0),
        # A token counts as four bytes: 150 tokens are 600 bytes, of which 256 are seen.
        ((*range(150), 1000), (*range(150), 1001), 256),
    ],
)
def test_shared_bytes(first: Prompt, second: Prompt, shared: int) -> None:
    """Guards: levels counted from the wrong end; a token that does not count as four bytes."""
    assert shared_bytes(prefix_hashes(first), prefix_hashes(second)) == shared
    assert shared_bytes(b"", prefix_hashes(second)) == shared_bytes(b"", b"") == 0


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(ModelOptions(smollm2(), n_context=512, n_threads=1)) as loaded:
        yield loaded


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_byte_is_at_most_a_token(engine: Engine, first: str, second: str) -> None:
    """Guards: a request that does not fit into the KV cache planned for it."""
    # The "a": a prompt needs a token, and the vocabulary has none for some characters.
    text = f"a{first}"
    assert len(engine.encode(text)) <= (meter(Request("a", text, max_tokens=1)).n_longest or 0)
    messages = (Message("user", first), Message("assistant", second), Message("user", first))
    longest = meter(Request("a", messages, max_tokens=1)).n_longest or 0
    # 64: what a template adds.
    assert len(engine.encode(messages)) <= longest + 64
