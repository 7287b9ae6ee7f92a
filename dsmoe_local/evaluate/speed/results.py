"""What was measured of models, and what follows from it: rates, bytes per second, shares of the bandwidth."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from dsmoe_local.engine.types import ModelInfo, ModelOptions
from dsmoe_local.evaluate.speed.bandwidth import Bandwidth
from dsmoe_local.evaluate.speed.timing import Timed
from dsmoe_local.evaluate.speed.workload import Workload
from dsmoe_local.model.cost import parameters, shares
from dsmoe_local.model.ggml import parse_type, row_bytes
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.layout import tensor_specs
from dsmoe_local.model.type_name import file_type_name


@dataclass(frozen=True, slots=True)
class Reads:
    """What a token takes of a model, from its file's header.

    `n_bytes` of weights are read to decode one, and `n_cache_bytes` of the KV cache for each token before
    it. `type` is llama.cpp's name of the file's type, or of most of its weights'.
    """

    type: str
    n_activated: int
    n_bytes: float
    n_cache_bytes: int

    def at(self, workload: Workload) -> float:
        """Bytes that a token of a reply reads, as the mean over the reply."""
        return self.n_bytes + self.n_cache_bytes * (workload.n_depth + workload.n_gen / 2)


@dataclass(frozen=True, slots=True)
class Speed:
    """A workload's tokens per second: the mean over the repetitions and their standard deviation, as
    llama-bench counts them. Nanoseconds likewise. `n_bytes_per_token` is None for a prompt.
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
        """Their mean."""
        return statistics.fmean(self.samples)

    @property
    def deviation(self) -> float:
        """Their standard deviation; 0 of one alone."""
        return deviation(self.samples)

    @property
    def bytes_per_second(self) -> float | None:
        """What decoding reads; None for a prompt, whose tokens share what is read."""
        return None if self.n_bytes_per_token is None else self.rate * self.n_bytes_per_token


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """One model. `load_seconds`: from the start of its process until it answers. `peak_bytes`: the most
    memory of that process, mapped files included; None where the system does not tell.
    """

    info: ModelInfo
    options: ModelOptions
    reads: Reads
    load_seconds: float
    peak_bytes: int | None
    speeds: tuple[Speed, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices other than the CPU that hold a part of the model. What it reads there is not read from
        the machine's memory.
        """
        *offloaded, _ = self.info.placement.split("; ")
        return tuple(part.partition(":")[0] for part in offloaded)

    def share_of(self, speed: Speed, bandwidth: Bandwidth) -> float | None:
        """The part of the memory's bandwidth that decoding uses; None for a prompt, or beside devices."""
        if speed.bytes_per_second is None or self.devices:
            return None
        return speed.bytes_per_second / bandwidth.bytes_per_second


def reads_of(path: Path, options: ModelOptions) -> Reads:
    """What a token takes of the model in `path`, loaded with `options`. FormatError, FileError as its reader
    raises them; UsageError for an unknown cache type.
    """
    file, hp = read_model(path)
    if options.n_experts_per_token is not None:
        hp = replace(hp, n_experts_per_token=options.n_experts_per_token)
    types = [(spec, file.tensors[spec.name].type) for spec in tensor_specs(hp)]
    cache = [row_bytes(parse_type(word), hp.kv_size) for word in (options.cache_type_k, options.cache_type_v)]
    return Reads(
        file_type_name(file),
        parameters(hp).activated,
        sum(share.n_bytes_per_token for share in shares(hp, types)),
        hp.n_layers * sum(cache),
    )


def speed_of(timed: Timed, reads: Reads) -> Speed:
    """What `timed` says of a model that reads so much."""
    workload = timed.workload
    samples = tuple(max(1, round(seconds * 1e9)) for seconds in timed.seconds)
    return Speed(workload, samples, timed.began, reads.at(workload) if workload.n_gen else None)


def deviation(values: list[float]) -> float:
    """The standard deviation that a sample tells of; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
