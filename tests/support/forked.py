"""Runs to kill, forked from a server that has already loaded torch, so that each starts in milliseconds."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dsmoe_local.base import faults
from dsmoe_local.base.progress import Advanced, Event, Listener
from dsmoe_quantize.write import pipeline
from support.kills import Job

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["dsmoe_convert.sources", "support.forked"])


@dataclass(frozen=True)
class ForkedJob(Job):
    """As Job, but the work is a function of this process's modules, called with `arguments` and `out`."""

    work: Callable[..., object] = print

    def spawn(self, environment: Mapping[str, str] | None = None) -> Any:
        ours, theirs = _CONTEXT.Pipe()
        arguments = [*self.arguments, str(self.out)]
        process = _CONTEXT.Process(
            target=_child, args=(theirs, self.work, arguments, self.sync_bytes, dict(environment or {}))
        )
        process.start()
        theirs.close()
        assert ours.recv() == "started"
        return _Child(process, ours)


def paced(out: Path) -> Listener:
    """A listener that holds the encoder back until the journal is at most a few tensors behind.

    So a tiny model is journaled in many steps however slow the disk is. Its encoder must have one thread.
    """
    journal = Job("", [], out).journal
    begun: set[str] = set()

    def listen(event: Event) -> None:
        if isinstance(event, Advanced):
            begun.add(event.detail)
            # Line 1 is the fingerprint; two tensors may be in the hands of workers, one of them this one.
            while journal.read_bytes().count(b"\n") - 1 < len(begun) - 3:
                time.sleep(0.0005)

    return listen


class _Child:
    """The part of Popen's interface that kill tests use."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self._process = process
        self._connection = connection

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float) -> None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout)

    def communicate(self) -> tuple[str, str]:
        self._process.join()
        try:
            return "", self._connection.recv()
        except EOFError:
            return "", ""


def _child(
    connection: Connection,
    work: Callable[..., object],
    arguments: list[str],
    sync_bytes: int,
    environment: Mapping[str, str],
) -> None:
    os.environ.update(environment)
    importlib.reload(faults)  # it reads the environment once
    pipeline.SYNC_BYTES, pipeline.SYNC_SECONDS = sync_bytes, 0.01
    connection.send("started")
    try:
        work(*arguments)
    except BaseException:  # noqa: BLE001 - the parent shows it
        connection.send(traceback.format_exc())
        raise SystemExit(1) from None
