"""The nouns of scheduling: limits, sequences, and what a step consists of. Plain data, no decisions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

GROWTH = 512  # cells that a sequence without max_tokens reserves at a time


@dataclass(frozen=True, slots=True)
class Limits:
    """What the cache and a step can hold.

    `n_cells` in all if `unified`, else of each slot; `n_context` tokens of one sequence; `n_step_tokens` of
    one step. Sequence ids below `n_slots` decode; ids from there to `n_ids` only hold cells (unified only).
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
    """One reply in the making. `tokens` are the prompt's and those generated; the cache holds the first
    `n_cached` of them while it runs.

    `n_most` tokens are reserved; None: the reply may take all of the context, which is reserved as it grows.
    `n_reusable`: no more than so many of the prompt's tokens may come from the cache. `score_from`: tokens
    from there on get logits. `can_shift`: when the context is full, tokens behind the first `n_keep` make
    room instead of ending it.

    `n_unmoved` tokens lie where they were computed; None: all. `dropped`: how many tokens the latest shift
    took out, and from where, until somebody has told of it.
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
        """Whether tokens have made room for others."""
        return self.n_unmoved is not None

    @property
    def prefilling(self) -> bool:
        """Whether more than the newest token is not in the cache yet."""
        return self.n_cached < len(self.tokens) - 1


class Copy(NamedTuple):
    """Make the empty sequence `target` hold the first `n_tokens` tokens of `source`."""

    source: int
    target: int
    n_tokens: int


class Forget(NamedTuple):
    """Drop what a sequence holds from position `start` on."""

    sequence: int
    start: int


class Shift(NamedTuple):
    """Drop `n_tokens` tokens from position `start` on, and move what follows back by as many."""

    sequence: int
    start: int
    n_tokens: int


Operation: TypeAlias = Copy | Forget | Shift


class StepRow(NamedTuple):
    """Tokens `start` to `start + n_tokens` of a sequence; the last `n_outputs` of them get logits."""

    sequence: Sequence
    start: int
    n_tokens: int
    n_outputs: int


class Padding(NamedTuple):
    """A token of no sequence, which keeps the batch's width the same. Its cell is freed after the step."""

    slot: int
    position: int


@dataclass(frozen=True, slots=True)
class Step:
    """What to do, in order: `operations` on the cache, then decode `rows` and `padding` together in order of
    their slots. `full`: sequences that have no room to go on, and are in none of the rows.
    """

    operations: tuple[Operation, ...] = ()
    rows: tuple[StepRow, ...] = ()
    padding: tuple[Padding, ...] = ()
    full: tuple[Sequence, ...] = ()
