"""A thread with a large stack, for native code whose recursion depth depends on its input."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

STACK_BYTES = 256 << 20


def large_stack(name: str) -> ThreadPoolExecutor:
    """Return an executor with one thread and STACK_BYTES of stack. Only used pages take memory."""
    executor = ThreadPoolExecutor(1, name)
    previous = threading.stack_size(STACK_BYTES)
    try:
        executor.submit(int).result()
    finally:
        threading.stack_size(previous)
    return executor
