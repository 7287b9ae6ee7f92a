"""Find the recipe for a model and a budget: measure what is missing, save it, solve."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_local.base.durable import locked
from dsmoe_local.base.errors import FileError, LockedError, file_errors
from dsmoe_local.base.progress import Listener, Note, ignore
from dsmoe_local.model.ggml import FLOATS
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_quantize.budget import sensitivity_file
from dsmoe_quantize.budget.cost_model import Budget, CostModel, Solved
from dsmoe_quantize.budget.sensitivity import Sensitivity, measure, unmeasured
from dsmoe_quantize.errors import RequantizeError
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Overrides, may_change


@dataclass(frozen=True, slots=True)
class Request:
    """The user's request: the budget, and the `name` of the recipe.

    `sensitivity` is the file in which measurements are kept; None: a file in the cache. If that file was
    measured with another importance matrix, only its `weights` are used, and errors are kept in the cache.
    `sample` is the number of weights to measure in each tensor, 0 for all; None: the file's, or the default.
    `cpu` is one of `kernel_speeds.CPUS`.
    """

    budget: Budget
    name: str
    sensitivity: Path | None = None
    sample: int | None = None
    cpu: str = "none"


@dataclass(frozen=True, slots=True)
class Target:
    """The recipe found, and the data that explains it."""

    costs: CostModel
    solved: Solved
    sensitivity: Sensitivity


def refuse_quantized(file: GgufFile) -> None:
    """Raise RequantizeError if the weights are quantized already."""
    found = [tensor for tensor in file.tensors.values() if may_change(tensor) and tensor.type not in FLOATS]
    if found:
        raise RequantizeError(
            f"{len(found)} tensors are quantized already",
            where=f"{found[0].name}: {found[0].type.name}",
            remedy="start from the unquantized file, or lose quality twice with --allow-requantize",
        )


def solve_target(
    file: GgufFile,
    hp: Hyperparameters,
    request: Request,
    overrides: Overrides,
    imatrix: Imatrix | None = None,
    *,
    threads: int = 0,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Target:
    """Find the best recipe for a request, for a model whose header was read.

    Raises UsageError if nothing fits the budget or the sensitivity file is another model's, LockedError if
    measurements are missing and another run writes the file, and what `measure` and the files raise. An
    interrupted run keeps its measurements.
    """
    wanted = sensitivity_file.start(file, imatrix, request.sample)
    measured_costs = request.sensitivity and sensitivity_file.costs_of_another_matrix(
        request.sensitivity, wanted
    )
    if measured_costs:
        why = _why_costs_alone(measured_costs, imatrix)
        listen(Note(f"only the costs of errors are taken from {request.sensitivity}: {why}"))
    path = _cached(wanted) if measured_costs or request.sensitivity is None else request.sensitivity
    any_sample = request.sample is None
    found = sensitivity_file.resume(path, wanted, any_sample=any_sample)
    # A complete file is only read, without its lock: `dsmoe eval --sensitivity` may hold that for hours.
    if unmeasured(file, found):
        with _held(path):
            known = sensitivity_file.resume(path, wanted, any_sample=any_sample)
            keeper = sensitivity_file.Keeper(path)
            try:
                found = measure(
                    file, known, imatrix, threads=threads, keep=keeper.keep, listen=listen, stop=stop
                )
            finally:
                keeper.close()
    if measured_costs:
        found = replace(found, weights=measured_costs.weights, probes=measured_costs.probes)
    costs = CostModel(file, hp, found, overrides=overrides, imatrix=imatrix, cpu=request.cpu)
    solved = costs.solve(request.budget, request.name, _about(request, costs, found, imatrix, overrides))
    return Target(costs, solved, found)


def _why_costs_alone(measured_costs: Sensitivity, imatrix: Imatrix | None) -> str:
    """Say why the errors in that file are not used."""
    if not measured_costs.imatrix:
        return "it was measured without an importance matrix"
    return f"it was measured with {'an' if imatrix is None else 'another'} importance matrix"


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold the lock of the file: two runs would overwrite each other's results."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except LockedError as error:
            raise LockedError(
                error.what,
                where=error.where,
                remedy="wait for it to end, or name another file: --sensitivity",
            ) from error
        except OSError as error:
            raise FileError(f"cannot lock the sensitivity file: {error.strerror}", where=path) from error
        yield


def _cached(wanted: Sensitivity) -> Path:
    path = sensitivity_file.default_path(wanted)
    with file_errors("cannot make the folder", path.parent, "name a file: --sensitivity"):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _about(
    request: Request, costs: CostModel, found: Sensitivity, imatrix: Imatrix | None, overrides: Overrides
) -> dict[str, str | int | float]:
    """Return how the recipe was made, without anything that differs from run to run."""
    budget = request.budget
    about: dict[str, str | int | float | None] = {
        "target_size": budget.size,
        "target_bits_per_weight": budget.bits_per_weight,
        "target_bytes_per_token": budget.bytes_per_token,
        "max_slow_share": budget.slow_share,
        "min_prompt_speed": budget.prompt_speed,
        "cpu": request.cpu,
        "imatrix": imatrix.name if imatrix else None,
        "share_of_weights_tried": float(f"{found.share:.3g}"),
        "error_weights": str(costs.error_weights),
        "overrides": "in effect"
        if overrides != replace(overrides, tensors=(), output=None, embedding=None)
        else None,
    }
    return {key: value for key, value in about.items() if value is not None}
