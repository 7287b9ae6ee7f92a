"""Compare the speeds of DeepSeekMoE 16B and of a dense 7B. The paper reports a ratio of nearly 2.5.

    python -m benchmarks.dense_against_moe                       some layers of each, extrapolated to all
    python -m benchmarks.dense_against_moe --layers all          the whole models: 13 GB of disk
    python -m benchmarks.dense_against_moe --dense llama2-7b     against another 7B of the paper
    python -m benchmarks.dense_against_moe --quick               does it run? the figures mean nothing

Both have random weights, quantized to the same type (see `random_models`). They are loaded in turn, and timed
as by `dsmoe bench`. Each layer adds the same time to a token, so the time of all layers is extrapolated from
that of a few. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping

import numpy as np

from benchmarks.support.random_models import measure_speed, model_file, shape_of
from benchmarks.support.runner import in_turn
from benchmarks.support.sizes import size_of
from benchmarks.support.tables import show
from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.evaluate.speed.results import ModelSpeed
from dsmoe_local.evaluate.speed.timing import workloads_of

MOE = "deepseekmoe-16b"
DENSE = ("deepseek-7b", "llama2-7b")
PAPER = "nearly 2.5 x"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--dense", choices=DENSE, default=DENSE[0], help=f"the dense shape [{DENSE[0]}]")
    parser.add_argument("--type", default="Q4_0", metavar="TYPE", help="of both [Q4_0: all matrices alike]")
    parser.add_argument("--layers", default="2,8", metavar="N,N|all", help="layers that are measured [2,8]")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="tokens [512]")
    parser.add_argument("-n", "--n-gen", type=int, default=128, metavar="N", help="tokens [128]")
    parser.add_argument("-r", "--repetitions", type=int, default=3, metavar="N", help="in a round [3]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="[3]")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    given = parser.parse_args()
    words = given.layers.split(",")
    if given.layers != "all" and (len(set(words)) < 2 or not all(w.isdigit() and int(w) > 1 for w in words)):
        parser.error("--layers takes two numbers from 2, or all")
    return given


def at_layers(points: Mapping[int, float], layers: int) -> float:
    """Return a quantity that grows linearly with the layers, by least squares through the points."""
    if layers in points:
        return points[layers]
    slope, start = np.polyfit(list(points), list(points.values()), 1)
    return float(start + slope * layers)


def main() -> None:
    """Measure and print."""
    given = arguments()
    shapes = [shape_of(name, quick=given.quick) for name in (MOE, given.dense)]
    workloads = workloads_of([given.n_prompt], [given.n_gen])
    files = {
        (shape.name, layers): model_file(shape, layers, given.type)
        for shape in shapes
        for layers in ([shape.hp.n_layers] if given.layers == "all" else map(int, given.layers.split(",")))
    }
    load = os.getloadavg()[0]
    contenders = {
        f"{name}, {layers} layers": lambda _, path=path: measure_speed(
            path, workloads, given.repetitions, given.threads
        )
        for (name, layers), path in files.items()
    }
    speeds = dict(
        zip(files, in_turn(contenders, given.rounds, n_warm_up=0, told=_told).values(), strict=True)
    )

    def seconds_per_token(shape: int, workload: int, number: int) -> float:
        """Return the time of a whole model in one round. It may be negative if the figures are scattered."""
        points = {
            layers: 1 / rounds[number].speeds[workload].rate
            for (name, layers), rounds in speeds.items()
            if name == shapes[shape].name
        }
        return at_layers(points, shapes[shape].hp.n_layers)

    rows: list[tuple[str, ...]] = []
    result: dict[str, object] = {}
    for at, workload in enumerate(workloads):
        rounds = [
            [seconds_per_token(shape, at, number) for shape in (0, 1)] for number in range(given.rounds)
        ]
        pairs = [pair for pair in rounds if min(pair) > 0]
        if not pairs:
            rows.append((f"{workload.label}, t/s", "too scattered to tell", "", "", PAPER))
            continue
        moe, dense = (1 / statistics.median(pair[side] for pair in pairs) for side in (0, 1))
        # In a round, both sides are measured under the same conditions.
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
        rows.append((f"{workload.label}, t/s", f"{moe:.1f}", f"{dense:.1f}", f"{ratio:.2f} x", PAPER))
        result[workload.label] = {"moe": round(moe, 3), "dense": round(dense, 3), "ratio": round(ratio, 4)}
    moe, dense = (size_of(shape.hp, given.type).n_bytes_per_token for shape in shapes)
    rows.append(("read per token", format_size(moe), format_size(dense), f"{dense / moe:.2f} x", ""))
    heads = ("", *(f"{shape.name} ({shape.hp.n_layers} layers)" for shape in shapes), "ratio", "paper")
    measured = "all layers" if given.layers == "all" else f"extrapolated from {given.layers} layers"
    show(f"Whole models, {measured}, {given.type}, {given.threads} threads", heads, "lrrrr", rows)
    settings = {name: getattr(given, name) for name in ("dense", "type", "layers", "threads", "rounds")}
    print(json.dumps({**settings, "load_before": round(load, 2), "result": result}))


def _told(model: ModelSpeed) -> str:
    return ", ".join(f"{speed.workload.label} {speed.rate:.1f}" for speed in model.speeds)


if __name__ == "__main__":
    main()
