"""Renders a chat template in a child process, which is killed if it takes too much time or memory.

`render_host` is the child, `template` calls this module.
"""

from __future__ import annotations

import socket
import subprocess
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineError, template_error
from dsmoe_local.engine.process import wire
from dsmoe_local.engine.process.spawn import child_environment, start_process

MAX_SECONDS = 5.0
"""The time limit for one rendering."""
_HOST = "dsmoe_local.engine.prompts.render_host"
_START_SECONDS = 60.0
# Variables that Python needs to find its packages and the time zone. A template must not read secrets.
_ENVIRONMENT = frozenset({"PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ"})


class Renderer:
    """A compiled template. Any thread may use it; renderings run one after another."""

    def __init__(self, text: str, source: str) -> None:
        """Compile the template in a new process. Raises TemplateError if it is not valid."""
        self._text = text
        self._source = source
        self._lock = threading.Lock()
        self._process: _Process | None = None
        with self._lock:
            self._running_process()

    def ask(
        self, kind: str, *arguments: wire.Plain, stopped: Callable[[], bool] = lambda: False
    ) -> list[wire.Plain]:
        """Send a request of `render_host` and return the parts of the answer.

        Raises TemplateError if the template fails, or takes too much time or memory; InterruptedRunError if
        `stopped` returns True.
        """
        with self._lock:
            return self._parts(self._running_process(), stopped, kind, *arguments)

    def close(self) -> None:
        """Kill the process. The next request starts a new one."""
        with self._lock:
            self._end()

    def _running_process(self) -> _Process:
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
    """A process and the socket to it."""

    def __init__(self) -> None:
        """Start the process and wait until it is ready. Raises EngineError."""
        environment = {name: value for name, value in child_environment().items() if name in _ENVIRONMENT}
        self._popen, self._channel = start_process(
            _HOST, purpose="the process for the chat template", environment=environment
        )
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
                remedy="try again; if that does not help, reinstall dsmoe-local",
            )
        self._channel.settimeout(MAX_SECONDS)

    def send(self, message: wire.Plain) -> None:
        """Send one message. Raises TimeoutError."""
        with suppress(ConnectionError):  # `receive` handles the death of the process
            self._channel.sendall(wire.pack(message))

    def receive(self) -> list[wire.Plain] | None:
        """Return the next message, or None if the process has died. Raises TimeoutError."""
        try:
            return wire.receive(self._source)
        except ConnectionError:
            return None

    def close(self) -> None:
        """Kill the process."""
        self._source.close()
        self._finalizer()


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    process.kill()
    process.wait()
