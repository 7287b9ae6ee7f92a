"""Measures the memory of a context, without reading weights or allocating buffers.

With `no_alloc`, llama.cpp plans the buffers of a model and a context and logs their sizes. No C function
returns the sizes. The probe is a file with the model's hyperparameters and tensor shapes, but without its
vocabulary, which takes most of the time to load a header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from gguf.constants import GGUFValueType

from dsmoe_local.base.errors import FileError
from dsmoe_local.base.scratch import scratch_folder
from dsmoe_local.engine import native
from dsmoe_local.engine.errors import ModelLoadError
from dsmoe_local.engine.load.placement import HOST, Placement
from dsmoe_local.model.gguf_file import Field, GgufFile
from dsmoe_local.model.gguf_writer import plan_gguf
from dsmoe_local.model.hyperparameters import ModelOutline

MAX_MEASURED = 1 << 17
"""The longest context, in tokens, that is measured. Longer ones are extrapolated, since llama.cpp allocates
its list of cells even with `no_alloc`.
"""

# "  CUDA0 compute buffer size = 96.13 MiB". A buffer type begins with its device's name: "MTL0_Private".
_BUFFER = re.compile(r"(\S+) +(?:compute|output) buffer size = +([\d.]+) MiB")
_CACHE = re.compile(r"\bsize = +([\d.]+) MiB \( *\d+ cells")
_ROUNDING = 1 << 14  # the log has two decimals of a MiB


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """Bytes that a context takes: its KV cache, and its compute and output buffers by device name."""

    cache: int
    compute: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes on all devices."""
        return self.cache + sum(self.compute.values())


class Probe:
    """A temporary model file without vocabulary and weights, to measure contexts with."""

    def __init__(self, file: GgufFile, outline: ModelOutline) -> None:
        """Write the file. `outline.n_experts_per_token` may differ from the metadata of `file`."""
        self._outline = outline
        self._path = file.path
        with ExitStack() as stack:
            try:
                # It has the model's file name, since llama.cpp's errors contain it.
                path = stack.enter_context(scratch_folder("probe")) / file.path.name
                self._write(path, file)
            except (FileError, OSError):
                # The cache may be read-only or full. The model's own file only takes longer to read.
                stack.close()
            else:
                self._path = path
            self._folder = stack.pop_all()

    def _write(self, path: Path, file: GgufFile) -> None:
        metadata = {key: field for key, field in file.metadata.items() if not key.startswith("tokenizer.")}
        metadata["tokenizer.ggml.model"] = Field("none", GGUFValueType.STRING)
        metadata[f"{self._outline.architecture}.vocab_size"] = Field(
            self._outline.n_vocab, GGUFValueType.UINT32
        )
        plan = plan_gguf(metadata, list(file.tensors.values()))
        with path.open("wb") as header:
            header.write(plan.header)
            header.truncate(plan.size)  # llama.cpp checks that every tensor is inside the file

    def open(self, placement: Placement | None = None) -> native.Model:
        """Load the probe without weights, on the CPU unless `placement` is set. Raises ModelLoadError."""
        return native.Model(
            self._path,
            n_gpu_layers=placement.n_gpu_layers if placement else 0,
            devices=placement.devices if placement else (),
            split=placement.split if placement else (),
            overrides=placement.overrides if placement else (),
            n_experts_per_token=self._outline.n_experts_per_token if self._outline.is_moe else None,
            architecture=self._outline.architecture,
            measure_only=True,
        )

    def close(self) -> None:
        """Remove the file."""
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure_context(
    model: native.Model, options: native.ContextOptions, devices: Sequence[str] = ()
) -> BufferSizes:
    """Return the sizes of a context of a probe. Buffers on other devices than `devices` count as HOST.

    Raises ModelLoadError if llama.cpp refuses the options or does not report the sizes.
    """
    native.Context(model, options).close()
    return read_sizes(native.log_lines(), devices)


def read_sizes(log: Sequence[str], devices: Sequence[str]) -> BufferSizes:
    """Read the sizes from llama.cpp's log. Raises ModelLoadError if it does not report them."""
    text = "\n".join(log)
    caches = _CACHE.findall(text)
    compute = dict.fromkeys((*devices, HOST), 0)
    for name, size in _BUFFER.findall(text):
        device = re.split(r"[\[_]", name)[0]
        compute[device if device in compute else HOST] += _bytes(size)
    if not caches or "compute buffer size" not in text:
        raise ModelLoadError(
            "llama.cpp does not report the sizes of its buffers",
            remedy="install the version of llama-cpp-python that this package asks for",
        )
    return BufferSizes(sum(map(_bytes, caches)), compute)


def _bytes(mebibytes: str) -> int:
    return int(float(mebibytes) * 2**20) + _ROUNDING


def sizes_by_context(
    model: native.Model, options_of: Callable[[int], native.ContextOptions]
) -> Callable[[int], BufferSizes]:
    """Return a function that returns the sizes on the CPU for a context length. It caches its results.

    `options_of` returns the options for a context length. Lengths above MAX_MEASURED are extrapolated: such
    sizes are linear in the length.
    """

    @cache
    def measured(n_context: int) -> BufferSizes:
        return measure_context(model, options_of(n_context))

    def sizes(n_context: int) -> BufferSizes:
        if n_context <= MAX_MEASURED:
            return measured(n_context)
        half = MAX_MEASURED // 2
        low, high = measured(half), measured(MAX_MEASURED)

        def extrapolate(at_half: int, at_most: int) -> int:
            return at_most + (at_most - at_half) * (n_context - MAX_MEASURED) // half

        compute = extrapolate(low.compute[HOST], high.compute[HOST])
        return BufferSizes(extrapolate(low.cache, high.cache), {HOST: compute})

    return sizes
