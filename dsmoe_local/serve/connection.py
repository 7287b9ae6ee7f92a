"""A connection that is closed when its client sends or reads nothing for too long."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class _Connection(H11Protocol):
    stall_seconds: float
    _stalled: asyncio.TimerHandle | None = None
    _n_unsent = 0  # bytes, at the last check

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # `pause_writing` is called as soon as the system's buffer is full.
        transport.set_write_buffer_limits(0)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            # The headers are not complete. More small pieces do not extend the time.
            if self._stalled is None:
                self._watch()
        elif not self.flow.write_paused:
            self._unwatch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        self._unwatch()
        self._n_unsent = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self.stall_seconds, self._check)

    def _check(self) -> None:
        """Go on watching a client that reads slowly, but reads."""
        if self.transport.get_write_buffer_size() < self._n_unsent:
            self._watch()
        else:
            self.transport.abort()

    def _unwatch(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def connection_type(stall_seconds: float) -> type[H11Protocol]:
    """Return the protocol for uvicorn.

    uvicorn waits for a reader without a limit, and for the first request of a connection. Closing such a
    connection in the usual way would wait for the reader as well.
    """

    return type("Connection", (_Connection,), {"stall_seconds": stall_seconds})
