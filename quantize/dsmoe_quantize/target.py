"""From a model and a budget to a recipe: measure what is not measured yet, keep it, solve."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_local.base.errors import FileError
from dsmoe_local.base.progress import Listener, ignore
from dsmoe_quantize import sensitivity_file
from dsmoe_quantize.budget import Budget, Market, Solved
from dsmoe_quantize.choose import Wishes
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.quantize import Plan
from dsmoe_quantize.sensitivity import Sensitivity, measure


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: the budget, and the recipe's `name`.

    `sensitivity` is the file that keeps what was measured, the cache if None; `sample` weights of each tensor
    are tried, all if 0; None: as many as that file says, or as is usual. `cpu` is one of `fast_kernels.CPUS`.
    """

    budget: Budget
    name: str
    sensitivity: Path | None = None
    sample: int | None = None
    cpu: str = "none"


@dataclass(frozen=True, slots=True)
class Target:
    """The answer, with all that explains it."""

    market: Market
    solved: Solved
    sensitivity: Sensitivity
    kept_in: Path


def solve_target(
    source: Plan,
    request: Request,
    wishes: Wishes,
    imatrix: Imatrix | None = None,
    *,
    threads: int = 0,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Target:
    """The best recipe for a request. `source` is any plan of the model: it was read and may be quantized.

    Raises UsageError if nothing fits the budget or the sensitivity file is another's, and what `measure` and
    the files raise. What was measured is kept also if it is interrupted.
    """
    wanted = sensitivity_file.start(source.file, imatrix, request.sample)
    path = request.sensitivity or _cached(wanted)
    known = sensitivity_file.resume(path, wanted, any_sample=request.sample is None)
    keeper = sensitivity_file.Keeper(path)
    try:
        found = measure(
            source.file, known, imatrix, threads=threads, keep=keeper.keep, listen=listen, stop=stop
        )
    finally:
        keeper.close()
    market = Market(source.file, source.hp, found, wishes=wishes, imatrix=imatrix, cpu=request.cpu)
    solved = market.solve(request.budget, request.name, _about(request, found, imatrix, wishes))
    return Target(market, solved, found, path)


def _cached(wanted: Sensitivity) -> Path:
    path = sensitivity_file.default_path(wanted)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"cannot make the folder: {error.strerror}",
            where=path.parent,
            remedy="name a file: --sensitivity",
        ) from error
    return path


def _about(
    request: Request, found: Sensitivity, imatrix: Imatrix | None, wishes: Wishes
) -> dict[str, str | int | float]:
    """How the recipe came about, without what differs from run to run."""
    budget = request.budget
    about: dict[str, str | int | float | None] = {
        "target_size": budget.size,
        "target_bits_per_weight": budget.bits_per_weight,
        "target_bytes_per_token": budget.bytes_per_token,
        "max_slow_share": budget.slow_share,
        "cpu": request.cpu,
        "imatrix": imatrix.name if imatrix else None,
        "share_of_weights_tried": float(f"{found.share:.3g}"),
        "error_weights": "measured" if found.weights else "built in",
        "wishes": "in effect"
        if wishes != replace(wishes, overrides=(), output=None, embedding=None)
        else None,
    }
    return {key: value for key, value in about.items() if value is not None}
