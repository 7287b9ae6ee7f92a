"""Runs a call that cannot be interrupted, such as a download, in another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from dsmoe_local.base.errors import InterruptedRunError

T = TypeVar("T")

_POLL_SECONDS = 0.1


def until_stopped(work: Callable[[], T], stop: threading.Event, interrupted: str, patience: float = 0.0) -> T:
    """Return the result of `work`, or raise its error.

    Once `stop` is set, `work` has `patience` seconds to end, and is then left alone. If it has no result by
    then, InterruptedRunError with the message `interrupted` is raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=run, name="dsmoe-background", daemon=True)
    if not stop.is_set():
        thread.start()
        while thread.is_alive() and not stop.is_set():
            thread.join(_POLL_SECONDS)
        thread.join(patience)
    if stop.is_set() and not results:
        raise InterruptedRunError(interrupted, remedy="run the same command again to continue")
    if errors:
        raise errors[0]
    return results[0]
