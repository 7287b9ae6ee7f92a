"""The process that renders a chat template: `python -m dsmoe_local.engine.prompts.render_host SOCKET`.

A template is a program from an untrusted source. On Linux its memory is limited to `MEMORY` plus the memory
for the conversation. `renderer` kills the process if it takes too long.
"""

from __future__ import annotations

import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.engine.process import wire
from dsmoe_local.engine.process.spawn import set_up_child
from dsmoe_local.engine.prompts.sandbox import SandboxedTemplate
from dsmoe_local.engine.prompts.segments import Conversation, Segments
from dsmoe_local.engine.types import Message

MEMORY = 192 << 20
_PER_BYTE = 24  # bytes of memory for each byte of a request: several copies, up to 4 bytes per character
_MAX_SECONDS = 60  # for one rendering, in case the client has died and cannot kill this process


class _Host:
    """One template and its client."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._own = _address_space()
        self._template: SandboxedTemplate | None = None

    def serve(self) -> None:
        """Answer messages until the client closes the socket.

        An answer is any number of "part" messages, then "end" or "error". An error includes whether the
        process must be replaced.
        """
        self._send("ready")
        with self._channel.makefile("rb") as source:
            while len(head := self._channel.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL)) == 4:
                self._limit(int.from_bytes(head, "big"))
                message = wire.receive(source)
                if message is None:
                    return
                self._answer(*message)

    def _answer(self, kind: str, *arguments: wire.Plain) -> None:
        signal.alarm(_MAX_SECONDS)
        try:
            for part in _ANSWERS[kind](self, *arguments):
                self._send("part", part)
                signal.alarm(_MAX_SECONDS)
            last: tuple[wire.Plain, ...] = ("end",)
        except DsmoeError as error:
            # After a MemoryError the interpreter may be in a bad state, so the process must be replaced.
            last = ("error", wire.error_to_plain(error), isinstance(error.__cause__, MemoryError))
        signal.alarm(0)
        self._send(*last)

    def _send(self, *message: wire.Plain) -> None:
        self._channel.sendall(wire.pack(message))

    def _limit(self, n_bytes: int) -> None:
        """Set the memory limit for a message of `n_bytes`."""
        if self._own:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = self._own + MEMORY + _PER_BYTE * n_bytes
            resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))

    def _compile(self, text: str, source: str) -> Iterator[wire.Plain]:
        self._template = SandboxedTemplate(text, source)
        yield None

    def _stretches(
        self, messages: wire.Plain, variables: wire.Plain, replies: list[int], open_end: bool
    ) -> Iterator[wire.Plain]:
        conversation = self._conversation(messages, variables)
        for stretch in conversation.stretches(replies, open_end=open_end):
            yield _plain(stretch, messages)

    def _segments(self, messages: wire.Plain, variables: wire.Plain, generate: bool) -> Iterator[wire.Plain]:
        yield _plain(self._conversation(messages, variables).segments(generate=generate), messages)

    def _render(self, messages: wire.Plain, variables: wire.Plain, generate: bool) -> Iterator[wire.Plain]:
        yield self._conversation(messages, variables).render(generate=generate)

    def _conversation(self, messages: wire.Plain, variables: wire.Plain) -> Conversation:
        assert self._template is not None, "the client compiles the template first"
        tools = variables.pop("tools", None)
        self._template.begin_conversation(variables)
        return Conversation(self._template, wire.from_plain(list[Message], messages), tools)


_ANSWERS: dict[str, Callable[..., Iterator[wire.Plain]]] = {
    "compile": _Host._compile,
    "stretches": _Host._stretches,
    "segments": _Host._segments,
    "render": _Host._render,
}


def _plain(segments: Segments | None, messages: wire.Plain) -> wire.Plain:
    """Return segments as lists. The text is None if it is a message's whole content."""
    if segments is None:
        return None
    return [
        [None if text == _content(messages, number, aside) else text, number, aside]
        for text, number, aside in segments
    ]


def _content(messages: wire.Plain, number: int | None, aside: bool) -> str | None:
    return None if number is None or aside else messages[number]["content"]


def _address_space() -> int:
    """Return the bytes of address space of this process; 0 if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    set_up_child()
    _Host(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
