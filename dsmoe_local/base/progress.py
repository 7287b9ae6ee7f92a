"""Progress events of long operations. The command line renders them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Started:
    """A stage begins: `total` units, of which `done` were finished by an earlier run."""

    stage: str
    total: int
    done: int = 0
    unit: str = "bytes"


@dataclass(frozen=True, slots=True)
class Advanced:
    """`amount` more units of the current stage are done. `detail`, such as a tensor's name, is shown."""

    amount: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """The stage is finished."""

    stage: str


@dataclass(frozen=True, slots=True)
class Note:
    """One line that the user should read; not an error."""

    text: str


Event: TypeAlias = Started | Advanced | Finished | Note
Listener: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Ignore an event: the default listener."""
