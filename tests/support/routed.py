"""Invented routing and its observation, and a screen that keeps what it shows as text."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType

from dsmoe_local.base.errors import DsmoeError


@dataclass(frozen=True)
class Token:
    """The routing of one token: by layer its experts and their probabilities; entropy and output norms."""

    chosen: Sequence[Sequence[int]]
    probabilities: Sequence[Sequence[float]]
    entropy: float = 1.0
    routed: float = 1.0
    shared: float = 3.0


def tokens(n: int, n_layers: int = 3, n_experts: int = 8, n_used: int = 2, seed: int = 0) -> list[Token]:
    """Return random tokens. Some experts are preferred."""
    generator = random.Random(seed)

    def token() -> Token:
        chosen = [
            sorted(range(n_experts), key=lambda expert: generator.random() ** (expert + 1))[-n_used:]
            for _ in range(n_layers)
        ]
        shares = [[generator.random() / n_used for _ in range(n_used)] for _ in range(n_layers)]
        return Token(chosen, shares, generator.random(), generator.random(), generator.random())

    return [token() for _ in range(n)]


def observation(
    seen: Sequence[Token], n_layers: int = 3, n_experts: int = 8, first: int = 1, **model: Any
) -> dict[str, Any]:
    """Return the summary of the observer `routing`, with every token sampled. `model` replaces fields."""
    layers = [_layer(seen, layer, n_experts, first) for layer in range(n_layers)]
    return {
        "n_routed_experts": n_experts,
        "gating": "softmax",
        "n_groups": 1,
        "layers": layers,
        "trace": None,
        **model,
    }


def _layer(seen: Sequence[Token], layer: int, n_experts: int, first: int) -> dict[str, Any]:
    if not seen:
        return {"layer": first + layer, "tokens": 0}
    counts, mass = [0] * n_experts, [0.0] * n_experts
    for token in seen:
        for expert, share in zip(token.chosen[layer], token.probabilities[layer], strict=True):
            counts[expert] += 1
            mass[expert] += share
    captured = [sum(token.probabilities[layer]) for token in seen]
    mean = sum(captured) / len(seen)
    parts = [count / sum(counts) for count in counts]
    return {
        "layer": first + layer,
        "tokens": len(seen),
        "experts_per_token": sum(counts) // len(seen),
        "counts": counts,
        "expert_mass": mass,
        "captured_mass": mean,
        "captured_mass_deviation": math.sqrt(sum((x - mean) ** 2 for x in captured) / len(seen)),
        "load_entropy": -sum(p * math.log(p) for p in parts if p) / math.log(n_experts),
        "load_peak": max(parts) * n_experts,
        "unused": counts.count(0),
        "sampled": len(seen),
        "router_entropy": sum(token.entropy for token in seen) / len(seen),
        "routed_norm": sum(token.routed for token in seen) / len(seen),
        "shared_norm": sum(token.shared for token in seen) / len(seen),
    }


def drawn(
    renderable: RenderableType, width: int = 80, *, color_system: Any = None, no_color: bool = False
) -> list[str]:
    """Return the lines that Rich prints."""
    console = Console(
        width=width,
        file=io.StringIO(),
        force_terminal=True,
        color_system=color_system,
        no_color=no_color,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


@dataclass
class ShowingScreen:
    """A screen for the view of the experts that keeps everything as text."""

    width: int = 80
    height: int = 24
    plain: bool = False
    colour: bool = True
    notices: list[str] = field(default_factory=list)
    errors: list[DsmoeError] = field(default_factory=list)
    tables: list[list[Sequence[str]]] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    lives: list[str | None] = field(default_factory=list)

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def error(self, error: DsmoeError) -> None:
        self.errors.append(error)

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        self.tables.append(list(rows))

    def show(self, renderable: RenderableType) -> None:
        self.shown.append("\n".join(drawn(renderable, self.width)))

    def live(self, renderable: RenderableType | None) -> None:
        self.lives.append(None if renderable is None else "\n".join(drawn(renderable, self.width)))
