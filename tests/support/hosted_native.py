"""The real engine for the child process in tests, with a crash in native code instead of `encode`."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from dsmoe_local.base.progress import Listener
from dsmoe_local.engine.engine import Engine, load_with_log
from dsmoe_local.engine.native.library import lib
from dsmoe_local.engine.types import ModelOptions, Prompt

ABORTING = "support.hosted_native:aborting"
READING_NOTHING = "support.hosted_native:reading_nothing"


def aborting(options: ModelOptions, listen: Listener, stop: threading.Event) -> Engine:
    """Load an engine whose `encode` aborts like a failed GGML_ASSERT."""
    engine = load_with_log(options, listen, stop)

    def encode(prompt: Prompt, **options: Any) -> tuple[int, ...]:
        lib._lib.ggml_abort(b"ggml.c", 7, b"GGML_ASSERT(%s) failed", b"a == b")
        raise AssertionError

    engine.encode = encode  # type: ignore[method-assign]
    return engine


def reading_nothing(options: ModelOptions, listen: Listener, stop: threading.Event) -> Engine:
    """Load an engine whose `encode` reads from a null pointer."""
    engine = load_with_log(options, listen, stop)

    def encode(prompt: Prompt, **options: Any) -> tuple[int, ...]:
        ctypes.string_at(0)
        raise AssertionError

    engine.encode = encode  # type: ignore[method-assign]
    return engine
