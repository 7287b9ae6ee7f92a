"""How fast is DeepSeekMoE 16B beside a dense 7B? The paper says: nearly 2.5 times. What holds here?

    python benchmarks/dense_against_moe.py                       some layers of each, extrapolated to all
    python benchmarks/dense_against_moe.py --layers all          the whole models: 47 GB of disk at most
    python benchmarks/dense_against_moe.py --dense llama2-7b     against another 7B of the paper
    python benchmarks/dense_against_moe.py --quick               small, does it run? the figures mean nothing

Both shapes have random weights, quantized with the same recipe; files are kept in the cache once made. Speed
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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from gguf.constants import GGUFValueType

from benchmarks.make_checkpoint import Entry, Pool, make_pool, pieces
from benchmarks.support.rows import say
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.base.progress import Note
from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.machine import look_at_machine
from dsmoe_local.evaluate.speed.model import measure_model
from dsmoe_local.evaluate.speed.output import as_markdown
from dsmoe_local.evaluate.speed.results import ModelSpeed, Speed
from dsmoe_local.evaluate.speed.timing import options_for
from dsmoe_local.evaluate.speed.workload import Workload, workloads_of
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.gguf_model import metadata_of
from dsmoe_local.model.gguf_writer import PlannedTensor, plan_gguf, write_at
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, tensor_specs
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.quantize import plan_quantization, quantize_file
from dsmoe_quantize.types import resolve

MOE = "deepseekmoe-16b"
DENSE = ("deepseek-7b", "llama2-7b")
PAPER = 2.5
Measured: TypeAlias = Mapping[tuple[str, int], ModelSpeed]
"""A round: what was measured by shape and number of layers."""
QUICK_PART, QUICK_VOCABULARY, BLOCK = 8, 4096, 32


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of the paper, by the preset's name, or a small one of its kind."""

    name: str
    hp: Hyperparameters

    def file_name(self, layers: int, word: str) -> str:
        """What its file with so many layers is called."""
        return f"{self.name}-{layers}-layers-{word}.gguf"


def shape_of(preset: str, *, quick: bool) -> Shape:
    """The shape; `quick`: with an eighth of its widths."""
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
        n_vocab=QUICK_VOCABULARY,
    )
    return Shape(f"quick-{preset}", hp)


def with_layers(hp: Hyperparameters, layers: int) -> Hyperparameters:
    """The shape with so many layers."""
    return replace(hp, n_layers=layers, n_dense_layers=hp.n_dense_layers if hp.is_moe else layers)


def model_file(shape: Shape, layers: int, word: str) -> Path:
    """The quantized file, made if it is not there."""
    folder = cache_folder() / "benchmarks"
    out = folder / shape.file_name(layers, word)
    if not out.exists():
        say(f"making {out} (once)")
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / shape.file_name(layers, "bf16")
        try:
            write_random(source, with_layers(shape.hp, layers), make_pool(0))
            quantize_file(plan_quantization(source, resolve(word)), out)
        finally:
            source.unlink(missing_ok=True)
    return out


def write_random(path: Path, hp: Hyperparameters, pool: Pool) -> None:
    """A GGUF of that shape: weights in BF16, norms and routers in F32."""
    tensors = [
        PlannedTensor(spec.name, spec.shape, GgmlType.F32 if spec.role in _FLOAT_ROLES else GgmlType.BF16)
        for spec in tensor_specs(hp)
    ]
    plan = plan_gguf(metadata_of_random(hp), tensors)
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.truncate(plan.size)
        write_at(file.fileno(), plan.header, 0)
        for spec, tensor in zip(tensor_specs(hp), tensors, strict=True):
            offset = plan.offsets[spec.name]
            for piece in pieces(
                Entry(spec.name, spec.shape, spec.role), pool, int(random.integers(len(pool)))
            ):
                data: memoryview | bytes = piece
                if tensor.type is GgmlType.F32:
                    data = (np.frombuffer(piece, np.uint16).astype(np.uint32) << 16).tobytes()
                write_at(file.fileno(), data, offset)
                offset += len(data)


_FLOAT_ROLES = (Role.NORM, Role.ROUTER)


def metadata_of_random(hp: Hyperparameters) -> dict[str, Field]:
    """The model's, and a vocabulary of words that no text has: ids are all that is needed."""
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


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", choices=DENSE, default=DENSE[0], help=f"the dense shape [{DENSE[0]}]")
    parser.add_argument("--type", default="q4", metavar="TYPE", help="recipe or mix of both [q4]")
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


def measure(path: Path, workloads: Sequence[Workload], repetitions: int, threads: int) -> ModelSpeed:
    """Load one model, time it, give it back."""
    options = options_for(ModelOptions(path, n_threads=threads), workloads)
    began = time.perf_counter()
    with EngineClient.load(options) as engine:
        seconds = time.perf_counter() - began
        return measure_model(engine, seconds, workloads, repetitions)


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
    rounds: list[Measured] = []
    for number in range(given.rounds):
        measured: dict[tuple[str, int], ModelSpeed] = {}
        for shape, layers, path in files[:: 1 if number % 2 else -1]:
            speed = measure(path, workloads, given.repetitions, given.threads)
            say(f"round {number + 1}: {path.stem} {', '.join(map(_told, speed.speeds))}")
            measured[shape.name, layers] = speed
        rounds.append(measured)
    models = [joined([each[shape.name, layers] for each in rounds]) for shape, layers, _ in files]
    print(as_markdown(machine, models))
    report(given, shapes, workloads, rounds, load)


def _told(speed: Speed) -> str:
    return f"{speed.workload.label} {speed.rate:.1f}"


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
    print(f"| | {names[0]} | {names[1]} | ratio | paper |\n| - | -: | -: | -: | -: |")
    result: dict[str, object] = {}
    for at, workload in enumerate(workloads):
        pairs = [each for measured in rounds if (each := pair_of(shapes, measured, at)) is not None]
        if not pairs:
            print(f"| {workload.label}, t/s | too scattered to tell | | | nearly {PAPER} x |")
            result[workload.label] = None
            continue
        # The median of the rounds' own ratios: both sides saw the same machine then.
        ratio = statistics.median(dense / moe for moe, dense in pairs)
        rates = [1 / statistics.median(pair[side] for pair in pairs) for side in range(len(shapes))]
        print(
            f"| {workload.label}, t/s | {rates[0]:.1f} | {rates[1]:.1f} | {ratio:.2f} x | nearly {PAPER} x |"
        )
        figures = {"moe": round(rates[0], 3), "dense": round(rates[1], 3), "ratio": round(ratio, 4)}
        result[workload.label] = figures
    n_bytes = [
        at_layers(
            {layers: each.reads.n_bytes for layers, each in of(shape, rounds[0]).items()}, shape.hp.n_layers
        )
        for shape in shapes
    ]
    print(
        f"| read per token | {format_size(n_bytes[0])} | {format_size(n_bytes[1])} | "
        f"{n_bytes[1] / n_bytes[0]:.2f} x | |"
    )
    result |= {"moe_bytes_per_token": round(n_bytes[0]), "dense_bytes_per_token": round(n_bytes[1])}
    settings = {"dense": given.dense, "type": given.type, "layers": given.layers, "threads": given.threads}
    print(json.dumps({**settings, "rounds": given.rounds, "load_before": round(load, 2), "result": result}))


if __name__ == "__main__":
    main()
