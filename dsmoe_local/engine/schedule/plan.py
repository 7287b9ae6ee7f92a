"""Data of the scheduler: limits, sequences, cache operations and steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

GROWTH = 512  # cells that a sequence without max_tokens reserves at once


@dataclass(frozen=True, slots=True)
class Limits:
    """The capacity of the cache and of a step.

    The cache has `n_cells` in all if `unified`, otherwise for each slot. A sequence has at most `n_context`
    tokens, a step `n_step_tokens`. Sequence ids below `n_slots` can be decoded; ids from there up to `n_ids`
    only hold parked cells (unified only).
    """

    n_slots: int
    n_cells: int
    n_context: int
    n_step_tokens: int
    unified: bool = True
    deterministic: bool = False
    n_ids: int = 256


@dataclass(slots=True, eq=False)
class Sequence:
    """A reply that is being generated. `tokens` are those of the prompt and the generated ones. While it
    runs, the first `n_cached` of them are in the cache.

    - `n_most`: the largest length, which is reserved at the start. None: up to the whole context, reserved as
      the sequence grows.
    - `n_reusable`: at most that many tokens of the prompt may be taken from the cache.
    - `score_from`: tokens of the prompt from this index on get logits.
    - `can_shift`: when the context is full, drop tokens behind the first `n_keep` instead of ending.
    - `n_unmoved`: number of first tokens that no shift has moved. None: all.
    - `dropped`: number and index of the tokens that the latest shift dropped, until it is reported.
    """

    tokens: list[int]
    n_most: int | None = None
    n_reusable: int | None = None
    score_from: int | None = None
    can_shift: bool = False
    n_keep: int = 0
    n_prompt: int = field(init=False)
    slot: int = -1
    n_cached: int = 0
    n_reserved: int = 0
    n_reused: int | None = None
    n_unmoved: int | None = None
    dropped: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def shifted(self) -> bool:
        """Whether tokens have been dropped by a shift."""
        return self.n_unmoved is not None

    @property
    def prefilling(self) -> bool:
        """Whether more than the latest token is missing in the cache."""
        return self.n_cached < len(self.tokens) - 1


class Copy(NamedTuple):
    """Copy the first `n_tokens` tokens of `source` to the empty sequence `target`."""

    source: int
    target: int
    n_tokens: int


class Forget(NamedTuple):
    """Remove the tokens of a sequence from position `start` on."""

    sequence: int
    start: int


class Shift(NamedTuple):
    """Remove `n_tokens` tokens at position `start` and move the following ones back."""

    sequence: int
    start: int
    n_tokens: int


Operation: TypeAlias = Copy | Forget | Shift


class StepRow(NamedTuple):
    """`n_tokens` tokens of a sequence from index `start` on. The last `n_outputs` of them get logits."""

    sequence: Sequence
    start: int
    n_tokens: int
    n_outputs: int


class Padding(NamedTuple):
    """A token that only keeps the width of the batch constant. Its cell is freed after the step."""

    slot: int
    position: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step: first apply `operations` to the cache, then decode `rows` and `padding` as one batch.

    `full` are sequences that cannot continue; they are not in `rows`.
    """

    operations: tuple[Operation, ...] = ()
    rows: tuple[StepRow, ...] = ()
    padding: tuple[Padding, ...] = ()
    full: tuple[Sequence, ...] = ()
