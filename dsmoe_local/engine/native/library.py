"""Loads llama.cpp's shared library, keeps its log, and gives access to ggml's backend functions."""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llama_cpp import __version__ as VERSION  # noqa: N812, TID251
from llama_cpp import llama_cpp as lib  # noqa: TID251

from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import LESS_MEMORY, ModelLoadError

__all__ = [
    "VERSION",
    "add_log",
    "arena",
    "backend_function",
    "clear_log",
    "echo_log",
    "keep_log",
    "last_error",
    "lib",
    "load_error",
    "log_lines",
]

# The levels of ggml.h. A comment in llama_cpp lists older ones.
_LOG_DEBUG, _LOG_INFO, _LOG_ERROR, _LOG_CONTINUED = 1, 2, 4, 5

_log: deque[tuple[int, str]] = deque(maxlen=400)
_echo: list[Callable[[bytes], object]] = []


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _: object) -> None:
    line = text.decode("utf-8", "replace")
    if level != _LOG_DEBUG:
        for write in _echo:
            write(text)
    if level == _LOG_CONTINUED and _log:
        previous, start = _log.pop()
        _log.append((previous, start + line))
    elif level != _LOG_DEBUG:
        _log.append((level, line))


def keep_log() -> None:
    """Collect llama.cpp's log. Call it before each load, since other code may have set another callback."""
    lib.llama_log_set(_keep_log, None)


def echo_log(write: Callable[[bytes], object]) -> None:
    """Also pass every piece of the log to `write`, so that it survives a crash of this process."""
    _echo.append(write)


def add_log(line: str) -> None:
    """Add a line of our own to the log."""
    _keep_log(_LOG_INFO, f"dsmoe: {line}\n".encode(), None)


def clear_log() -> None:
    """Drop all lines, so that `last_error` returns only an error of the next call."""
    _log.clear()


keep_log()
lib.llama_backend_init()


def log_lines() -> tuple[str, ...]:
    """Return llama.cpp's last few hundred log lines, made safe to print."""
    return tuple(safe_line(line.rstrip()) for _, line in list(_log))


def last_error() -> str:
    """Return the first of the last consecutive errors in the log: the cause of the others. "" if none."""
    errors: list[str] = []
    for level, line in reversed(list(_log)):
        if level == _LOG_ERROR and line.strip():
            errors.append(safe_line(line.strip(), 110))
        elif errors:
            break
    return errors[-1] if errors else ""


def load_error(what: str) -> ModelLoadError:
    """Return the error for a model or context that llama.cpp did not create, with its reason."""
    reason = last_error()
    is_full = re.search(r"allocate .*buffer", reason)
    return ModelLoadError(what, where=reason, remedy=LESS_MEMORY if is_full else "")


def backend_function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:  # noqa: ANN401 - ctypes types
    """Return a ggml function with the given result and argument types."""
    # Another copy of libggml in this process has another registry, so llama_cpp's handle must be used.
    function = lib._lib[name]
    function.restype, function.argtypes = result, list(arguments)
    return function  # type: ignore[no-any-return]


class _InitParameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@contextmanager
def arena(size: int, *, allocate: bool) -> Iterator[int]:
    """Give a ggml context of `size` bytes. With `allocate`, it also holds the tensors' data."""
    init = backend_function("ggml_init", ctypes.c_void_p, _InitParameters)
    context = init(_InitParameters(size, None, not allocate))
    try:
        yield context
    finally:
        backend_function("ggml_free", None, ctypes.c_void_p)(context)
