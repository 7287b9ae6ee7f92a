"""Threads for native code that recurses as deep as its input is nested or long."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

STACK_BYTES = 256 << 20


def large_stack(name: str) -> ThreadPoolExecutor:
    """One thread with a stack of STACK_BYTES, of which only what is used takes memory."""
    executor = ThreadPoolExecutor(1, name)
    previous = threading.stack_size(STACK_BYTES)
    try:
        executor.submit(int).result()
    finally:
        threading.stack_size(previous)
    return executor
