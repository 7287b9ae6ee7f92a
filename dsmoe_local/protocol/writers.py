"""How a reply is written, whichever API was asked: as a whole, or as a stream of events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from dsmoe_local.protocol.replies import Delta, Reply

Event: TypeAlias = tuple[str, Mapping[str, Any]]
"""A server-sent event: its name, empty if it has none, and its data."""


class ReplyWriter(Protocol):
    """Writes the reply to one request. `done` is what follows the last event of a stream."""

    done: bytes

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the body of a response."""
        ...

    def events(self, delta: Delta) -> list[Event]:
        """Return the events of a delta."""
        ...

    def end(self, reply: Reply) -> list[Event]:
        """Return the events after the last delta."""
        ...

    def failure(self, error: Mapping[str, Any]) -> Event:
        """Return the event for an error, given as the body of an error's response."""
        ...
