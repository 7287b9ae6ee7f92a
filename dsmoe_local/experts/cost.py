"""The cost per token of a number of active experts, computed from the header of a model file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_local.base.sizes import format_count, format_size
from dsmoe_local.model.cost import bytes_per_token, parameters
from dsmoe_local.model.gguf_model import read_model


@dataclass(frozen=True, slots=True)
class ActiveCost:
    """Activated parameters and bytes of weights read per token, with `n_experts_per_token` experts."""

    n_experts_per_token: int
    n_activated: int
    n_bytes: float


def own_number(path: Path) -> int:
    """Return the number of experts per token in the file, 0 if dense. Raises FormatError, FileError."""
    return read_model(path)[1].n_experts_per_token


def active_cost(path: Path, n_experts_per_token: int) -> ActiveCost:
    """Return the cost of a token for the model in `path`. Raises FormatError, FileError."""
    file, hp = read_model(path)
    hp = replace(hp, n_experts_per_token=n_experts_per_token)
    n_bytes = bytes_per_token(hp, file.tensors.values())
    return ActiveCost(n_experts_per_token, parameters(hp).activated, n_bytes)


def compared(now: ActiveCost, then: ActiveCost) -> str:
    """Return a sentence about the change from `now` to `then`."""
    return (
        f"with {then.n_experts_per_token} instead of {now.n_experts_per_token} experts a token reads "
        f"{format_size(then.n_bytes)} of weights instead of {format_size(now.n_bytes)} "
        f"({_change(now.n_bytes, then.n_bytes)}) and uses {format_count(then.n_activated)} parameters "
        f"instead of {format_count(now.n_activated)} ({_change(now.n_activated, then.n_activated)})"
    )


def _change(now: float, then: float) -> str:
    part = then / now - 1
    return "the same" if abs(part) < 0.0005 else f"{abs(part):.1%} {'less' if part < 0 else 'more'}"
