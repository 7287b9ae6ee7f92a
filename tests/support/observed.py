"""Drives a model with observers without the engine, and computes the same with torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from dsmoe_local.engine import native
from dsmoe_local.engine.observe.dispatcher import Dispatcher
from dsmoe_local.engine.observe.observer import Scored
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import tensor_specs
from support import torch_deepseek
from support.devices import Devices, run_with_devices


@dataclass(frozen=True, slots=True)
class Observed:
    """A loaded model with its observers."""

    dispatcher: Dispatcher
    context: native.Context

    def step(self, *rows: native.Row, scored: Sequence[Scored | None] = ()) -> NDArray[np.float32]:
        """Run a complete step, and return its logits."""
        self.dispatcher.before_step(rows)
        assert self.context.decode(rows) == native.DECODED
        logits = self.context.logits()
        self.dispatcher.after_step(rows, logits, scored)
        return logits.copy()

    def score(self, ids: Sequence[int], request_id: str = "r", chunk: int = 8, sequence: int = 0) -> None:
        """Read a prompt in chunks, and score all of its tokens."""
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            targets = ids[start + 1 : start + chunk + 1]
            row = native.Row(sequence, start, part, len(part))
            self.step(row, scored=[Scored(request_id, start + 1, targets)])
        self.context.forget(sequence, 0)

    def summary(self, name: str) -> dict[str, Any]:
        """Return an observer's summary. It must be plain JSON."""
        found = self.dispatcher.summary(name)
        _assert_plain(found)
        return found


def _assert_plain(value: Any) -> None:
    assert type(value) in (dict, list, str, int, float, bool, type(None)), value
    assert type(value) is not float or math.isfinite(value)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _assert_plain(part)


@contextmanager
def observed(
    path: Path,
    *observers: ObserverOptions,
    n_experts_per_token: int | None = None,
    n_gpu_layers: int = 0,
    overrides: Sequence[tuple[str, str]] = (),
    n_ubatch: int = 64,
    unified: bool = True,
) -> Iterator[Observed]:
    """Load a model with an F32 cache and without flash attention, to compute as torch does."""
    _, hp = read_model(path)
    model = native.Model(
        path,
        n_experts_per_token=n_experts_per_token,
        n_gpu_layers=n_gpu_layers,
        devices=None if n_gpu_layers else (),  # a GPU would compute long prompts even with no layers there
        overrides=overrides,
    )
    try:
        dispatcher = Dispatcher(observers, model, hp)
        options = native.ContextOptions(
            n_context=1024,
            n_batch=256,
            n_ubatch=n_ubatch,
            n_threads=1,
            n_threads_batch=1,
            flash_attention="off",
            cache_type_k="f32",
            cache_type_v="f32",
            n_sequences=4,
            unified=unified,
            n_outputs=256,
            eval_callback=dispatcher.eval_callback,
        )
        context = native.Context(model, options)
        try:
            yield Observed(dispatcher, context)
        finally:
            context.close()
            dispatcher.close()
    finally:
        model.close()


def graph_summaries(path: Path, ids: Sequence[int], **placement: Any) -> dict[str, Any]:
    """Return the summaries of the observers of the graph for a prompt and four more tokens."""
    names = ("routing", "activations")
    with observed(path, *map(ObserverOptions, names), **placement) as model:
        model.step(native.Row(0, 0, ids[:-4], len(ids) - 4))
        for position in range(len(ids) - 4, len(ids)):
            model.step(native.Row(0, position, [ids[position]], 1))
        buffers = [line for line in native.log_lines() if "compute buffer size" in line]
        return {"buffers": buffers, **{name: model.summary(name) for name in names}}


def graph_summaries_on(devices: Devices, path: Path, ids: Sequence[int], **placement: Any) -> dict[str, Any]:
    """Do the same in another process that has the devices."""
    done = run_with_devices(devices, "observe", json.dumps([str(path), ids, placement]))
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class _Products(TorchFunctionMode):
    """Passes the left side of every product with a known matrix to `see`, with the matrix's name."""

    def __init__(self, weights: Mapping[str, torch.Tensor], see: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self._names = {tensor.data_ptr(): name for name, tensor in weights.items()}
        self._see = see

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            name = self._names.get(arguments[1].data_ptr())
            if name is not None:
                left = arguments[0].detach()
                self._see(name, left.reshape(-1, left.shape[-1]).clone())
        return function(*arguments, **(named or {}))


def torch_inputs(
    weights: Mapping[str, torch.Tensor], hp: Hyperparameters, ids: list[int]
) -> dict[str, torch.Tensor]:
    """Return the inputs of each matrix in torch, one row per vector, by Hugging Face's names."""
    seen: dict[str, list[torch.Tensor]] = {}
    with _Products(weights, lambda name, left: seen.setdefault(name, []).append(left)):
        torch_deepseek.logits(weights, hp, ids)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def stacked_squares(
    inputs: Mapping[str, torch.Tensor], hp: Hyperparameters
) -> dict[str, tuple[NDArray[np.float64], list[int]]]:
    """Return sums of squares (n_matrices, n_columns) and counts for each GGUF matrix that torch used."""
    found = {}
    for spec in tensor_specs(hp):
        if not any(source in inputs for source in spec.sources):
            continue
        parts = [inputs.get(source, torch.zeros(0, spec.shape[-1])) for source in spec.sources]
        sums = np.stack([part.double().square().sum(0).numpy() for part in parts])
        found[spec.name] = (sums, [len(part) for part in parts])
    return found
