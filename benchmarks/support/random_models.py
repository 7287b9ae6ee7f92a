"""Models of a shape with random weights, in any type, and how fast they are.

Speed does not depend on the values of weights, except for those of routers: random ones choose experts nearly
uniformly. The blocks of a type are encoded from a few million random weights and repeated, so files are made
as fast as the disk writes. They are kept in the cache, with a digest of the types of their tensors as part of
their names.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from benchmarks.make_checkpoint import Pool, make_pool, to_f32
from benchmarks.support.runner import say
from benchmarks.support.sizes import choices_of, types_digest
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.timing import Workload, options_for, time_workloads
from dsmoe_local.model.ggml import GgmlType, row_bytes, tensor_bytes
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.gguf_model import metadata_of
from dsmoe_local.model.gguf_writer import plan_gguf, write_at
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, tensor_specs, unquantized
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.plan import plan_types
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.write import kernels

QUICK_PART, QUICK_VOCABULARY, BLOCK = 8, 4096, 32
_TILE_WEIGHTS = 4 << 20

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shape:
    """A preset by its name, or a small shape of the same kind."""

    name: str
    hp: Hyperparameters


def shape_of(preset: str, *, quick: bool) -> Shape:
    """Return the shape of a preset. `quick`: with an eighth of its widths."""
    hp = PRESETS[preset].hp
    if not quick:
        return Shape(preset, hp)

    def part(width: int) -> int:
        return width // QUICK_PART // BLOCK * BLOCK

    hp = replace(
        hp,
        hidden_size=part(hp.hidden_size),
        n_heads=hp.n_heads // QUICK_PART,
        n_kv_heads=hp.n_kv_heads // QUICK_PART,
        ffn_size=part(hp.ffn_size),
        expert_size=part(hp.expert_size),
        shared_expert_size=part(hp.shared_expert_size),
        n_vocab=QUICK_VOCABULARY,
    )
    return Shape(f"quick-{preset}", hp)


def with_layers(hp: Hyperparameters, layers: int) -> Hyperparameters:
    """Return the shape with so many layers."""
    return replace(hp, n_layers=layers, n_dense_layers=hp.n_dense_layers if hp.is_moe else layers)


def model_file(shape: Shape, layers: int, word: str) -> Path:
    """Return the file of a shape in a type. It is made if it is not there."""
    hp = with_layers(shape.hp, layers)
    folder = cache_folder() / "benchmarks"
    out = folder / f"{shape.name}-{layers}-layers-{word}-{types_digest(choices_of(hp, word))}.gguf"
    if not out.exists():
        say(f"making {out} (once)")
        folder.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(".part")
        try:
            write_random(part, hp, make_pool(0), word)
            part.rename(out)
        finally:
            part.unlink(missing_ok=True)
    return out


def write_random(path: Path, hp: Hyperparameters, pool: Pool, word: str) -> None:
    """Write a GGUF file of a shape in a type."""
    types = plan_types(unquantized(hp, GgmlType.BF16), hp, resolve(word))
    plan = plan_gguf(types.metadata_of(metadata_of_random(hp)), types.choices)
    random = np.random.default_rng(0)
    tiles: dict[tuple[GgmlType, int], Bytes] = {}
    with path.open("wb") as file:
        file.truncate(plan.size)
        write_at(file.fileno(), plan.header, 0)
        for spec, tensor in zip(tensor_specs(hp), types.choices, strict=True):
            data: NDArray[Any]
            if spec.role is Role.NORM:
                data = 1 + to_f32(pool[: spec.n_weights])
            else:
                key = tensor.type, tensor.shape[-1]
                tile = tiles[key] = tiles[key] if key in tiles else encoded(*key, pool)
                # Tensors begin at different rows, so that they are not alike.
                row = row_bytes(*key)
                data = np.resize(np.roll(tile, row * int(random.integers(len(tile) // row))), tensor.n_bytes)
            write_at(file.fileno(), data.data, plan.offsets[spec.name])


def encoded(kind: GgmlType, n_columns: int, pool: Pool) -> Bytes:
    """Return rows of random weights in a type, a few million weights in all."""
    n_rows = max(1, _TILE_WEIGHTS // n_columns)
    weights = pool[: n_rows * n_columns]
    if kind is GgmlType.BF16:
        return weights.view(np.uint8)
    wide = to_f32(weights)
    if kind is GgmlType.F32:
        return wide.view(np.uint8)
    out = np.empty(tensor_bytes(kind, (n_rows, n_columns)), np.uint8)
    kernels.encoder(kind)(wide.ctypes.data, out.ctypes.data, n_rows, n_columns, None)
    return out


def metadata_of_random(hp: Hyperparameters) -> dict[str, Field]:
    """Return the metadata of a shape, with a vocabulary that encodes no text: benchmarks use token ids."""
    text, count, flag = GGUFValueType.STRING, GGUFValueType.UINT32, GGUFValueType.BOOL
    words, kinds = [f"t{number}" for number in range(hp.n_vocab)], [1] * hp.n_vocab
    return {
        "general.architecture": Field(hp.architecture, text),
        "general.name": Field(f"{hp.name}, random", text),
        **metadata_of(hp),
        "tokenizer.ggml.model": Field("gpt2", text),
        "tokenizer.ggml.pre": Field("deepseek-llm", text),
        "tokenizer.ggml.tokens": Field(words, GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.ggml.token_type": Field(kinds, GGUFValueType.ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.merges": Field(["t 1"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.ggml.bos_token_id": Field(0, count),
        "tokenizer.ggml.eos_token_id": Field(1, count),
        "tokenizer.ggml.add_bos_token": Field(True, flag),
    }


def measure_speed(options: ModelOptions, workloads: Sequence[Workload]) -> dict[str, float]:
    """Load a model and time each workload: the faster of two repetitions.

    Returns numbers by what they are and their unit: speeds, the time of loading, and on Linux the memory of
    the engine's process after the workloads.
    """
    began = time.perf_counter()
    with EngineClient.load(options_for(options, workloads)) as engine:
        seconds = time.perf_counter() - began
        timed = time_workloads(engine, workloads, 2)
        speeds = {
            f"{each.workload.label}, tokens/s": each.workload.n_tokens / min(each.seconds) for each in timed
        }
        memory = {f"{kind} memory, GB": gigabytes for kind, gigabytes in memory_of(engine.pid).items()}
        return {**speeds, "load, s": seconds, **memory}


def memory_of(pid: int) -> dict[str, float]:
    """Return the gigabytes of anonymous and of mapped memory of a process; {} without /proc."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return {}
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
    kinds = {"RssAnon": "anonymous", "RssFile": "mapped"}
    return {name: int(fields[key].split()[0]) * 1024 / 1e9 for key, name in kinds.items()}
