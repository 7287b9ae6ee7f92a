"""A chat template in a process of its own, which is ended when it takes too long or too much memory.

What happens there is `render_host`'s concern, what is asked of it `template`'s.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.process import wire
from dsmoe_local.engine.process.spawn import environment
from dsmoe_local.engine.prompts.failures import template_error

MAX_SECONDS = 5.0
"""For one rendering."""
_HOST = "dsmoe_local.engine.prompts.render_host"
_START_SECONDS = 60.0
# What finds Python's packages, and tells the local time. Tokens and keys are none of a template's business.
_KEPT = frozenset({"PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ"})


class Renderer:
    """A compiled template. Callable from any thread; one rendering at a time."""

    def __init__(self, text: str, source: str) -> None:
        """Raises TemplateError if `text` is no template."""
        self._text = text
        self._source = source
        self._lock = threading.Lock()
        self._process: _Process | None = None
        with self._lock:
            self._living()

    def ask(
        self, kind: str, *arguments: wire.Plain, stopped: Callable[[], bool] = lambda: False
    ) -> list[wire.Plain]:
        """The parts of the answer. TemplateError if one does not come in time, or takes too much memory;
        InterruptedRunError once it is `stopped`.
        """
        with self._lock:
            return self._parts(self._living(), stopped, kind, *arguments)

    def close(self) -> None:
        """End the process. Another question would start another one."""
        with self._lock:
            self._end()

    def _living(self) -> _Process:
        if self._process is None:
            self._process = _Process()
            self._parts(self._process, lambda: False, "compile", self._text, self._source)
        return self._process

    def _parts(
        self, process: _Process, stopped: Callable[[], bool], *message: wire.Plain
    ) -> list[wire.Plain]:
        parts: list[wire.Plain] = []
        answer: list[wire.Plain] | None = None
        try:
            process.send(message)
            while (answer := process.receive()) is not None and answer[0] == "part":
                parts.append(answer[1])
                if stopped():
                    raise InterruptedRunError("reading the prompt was interrupted")
        except TimeoutError:
            raise template_error(self._source, f"it takes more than {MAX_SECONDS:.0f} seconds") from None
        finally:
            if answer is None or answer[0] == "part" or answer[-1] is True:
                self._end()
        if answer is None:
            raise template_error(self._source, "it needs too much memory")
        if answer[0] == "error":
            raise wire.error_from_plain(answer[1])
        return parts

    def _end(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


class _Process:
    """One process and the socket to it."""

    def __init__(self) -> None:
        """Returns once it waits for work. EngineError if it cannot be started."""
        self._channel, theirs = socket.socketpair()
        with theirs:
            try:
                self._popen = subprocess.Popen(
                    # -P: a folder that a user happens to work in must not provide modules.
                    [sys.executable, "-P", "-m", _HOST, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={name: value for name, value in environment().items() if name in _KEPT},
                    start_new_session=True,
                )
            except OSError as error:
                self._channel.close()
                raise EngineError(
                    f"the process for the chat template cannot be started: {error.strerror}"
                ) from error
        self._source = self._channel.makefile("rb")
        self._finalizer = weakref.finalize(self, _end, self._popen, self._channel)
        self._channel.settimeout(_START_SECONDS)
        try:
            ready = self.receive() is not None
        except TimeoutError:
            ready = False
        if not ready:
            self.close()
            raise EngineError(
                "the process for the chat template does not start",
                where=f"exit status {self._popen.returncode}",
                remedy="try again; if it stays so, install dsmoe-local anew",
            )
        self._channel.settimeout(MAX_SECONDS)

    def send(self, message: wire.Plain) -> None:
        """Send one message. TimeoutError."""
        with suppress(ConnectionError):  # that it is gone is found by `receive`
            self._channel.sendall(wire.pack(message))

    def receive(self) -> list[wire.Plain] | None:
        """The next message; None at the end. TimeoutError."""
        try:
            return wire.receive(self._source)
        except ConnectionError:
            return None

    def close(self) -> None:
        """End it."""
        self._source.close()
        self._finalizer()


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    process.kill()
    process.wait()
