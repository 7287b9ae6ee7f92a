"""Which form of the weights is fastest on this CPU: repacked as in llama.cpp, as in the file, or a mixture?

    python -m benchmarks.kernels                                  the 16B shape with 6 layers
    python -m benchmarks.kernels --shape qwen3-30b-a3b --layers 3
    python -m benchmarks.kernels --quick                          does it run? the figures mean nothing

Models have random weights and are kept in the cache. In each round, every file is loaded in each form, and
the base once more, as a control. Ratios are to the base of the round: Q4_K_M as llama.cpp loads it. A second
table has the time of loading a file that is in the page cache, and the memory of the engine's process.

Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.support.random_models import model_file, shape_of
from benchmarks.support.runner import in_turn, is_difference, off_by
from benchmarks.support.tables import markdown
from dsmoe_local.engine.load.kernels import FORMS, Kernels
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.timing import options_for, time_workloads, workloads_of

BASE = "Q4_K_M"
_MEMORY = {"RssAnon": "anonymous", "RssFile": "mapped"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load of a model: tokens per second of prompts and replies, seconds of loading, bytes of memory."""

    prompt: float
    decode: float
    load_seconds: float
    memory: dict[str, int]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="deepseekmoe-16b", metavar="PRESET", help="[deepseekmoe-16b]")
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="[6]")
    parser.add_argument("--types", default=f"{BASE},q4,q4-fast", metavar="T,T", help=f"[{BASE},q4,q4-fast]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="[3]")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="tokens [512]")
    parser.add_argument("-n", "--n-gen", type=int, default=32, metavar="N", help="tokens [32]")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N")
    parser.add_argument("--quick", action="store_true", help="a small shape; the figures mean nothing")
    return parser.parse_args()


def measure(options: ModelOptions, n_prompt: int, n_gen: int) -> Loaded:
    """Load a model and time a prompt and a reply: the faster of two repetitions each."""
    workloads = workloads_of([n_prompt], [n_gen])
    began = time.perf_counter()
    with EngineClient.load(options_for(options, workloads)) as engine:
        seconds = time.perf_counter() - began
        found = time_workloads(engine, workloads, 2)
        prompt, decode = (each.workload.n_tokens / min(each.seconds) for each in found)
        return Loaded(prompt, decode, seconds, memory_of(engine.pid))


def memory_of(pid: int) -> dict[str, int]:
    """Return the bytes of anonymous and of mapped memory of a process; {} where the system has no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[key].split()[0]) for key, name in _MEMORY.items()}


def main() -> None:
    """Measure and print."""
    given = arguments()
    shape = shape_of(given.shape, quick=given.quick)
    base = f"{BASE} {Kernels.REPACK}"
    contenders = {}
    for word in given.types.split(","):
        options = ModelOptions(model_file(shape, given.layers, word), n_threads=given.threads)
        for kernels in FORMS:
            asked = replace(options, kernels=kernels.value)
            contenders[f"{word} {kernels}"] = lambda _, asked=asked: measure(
                asked, given.n_prompt, given.n_gen
            )
    if base not in contenders:
        raise SystemExit(f"--types: {BASE} must be one of them")
    speeds = in_turn(
        contenders, given.rounds, base, n_warm_up=0, told=lambda each: f"{each.prompt:.0f}, {each.decode:.1f}"
    )
    control = speeds.pop(f"{base}, again")
    rows, loads, record = [], [], {}
    for name, rounds in speeds.items():
        cells = [name]
        for kind in ("prompt", "decode"):
            bases = [getattr(each, kind) for each in speeds[base]]
            ratios = [getattr(each, kind) / at for each, at in zip(rounds, bases, strict=True)]
            off = off_by(getattr(each, kind) / at for each, at in zip(control, bases, strict=True))
            ratio, rate = statistics.median(ratios), statistics.median(getattr(each, kind) for each in rounds)
            cells += [f"{rate:.1f}", f"{ratio:.2f} x" if is_difference(ratio, off) else "no difference"]
            record[f"{name}, {kind}"] = {
                "rate": round(rate, 2),
                "ratio": round(ratio, 4),
                "control": round(off, 4),
            }
        rows.append(cells)
        seconds = statistics.median(each.load_seconds for each in rounds)
        memory = rounds[-1].memory
        loads.append([name, f"{seconds:.2f} s", *(f"{memory[kind] / 1e9:.2f} GB" for kind in memory)])
        record[f"{name}, load"] = {"seconds": round(seconds, 3), **memory}
    heads = ("weights", f"prompt of {given.n_prompt}, t/s", f"against {BASE} repacked",
             "decode, t/s", f"against {BASE} repacked")  # fmt: skip
    print(
        f"{shape.name}, {given.layers} layers, {given.threads} threads\n\n{markdown(heads, 'lrrrr', rows)}\n"
    )
    print(f"{markdown(('weights', 'load', *_MEMORY.values()), 'lrrr', loads)}\n")
    settings = {"shape": shape.name, "layers": given.layers, "threads": given.threads, "rounds": given.rounds}
    print(json.dumps({**settings, "result": record}))


if __name__ == "__main__":
    main()
