"""Work that may take a while, beside a loop that reads keys."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

_T = TypeVar("_T")


async def await_thread(function: Callable[[], _T]) -> _T:
    """The result of `function` in a thread; one that hangs does not keep the program from ending."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[_T] = loop.create_future()

    def set_result(value: _T | None, error: Exception | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(cast(_T, value))

    def work() -> None:
        value, error = None, None
        try:
            value = function()
        except Exception as raised:  # noqa: BLE001 - it is raised where the result is awaited
            error = raised
        with suppress(RuntimeError):  # the loop is over
            loop.call_soon_threadsafe(set_result, value, error)

    threading.Thread(target=work, daemon=True).start()
    return await result
