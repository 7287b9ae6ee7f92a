"""What is timed: a prompt of so many tokens, or so many tokens decoded, behind a context. Runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LEAST_CELLS = 32  # the smallest context that an engine takes


@dataclass(frozen=True, slots=True)
class Workload:
    """`n_prompt` tokens of a prompt, or `n_gen` of a reply (the other is 0), behind `n_depth` that are read
    before.
    """

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def n_context(self) -> int:
        """The context that it needs: a reply begins behind one token at least, and its first is not timed."""
        return self.n_depth + self.n_prompt + 1 if self.n_prompt else max(self.n_depth, 1) + self.n_gen + 1

    @property
    def label(self) -> str:
        """As llama-bench calls it: pp512, tg128 @ d1024."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


def workloads_of(
    n_prompts: Sequence[int], n_gens: Sequence[int], n_depths: Iterable[int] = (0,)
) -> tuple[Workload, ...]:
    """Every prompt and every reply, at every depth, in llama-bench's order; 0 tokens are none."""
    return tuple(
        workload
        for depth in n_depths
        for workload in (
            *(Workload(count, 0, depth) for count in n_prompts if count),
            *(Workload(0, count, depth) for count in n_gens if count),
        )
    )


def context_for(workloads: Iterable[Workload], least: int = 0) -> int:
    """The context that all of them fit into, `least` or more."""
    return max(least, _LEAST_CELLS, *(workload.n_context for workload in workloads))
