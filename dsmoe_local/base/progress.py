"""What long work tells about itself, as events. The command line renders them; nothing here prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Started:
    """A stage begins. `total` in `unit`s (bytes unless said otherwise); `done` of them are there already."""

    stage: str
    total: int
    done: int = 0
    unit: str = "bytes"


@dataclass(frozen=True, slots=True)
class Advanced:
    """`amount` more units of the current stage are done; `detail` says what is at work (a tensor's name)."""

    amount: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """The current stage is over."""

    stage: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something a person should know; not an error. One line."""

    text: str


Event: TypeAlias = Started | Advanced | Finished | Note
Listener: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of callers that want no progress."""
