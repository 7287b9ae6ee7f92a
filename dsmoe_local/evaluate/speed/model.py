"""A loaded model, timed: its speeds beside what it reads and what it takes. Loading is the caller's."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from dsmoe_local.base.progress import Listener, ignore
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.evaluate.speed.process_memory import peak_memory
from dsmoe_local.evaluate.speed.results import ModelSpeed, reads_of, speed_of
from dsmoe_local.evaluate.speed.timing import time_workloads
from dsmoe_local.evaluate.speed.workload import Workload


def measure_model(
    engine: EngineClient,
    load_seconds: float,
    workloads: Sequence[Workload],
    repetitions: int,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> ModelSpeed:
    """Time the workloads in an engine loaded as `timing.options_for` says, which took `load_seconds`.

    Setting `stop` raises InterruptedRunError. Raises EngineError; FileError, FormatError if the file is
    another one by now.
    """
    reads = reads_of(engine.options.path, engine.options)
    timed = time_workloads(engine, workloads, repetitions, listen, stop)
    return ModelSpeed(
        info=engine.info,
        options=engine.options,
        reads=reads,
        load_seconds=load_seconds,
        # While it lives: afterwards the system adds it to that of all children.
        peak_bytes=peak_memory(engine.pid),
        speeds=tuple(speed_of(each, reads) for each in timed),
    )
