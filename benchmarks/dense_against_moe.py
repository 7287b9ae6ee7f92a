"""How fast is DeepSeekMoE 16B beside a dense 7B? The paper says: nearly 2.5 times. What holds here?

    python benchmarks/dense_against_moe.py                       some layers of each, extrapolated to all
    python benchmarks/dense_against_moe.py --layers all          the whole models: 13 GB of disk
    python benchmarks/dense_against_moe.py --dense llama2-7b     against another 7B of the paper
    python benchmarks/dense_against_moe.py --quick               small, does it run? the figures mean nothing

Both shapes have random weights, quantized to the same type; files are kept in the cache once made. Speed
does not depend on what weights say, but for the router: random ones choose experts nearly uniformly. The
models are loaded in turn, in an order that turns around every round, and timed as `dsmoe bench` does. What a
token takes grows by the same amount with each layer, so two numbers of layers tell that of all of them.

A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from benchmarks.support.random_models import Shape, measure_speed, model_file, shape_of
from benchmarks.support.runner import in_turn, say
from benchmarks.support.tables import markdown
from dsmoe_local.base.progress import Note
from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.evaluate.speed.machine import look_at_machine
from dsmoe_local.evaluate.speed.output import as_markdown
from dsmoe_local.evaluate.speed.results import ModelSpeed
from dsmoe_local.evaluate.speed.timing import Workload, workloads_of

MOE = "deepseekmoe-16b"
DENSE = ("deepseek-7b", "llama2-7b")
PAPER = 2.5
Measured: TypeAlias = Mapping[tuple[str, int], ModelSpeed]
"""A round: what was measured by shape and number of layers."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", choices=DENSE, default=DENSE[0], help=f"the dense shape [{DENSE[0]}]")
    parser.add_argument("--type", default="Q4_0", metavar="TYPE", help="of both [Q4_0: all matrices alike]")
    parser.add_argument("--layers", default="2,8", metavar="N,N|all", help="layers that are measured [2,8]")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="tokens [512]")
    parser.add_argument("-n", "--n-gen", type=int, default=128, metavar="N", help="tokens [128]")
    parser.add_argument("-r", "--repetitions", type=int, default=3, metavar="N", help="in a round [3]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="[3]")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N")
    parser.add_argument("--quick", action="store_true", help="small shapes; the figures mean nothing")
    given = parser.parse_args()
    words = given.layers.split(",")
    if given.layers != "all" and (len(set(words)) < 2 or not all(w.isdigit() and int(w) > 1 for w in words)):
        parser.error("--layers takes two numbers from 2, or all")
    return given


def joined(rounds: Sequence[ModelSpeed]) -> ModelSpeed:
    """All rounds of one model as one."""
    speeds = [
        replace(each[0], samples_ns=tuple(ns for speed in each for ns in speed.samples_ns))
        for each in zip(*(model.speeds for model in rounds), strict=True)
    ]
    return replace(rounds[0], speeds=tuple(speeds))


def at_layers(points: Mapping[int, float], layers: int) -> float:
    """What a quantity that grows by the same amount with each layer is at so many; the nearest line through
    the points, by least squares.
    """
    if layers in points:
        return points[layers]
    slope, start = np.polyfit(list(points), list(points.values()), 1)
    return float(start + slope * layers)


def seconds_per_token(models: Mapping[int, ModelSpeed], at: int, layers: int) -> float | None:
    """Of the workload `at` that place, of a model with so many layers; None if the figures are too scattered
    to tell.
    """
    seconds = at_layers({count: 1 / model.speeds[at].rate for count, model in models.items()}, layers)
    return seconds if seconds > 0 else None


def main() -> None:
    """Measure, print."""
    given = arguments()
    shapes = [shape_of(name, quick=given.quick) for name in (MOE, given.dense)]
    counts = {
        shape.name: [shape.hp.n_layers]
        if given.layers == "all"
        else sorted(map(int, given.layers.split(",")))
        for shape in shapes
    }
    workloads = workloads_of([given.n_prompt], [given.n_gen])
    files = [
        (shape, layers, model_file(shape, layers, given.type))
        for shape in shapes
        for layers in counts[shape.name]
    ]
    load = os.getloadavg()[0]
    machine = look_at_machine(
        given.threads, lambda event: say(event.text) if isinstance(event, Note) else None
    )
    contenders = {
        path.stem: lambda _, path=path: measure_speed(path, workloads, given.repetitions, given.threads)
        for _, _, path in files
    }
    speeds = in_turn(contenders, given.rounds, n_warm_up=0, told=_told)
    rounds: list[Measured] = [
        {(shape.name, layers): speeds[path.stem][number] for shape, layers, path in files}
        for number in range(given.rounds)
    ]
    models = [joined(speeds[path.stem]) for _, _, path in files]
    print(as_markdown(machine, models))
    report(given, shapes, workloads, rounds, load)


def _told(model: ModelSpeed) -> str:
    return ", ".join(f"{speed.workload.label} {speed.rate:.1f}" for speed in model.speeds)


def of(shape: Shape, measured: Measured) -> dict[int, ModelSpeed]:
    """What was measured of a shape, by its number of layers."""
    return {layers: speed for (name, layers), speed in measured.items() if name == shape.name}


def pair_of(shapes: Sequence[Shape], measured: Measured, at: int) -> tuple[float, float] | None:
    """Seconds per token of both whole models in one round; None if they cannot be told."""
    moe, dense = (seconds_per_token(of(shape, measured), at, shape.hp.n_layers) for shape in shapes)
    return None if moe is None or dense is None else (moe, dense)


def report(
    given: argparse.Namespace,
    shapes: Sequence[Shape],
    workloads: Sequence[Workload],
    rounds: Sequence[Measured],
    load: float,
) -> None:
    """The whole models beside each other, and the line."""
    how = "measured" if given.layers == "all" else f"extrapolated from {given.layers} layers"
    names = [f"{shape.name} ({shape.hp.n_layers} layers)" for shape in shapes]
    print(f"\nWhole models, {how}, {given.type}, {given.threads} threads:\n")
    rows: list[tuple[str, ...]] = []
    result: dict[str, object] = {}
    for at, workload in enumerate(workloads):
        pairs = [each for measured in rounds if (each := pair_of(shapes, measured, at)) is not None]
        label, paper = f"{workload.label}, t/s", f"nearly {PAPER} x"
        if not pairs:
            rows.append((label, "too scattered to tell", "", "", paper))
            result[workload.label] = None
            continue
        # The median of the rounds' own ratios: both sides saw the same machine then.
        ratio = statistics.median(dense / moe for moe, dense in pairs)
        moe, dense = (1 / statistics.median(pair[side] for pair in pairs) for side in range(len(shapes)))
        rows.append((label, f"{moe:.1f}", f"{dense:.1f}", f"{ratio:.2f} x", paper))
        result[workload.label] = {"moe": round(moe, 3), "dense": round(dense, 3), "ratio": round(ratio, 4)}
    moe, dense = (
        at_layers(
            {layers: each.reads.n_bytes for layers, each in of(shape, rounds[0]).items()}, shape.hp.n_layers
        )
        for shape in shapes
    )
    rows.append(("read per token", format_size(moe), format_size(dense), f"{dense / moe:.2f} x", ""))
    print(markdown(("", *names, "ratio", "paper"), "lrrrr", rows))
    result |= {"moe_bytes_per_token": round(moe), "dense_bytes_per_token": round(dense)}
    settings = {"dense": given.dense, "type": given.type, "layers": given.layers, "threads": given.threads}
    print(json.dumps({**settings, "rounds": given.rounds, "load_before": round(load, 2), "result": result}))


if __name__ == "__main__":
    main()
