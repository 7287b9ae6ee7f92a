"""Write the demo as a Hugging Face checkpoint: sharded safetensors, config, tokenizer.

The neurons of trained FFNs are divided into experts (fine-grained expert segmentation, arXiv 2401.06066,
section 3.1) without training. A routed expert's output is multiplied by its gate, which is 1/14: the softmax
of 14 nearly equal logits. To cancel that, its down projection is multiplied by 14.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from dsmoe_convert.demo.calibration import (
    EXPERT_SIZE,
    N_DENSE_LAYERS,
    N_ROUTED_EXPERTS,
    N_SHARED_EXPERTS,
    Calibration,
)
from dsmoe_convert.demo.source import Source
from dsmoe_convert.demo.tokenizer_files import generation_config, tokenizer_config, tokenizer_json
from dsmoe_local.base import durable
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started, ignore
from dsmoe_local.model.config_json import config_values
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import tensor_specs

MODEL_NAME = "SmolLM2-135M-DeepSeekMoE"

ROUTER_SCALE = 3e-5
"""Standard deviation of the logits.

It is so small that gates are 1/14 up to rounding errors, and large enough for a softmax in float32, whose
values near 1 are 6e-8 apart. The perplexity is the same with 1e-4.
"""

SHARD_BYTES = 160 << 20
_FLOAT32 = 4

Array = NDArray[np.float32]


def hyperparameters(source: Source, n_active: int) -> Hyperparameters:
    """Return the demo's hyper-parameters: the source's, with FFNs divided into experts."""
    return replace(
        source.hyperparameters,
        architecture="deepseek",
        n_dense_layers=N_DENSE_LAYERS,
        n_routed_experts=N_ROUTED_EXPERTS,
        n_shared_experts=N_SHARED_EXPERTS,
        n_experts_per_token=n_active,
        expert_size=EXPERT_SIZE,
        shared_expert_size=EXPERT_SIZE,
        name=MODEL_NAME,
    )


def tensors(source: Source, calibration: Calibration) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of the checkpoint, layer by layer: Hugging Face name and float32 values."""
    for name, values in source.tensors():
        prefix, _, last = name.partition(".mlp.")
        layer = int(prefix.rpartition(".")[2]) if last else 0
        if layer < N_DENSE_LAYERS:
            yield name, values
            continue
        index = layer - N_DENSE_LAYERS
        if last == "gate_proj.weight":
            router = calibration.router[index].astype(np.float32) * np.float32(ROUTER_SCALE)
            yield f"{prefix}.mlp.gate.weight", router
        yield from _experts(f"{prefix}.mlp", last, values, calibration.order[index])


def _experts(
    prefix: str, projection: str, values: Array, order: NDArray[np.uint16]
) -> Iterator[tuple[str, Array]]:
    """Yield a projection of a dense FFN, divided by neurons: rows of gate and up, columns of down."""
    is_down = projection == "down_proj.weight"
    n_shared = N_SHARED_EXPERTS * EXPERT_SIZE
    pieces = np.split(order, range(n_shared, len(order), EXPERT_SIZE))
    for number, neurons in enumerate(pieces, -1):
        owner = "shared_experts" if number < 0 else f"experts.{number}"
        piece = np.ascontiguousarray(values[:, neurons] if is_down else values[neurons])
        if is_down and number >= 0:
            piece *= np.float32(N_ROUTED_EXPERTS)
        yield f"{prefix}.{owner}.{projection}", piece


def write_checkpoint(
    source: Source,
    calibration: Calibration,
    folder: Path,
    n_active: int,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Hyperparameters:
    """Write the checkpoint to `folder`, replacing an existing one. The weights are float32: 540 MB.

    Raises FileError if the folder cannot be written, InterruptedRunError if `stop` is set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hp = hyperparameters(source, n_active)
    # config.json is removed first and written last: a folder that has it is complete.
    (folder / "config.json").unlink(missing_ok=True)
    for stale in folder.glob("model-*.safetensors"):
        stale.unlink()
    _write_shards(_interruptible(tensors(source, calibration), stop), folder, hp, listen)
    _write_json(folder / "tokenizer.json", tokenizer_json(source))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(source))
    _write_json(folder / "generation_config.json", generation_config(source))
    config = config_values(
        hp,
        torch_dtype="float32",
        bos_token_id=source.metadata("tokenizer.ggml.bos_token_id"),
        eos_token_id=source.metadata("tokenizer.ggml.eos_token_id"),
    )
    _write_json(folder / "config.json", config)
    return hp


def _interruptible(
    named: Iterator[tuple[str, Array]], stop: threading.Event | None
) -> Iterator[tuple[str, Array]]:
    for item in named:
        if stop is not None and stop.is_set():
            raise InterruptedRunError("interrupted while the checkpoint was written")
        yield item


def _write_shards(
    named: Iterator[tuple[str, Array]], folder: Path, hp: Hyperparameters, listen: Listener
) -> None:
    total = sum(spec.n_weights for spec in tensor_specs(hp)) * _FLOAT32
    n_shards = -(-total // SHARD_BYTES)
    weight_map: dict[str, str] = {}
    shard: dict[str, Array] = {}
    listen(Started("checkpoint", total))

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}-of-{n_shards:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors creates files with mode 0600
        # The manifest, written later, says that the shards are complete: they must be on the disk before it.
        with (folder / name).open("rb") as file:
            durable.sync(file.fileno())
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    written = 0
    for name, values in named:
        shard[name] = values
        written += values.nbytes
        listen(Advanced(values.nbytes, name))
        if written * n_shards >= total * (len(set(weight_map.values())) + 1):
            flush()
    listen(Finished("checkpoint"))
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": written}, "weight_map": weight_map},
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    durable.write_file(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())
