"""The data types of the scheduler: limits, sequences, cache operations and steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

GROWTH = 512  # cells that a sequence without max_tokens reserves at once


@dataclass(frozen=True, slots=True)
class Limits:
    """The capacity of the cache and of a step.

    The cache has `n_cells` cells in total if `unified`, otherwise for each slot. A sequence has at most
    `n_context` tokens. A step has at most `n_step_tokens` tokens, with logits for at most `n_outputs` of
    them (at least `n_slots`; None: for all). Sequence ids below `n_slots` can be decoded. The others, below
    `n_ids`, can only hold parked prefixes, in a unified cache. If not `rewindable`, a sequence can be
    continued or dropped as a whole, but not cut or copied.
    """

    n_slots: int
    n_cells: int
    n_context: int
    n_step_tokens: int
    unified: bool = True
    deterministic: bool = False
    n_ids: int = 256
    rewindable: bool = True
    n_outputs: int | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and its reply. `tokens` are the tokens of both so far.

    - `n_most`: the largest number of tokens. Cells for all of them are reserved at the start. None: as many
      as the context allows; cells are reserved as the sequence grows.
    - `n_reusable`: the largest number of prompt tokens to take from the cache.
    - `score_from`: compute logits for the prompt's tokens from this index on.
    - `can_shift`: when the context is full, drop tokens after the first `n_keep` instead of ending.
    - `slot`: the sequence id while it runs, otherwise -1.
    - `n_cached`: the number of tokens in the cache. `n_reserved`: the number of cells reserved.
    - `n_reused`: the number of prompt tokens found in the cache when the sequence first started.
    - `n_unmoved`: the number of first tokens that no shift has moved. None: all.
    - `dropped`: the number and the index of the tokens that the last shift dropped, until they are reported.
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
        """True if a shift has dropped tokens."""
        return self.n_unmoved is not None

    @property
    def prefilling(self) -> bool:
        """True if tokens before the last one are not in the cache yet."""
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
    """Remove `n_tokens` tokens at position `start` and decrease the positions of those after them."""

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
    """A token that keeps the size of the batch constant. Its cell is freed after the step."""

    slot: int
    position: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step: first apply `operations` to the cache, then decode `rows` and `padding` as one batch.

    `full` are sequences that cannot continue; they are not in `rows`. `reused` are sequences that start in
    this step with cells that are in the cache.
    """

    operations: tuple[Operation, ...] = ()
    rows: tuple[StepRow, ...] = ()
    padding: tuple[Padding, ...] = ()
    full: tuple[Sequence, ...] = ()
    reused: tuple[Sequence, ...] = ()
