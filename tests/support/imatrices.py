"""Importance matrices for tests: random ones, llama.cpp's reading of a file, its quantizer with one."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp  # noqa: TID251 - the oracle
import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, tensor_specs
from dsmoe_quantize.imatrix import Imatrix, Statistics
from support.quantize_oracle import llama_quantize

Values = Mapping[str, NDArray[np.float32]]


def random_imatrix(hp: Hyperparameters, least: int = 100, seed: int = 0, *, output: bool = False) -> Imatrix:
    """Of every matrix in a layer, experts with at least `least` tokens; channels differ a hundredfold."""
    generator = np.random.default_rng(seed)
    entries = {}
    for spec in tensor_specs(hp):
        if spec.role in (Role.NORM, Role.BIAS, Role.EMBEDDING) or (spec.role is Role.OUTPUT and not output):
            continue
        n_matrices = spec.shape[0] if len(spec.shape) > 2 else 1
        n_counts = n_matrices if spec.role is Role.ROUTED_EXPERT else 1
        counts = generator.integers(least, least + 500, n_counts)
        means = np.exp(generator.normal(0, 2, (n_matrices, spec.shape[-1]))).reshape(n_counts, -1)
        entries[spec.name] = Statistics((means * counts[:, None]).astype(np.float32), counts)
    return Imatrix(entries, ("a text.txt",), 12, 512, "some.imatrix.gguf")


def as_llama_reads(path: Path) -> Values:
    """What llama.cpp's tool makes of a file in GGUF form (tools/quantize/quantize.cpp, load_imatrix)."""
    reader = GGUFReader(path)
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        assert key in reader.fields, "the tool refuses a file without it"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(".in_sum2"):
            continue
        sums = np.array(tensor.data, np.float32).ravel()
        counts = np.array(tensors[name.removesuffix(".in_sum2") + ".counts"].data, np.float32).ravel()
        lines = sums.reshape(len(counts), -1)
        means = np.ones_like(lines)
        for line, count in enumerate(np.rint(counts)):
            if count > 0:
                means[line] = lines[line] / np.float32(count)
        found[name.removesuffix(".in_sum2")] = means.ravel()
    return found


def llama_quantize_with(
    values: Values, source: Path, out: Path, file_type: int, said: Mapping[str, str | int], **options: Any
) -> Path:
    """llama_model_quantize with an importance matrix; `said` is what its tool adds to the metadata."""
    entry = llama_cpp.llama_model_imatrix_data
    table = (entry * (len(values) + 1))()
    for place, (name, numbers) in zip(table, values.items(), strict=False):
        place.name = name.encode()
        place.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        place.size = numbers.size
    override = llama_cpp.llama_model_kv_override
    overrides = (override * (len(said) + 1))()
    for line, (key, value) in zip(overrides, said.items(), strict=False):
        line.key = key.encode()
        if isinstance(value, int):
            line.tag, line.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            line.tag, line.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return llama_quantize(source, out, file_type, imatrix=table, kv_overrides=overrides, **options)
