"""Measures a loaded model: speeds, bytes read per second, and the share of the bandwidth."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from dsmoe_local.base.progress import Listener, ignore
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelInfo, ModelOptions
from dsmoe_local.evaluate.speed.machine import Bandwidth, peak_memory
from dsmoe_local.evaluate.speed.timing import Timed, Workload, time_workloads
from dsmoe_local.model.cost import activated_weights, bytes_per_token, kv_bytes_per_token
from dsmoe_local.model.file_type import file_type_name
from dsmoe_local.model.gguf_model import read_any_model


@dataclass(frozen=True, slots=True)
class Reads:
    """The bytes that decoding a token reads, computed from the header of the model's file.

    These are `n_bytes` of weights, and `n_cache_bytes` of the KV cache for each earlier token. `n_activated`
    is the number of parameters used. `type` is llama.cpp's name of the file's type, or the type of most
    weights.
    """

    type: str
    n_activated: int
    n_bytes: float
    n_cache_bytes: int

    def at(self, workload: Workload) -> float:
        """Return the mean number of bytes read per token of a reply."""
        return self.n_bytes + self.n_cache_bytes * (workload.n_depth + workload.n_gen / 2)


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of a workload. `n_bytes_per_token` is None for a prompt, whose tokens share reads.

    As in llama-bench, `rate` and `deviation` are computed from the rates of the repetitions.
    """

    workload: Workload
    samples_ns: tuple[int, ...]
    began: datetime
    n_bytes_per_token: float | None

    @property
    def samples(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [1e9 * self.workload.n_tokens / ns for ns in self.samples_ns]

    @property
    def rate(self) -> float:
        """Mean of the samples."""
        return statistics.fmean(self.samples)

    @property
    def deviation(self) -> float:
        """Standard deviation of the samples; 0 for one."""
        return deviation(self.samples)

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes read per second; None for a prompt."""
        return None if self.n_bytes_per_token is None else self.rate * self.n_bytes_per_token


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """The speeds of a model.

    `load_seconds` is the time from the start of its process to the first answer. `peak_bytes` is the peak
    memory of that process, including mapped files, or None if unknown.
    """

    info: ModelInfo
    options: ModelOptions
    reads: Reads
    load_seconds: float
    peak_bytes: int | None
    speeds: tuple[Speed, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices other than the CPU that hold a part of the model."""
        *offloaded, _ = self.info.placement.split("; ")
        return tuple(part.partition(":")[0] for part in offloaded)

    def share_of(self, speed: Speed, bandwidth: Bandwidth) -> float | None:
        """Return the share of the memory bandwidth that decoding uses.

        Returns None for a prompt, and if a part of the model is on another device.
        """
        if speed.bytes_per_second is None or self.devices:
            return None
        return speed.bytes_per_second / bandwidth.bytes_per_second


def measure_model(
    engine: EngineClient,
    load_seconds: float,
    workloads: Sequence[Workload],
    repetitions: int,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> ModelSpeed:
    """Time the workloads with an engine loaded with `timing.options_for`, which took `load_seconds`.

    Raises InterruptedRunError once `stop` is set, EngineError; FileError and FormatError if the file has
    changed.
    """
    reads = reads_of(engine.options.path, engine.options)
    timed = time_workloads(engine, workloads, repetitions, listen, stop)
    return ModelSpeed(
        info=engine.info,
        options=engine.options,
        reads=reads,
        load_seconds=load_seconds,
        peak_bytes=peak_memory(engine.pid),
        speeds=tuple(speed_of(each, reads) for each in timed),
    )


def reads_of(path: Path, options: ModelOptions) -> Reads:
    """Return the bytes that a token reads of the model in `path`, loaded with `options`.

    Raises FormatError, FileError; UsageError for an unknown cache type.
    """
    file, outline = read_any_model(path)
    if options.n_experts_per_token is not None:
        outline = replace(outline, n_experts_per_token=options.n_experts_per_token)
    return Reads(
        file_type_name(file),
        activated_weights(outline, file.tensors.values()),
        bytes_per_token(outline, file.tensors.values()),
        kv_bytes_per_token(outline, options.cache_type_k, options.cache_type_v),
    )


def speed_of(timed: Timed, reads: Reads) -> Speed:
    """Return the speed of a workload from its times."""
    workload = timed.workload
    samples = tuple(max(1, round(seconds * 1e9)) for seconds in timed.seconds)
    return Speed(workload, samples, timed.began, reads.at(workload) if workload.n_gen else None)


def deviation(values: list[float]) -> float:
    """Return the sample standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
