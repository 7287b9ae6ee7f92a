"""How the next token is chosen: the sampling parameters and what each of them takes. Samples nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeAlias

from dsmoe_local.base.errors import UsageError

MAX_SEED = 2**32 - 2  # llama.cpp reads 2^32 - 1 as "choose one"


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the next token is chosen.

    `temperature` 0 takes the likeliest one. `mirostat` 1 or 2 replaces top_k, top_p, min_p and typical_p by
    a feedback that holds the surprise at `mirostat_tau`. Raises UsageError out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            check, accepted = RANGES[item.name]
            if not check(value):
                raise UsageError(f"{item.name} = {value} is out of range", remedy=f"it takes {accepted}")


_Check: TypeAlias = Callable[[float], bool]


def _between(low: float, high: float) -> _Check:
    # False for NaN; unlike math.isfinite it takes whole numbers of any size.
    return lambda value: low <= value <= high


RANGES: dict[str, tuple[Callable[..., bool], str]] = {
    "temperature": (_between(0, 100), "a number from 0 (always the likeliest token) to 100"),
    "top_k": (_between(0, 2**31 - 1), "a whole number, 0 = off"),
    "top_p": (_between(0, 1), "a number from 0 to 1, 1 = off"),
    "min_p": (_between(0, 1), "a number from 0 to 1, 0 = off"),
    "typical_p": (_between(0, 1), "a number from 0 to 1, 1 = off"),
    "repeat_penalty": (_between(0.01, 100), "a number from 0.01 to 100, 1 = off"),
    "repeat_last_n": (_between(0, 2**20), "a whole number of tokens, 0 = off"),
    "presence_penalty": (_between(-100, 100), "a number, 0 = off"),
    "frequency_penalty": (_between(-100, 100), "a number, 0 = off"),
    "mirostat": (lambda value: value in (0, 1, 2), "0 (off), 1 or 2"),
    "mirostat_tau": (_between(0, 100), "a number from 0 to 100"),
    "mirostat_eta": (_between(0, 1), "a number from 0 to 1"),
    "seed": (lambda value: value is None or 0 <= value <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}"),
}
