"""The order of work on plain data: beginnings together, long jobs early, nothing lost."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dsmoe_local.batch.order import cost_of, prefix_signature, shared_bytes, work_order
from dsmoe_local.engine.types import Message, Prompt, Request


def order(prompts: list[Prompt], lengths: list[int] | None = None, *, ordered: bool = False) -> list[int]:
    lengths = lengths or [10] * len(prompts)
    requests = [
        Request(str(at), prompt, max_tokens=lengths[at % len(lengths)]) for at, prompt in enumerate(prompts)
    ]
    signatures = [prefix_signature(prompt) for prompt in prompts]
    costs = [cost_of(request) for request in requests]
    return list(work_order(range(len(prompts)), signatures, costs, ordered=ordered))


def test_common_beginnings_come_together() -> None:
    """Guards: a prefix that is evicted before the next line that shares it; inner groups torn apart."""
    generator = random.Random(1)
    outer = ["A" * 100, "B" * 100]
    inner = ["x" * 1000, "y" * 1000]
    prompts: list[Prompt] = [one + two + str(number) for one in outer for two in inner for number in range(5)]
    generator.shuffle(prompts)
    sequence = [str(prompts[at])[:101] for at in order(prompts)]
    changes = sum(before != after for before, after in pairwise(sequence))
    assert changes == 3
    assert sum(before[0] != after[0] for before, after in pairwise(sequence)) == 1


def test_messages_share_a_system_text() -> None:
    """Guards: conversations whose beginnings are not seen."""
    prompts: list[Prompt] = [
        (Message("system", f"{who} " * 50), Message("user", str(number)))
        for number in range(4)
        for who in ("you", "they")
    ]
    assert {at % 2 for at in order(prompts)[:4]} in ({0}, {1})


def test_long_jobs_come_early() -> None:
    """Guards: the longest job started last, running alone while everything else is done."""
    unrelated: list[Prompt] = [f"{number} differs" for number in range(4)]
    assert order(unrelated, [10, 400, 20, 30]) == [1, 3, 2, 0]
    together: list[Prompt] = ["s" * 70 + "a", "other", "s" * 70 + "b", "third"]
    assert order(together, [5, 100, 400, 50]) == [2, 0, 1, 3]
    assert order(together, [5, 100, 400, 50], ordered=True) == [0, 1, 2, 3]


def test_what_prompts_share() -> None:
    """Guards: a cache without room for sharing where all begin alike; levels counted from the wrong end."""
    prompts: list[Prompt] = ["s" * 2000 + str(number) for number in range(5)]
    prompts += ["s" * 100 + "other", "unrelated " * 300]
    signatures = [prefix_signature(prompt) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    assert shared_bytes(range(5), signatures, lengths) == 4 * 1024
    assert shared_bytes([4, 5], signatures, lengths) == 64
    assert shared_bytes([5, 6], signatures, lengths) == 0
    assert shared_bytes([0, 0], signatures, lengths) == 2001
    assert shared_bytes([], signatures, lengths) == 0
    # Four bytes a token: 64 of the 150 in common are seen. With eight it would be 256.
    ids: list[Prompt] = [(*range(150), number) for number in range(1000, 1002)]
    assert shared_bytes([0, 1], [prefix_signature(prompt) for prompt in ids], [2000, 2000]) == 256


_PROMPTS = st.one_of(
    st.text("ab", max_size=80),
    st.lists(st.integers(-5, 2**70), min_size=1, max_size=3).map(tuple),
    st.lists(st.builds(Message, st.just("user"), st.text("a", max_size=70)), min_size=1, max_size=2).map(
        tuple
    ),
)


@given(st.lists(_PROMPTS, max_size=30), st.lists(st.integers(1, 2**31), min_size=1, max_size=5))
def test_every_line_has_its_turn(prompts: list[Prompt], lengths: list[int]) -> None:
    """Guards: a line left out, or taken twice, by the grouping."""
    assert sorted(order(prompts, lengths)) == list(range(len(prompts)))
