"""Compare the speeds of DeepSeekMoE 16B and of a dense 7B. The paper reports a ratio of nearly 2.5.

    python -m benchmarks.dense_against_moe                       some layers of each, extrapolated to all
    python -m benchmarks.dense_against_moe --layers all          the whole models: 13 GB of disk
    python -m benchmarks.dense_against_moe --dense llama2-7b     against another 7B of the paper
    python -m benchmarks.dense_against_moe --quick               does it run? the figures mean nothing

Both have random weights, quantized to the same type (see `random_models`). They are loaded in turn, and timed
as by `dsmoe bench`. Each layer adds the same time to a token, so the time of all layers is extrapolated from
that of a few. A negative speed means that the figures are too scattered for that. Prints a table, then one
JSON line.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.support import arguments
from benchmarks.support.random_models import measure_speed, model_file, shape_of
from benchmarks.support.runner import Row, compare_all, in_turn
from benchmarks.support.sizes import size_of
from benchmarks.support.tables import report
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.timing import Workload, workloads_of

MOE = "deepseekmoe-16b"


def at_layers(points: Mapping[int, float], layers: int) -> float:
    """Return a quantity that grows linearly with the layers, by least squares through the points."""
    if layers in points:
        return points[layers]
    slope, start = np.polyfit(list(points), list(points.values()), 1)
    return float(start + slope * layers)


def speeds_of(
    files: Mapping[int, Path], n_layers: int, workloads: tuple[Workload, ...], number: int
) -> dict[str, float]:
    """Return the speeds of `n_layers` layers by files with fewer. `number` is that of the round."""
    found = {layers: measure_speed(ModelOptions(path), workloads) for layers, path in files.items()}
    return {
        label: 1 / at_layers({layers: 1 / each[label] for layers, each in found.items()}, n_layers)
        for label in (f"{workload.label}, tokens/s" for workload in workloads)
    }


def main() -> None:
    """Measure and print."""
    given = arguments.parse(
        __doc__,
        dense="deepseek-7b",
        type="Q4_0",
        layers="2,8",
        n_prompt=512,
        n_gen=128,
        rounds=3,
        quick=False,
    )
    shapes = {name: shape_of(name, quick=given.quick) for name in (MOE, given.dense)}
    workloads = workloads_of([given.n_prompt], [given.n_gen])
    contenders = {}
    for name, shape in shapes.items():
        n_layers = shape.hp.n_layers
        counts = [n_layers] if given.layers == "all" else map(int, given.layers.split(","))
        files = {count: model_file(shape, count, given.type) for count in counts}
        contenders[name] = partial(speeds_of, files, n_layers, workloads)
    rounds = in_turn(contenders, given.rounds, given.dense, n_warm_up=0)
    rows = compare_all(rounds, given.dense)
    moe, dense = (size_of(shape.hp, given.type).n_bytes_per_token / 1e9 for shape in shapes.values())
    rows.append(Row(f"read per token, {MOE}", moe, given.dense, dense, moe / dense, "GB"))
    measured = "all layers" if given.layers == "all" else f"extrapolated from {given.layers} layers"
    title = f"whole models, {measured}, {given.type}, {physical_cores()} threads; the paper: nearly 2.5 x"
    report(title, rows, vars(given))


if __name__ == "__main__":
    main()
