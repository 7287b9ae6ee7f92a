"""What it costs to compute layers on workers: a model in one process, and split over workers on loopback.

    python -m benchmarks.workers MODEL.gguf [--tokens 96] [--rounds 5]

Measured speeds are shown beside those that `dsmoe plan` predicts from the speed in one process. All processes
have one thread: with more, those of several processes would compete for the cores, which they do not on
machines of their own. The weights have the same form everywhere. Table, then JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks.support.runner import in_turn
from benchmarks.support.tables import show
from dsmoe_local.engine.load.network import parse_network
from dsmoe_local.engine.load.placement import DeviceMemory, PlacementOptions, place, weight_sizes
from dsmoe_local.engine.load.split_plan import Machine, planned
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.process.spawn import child_environment
from dsmoe_local.engine.types import ModelOptions, Request, SamplingParameters
from dsmoe_local.model.cost import bytes_per_token, kv_bytes_per_token
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.gguf_model import loaded_tensors, read_model
from dsmoe_local.model.hyperparameters import Hyperparameters

CONTEXT = 1024
PROMPT = tuple(range(10, 26))
NO_END = tuple((token_id, -100.0) for token_id in range(3))  # the demo's tokens that end a reply
_SIZE = 1 << 20
"""The memory of each worker. It is too small for any model, so that the layers are divided evenly."""
_FIRST_PORT = 20_000  # below those that the system gives to connections
_COMMAND = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


@contextmanager
def worker(port: int) -> Iterator[str]:
    """Run a worker with one thread until the block ends. Yields its address and size for --rpc."""
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, "worker", "--port", str(port), "-t", "1"],
        stdout=subprocess.DEVNULL,
        env=child_environment(),
    )
    try:
        while True:
            assert process.poll() is None, "the worker ended"
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                pass
        yield f"127.0.0.1:{port}={_SIZE}"
    finally:
        process.kill()
        process.wait()


def seconds_of_a_token(engine: EngineClient, n_tokens: int, number: int) -> float:
    """Return the mean time of a decoded token. `number` is that of the round."""
    request = Request("r", PROMPT, SamplingParameters(temperature=0), n_tokens, logit_bias=NO_END)
    *_, last = engine.submit(request)
    assert last.usage is not None
    return last.usage.completion_seconds / (last.usage.completion_tokens - 1)


def predicted_seconds(
    file: GgufFile, hp: Hyperparameters, n_workers: int, n_layers: int, n_cells: int, local: float
) -> tuple[float, float]:
    """Return the least and most time of a token after `n_cells` tokens, by that of one process."""
    tensors = loaded_tensors(file, hp)
    cache = kv_bytes_per_token(hp) * n_cells
    speed = (bytes_per_token(hp, tensors) + cache) / local
    devices = [DeviceMemory(str(n), _SIZE, worker=str(n)) for n in range(1, n_workers + 1)]
    sizes = weight_sizes(tensors, hp)
    options = PlacementOptions(n_layers)
    placement = place(sizes, devices, options, cache=cache // hp.n_layers, compute={})
    machines = [Machine(_SIZE, (speed, speed))] * (1 + n_workers)
    plan = planned(file, hp, placement, machines, parse_network("loopback"), n_cells)
    slow, fast = plan.tokens_per_second(1.0)
    return 1 / fast, 1 / slow


def main() -> None:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    file, hp = read_model(arguments.model)
    splits = {"this process": (0, 0), "half on 1 worker": (1, hp.n_layers // 2), "all on 1": (1, -1)}
    splits |= {"all on 2": (2, -1), "all on 3": (3, -1)}
    ports = iter(range(_FIRST_PORT + os.getpid() % 10_000, 32_000))
    with ExitStack() as stack:
        contenders: dict[str, Callable[[int], float]] = {}
        for name, (n_workers, n_layers) in splits.items():
            addresses = tuple(stack.enter_context(worker(next(ports))) for _ in range(n_workers))
            options = ModelOptions(
                arguments.model,
                CONTEXT,
                n_threads=1,
                kernels="plain",
                n_gpu_layers=n_layers,
                workers=addresses,
            )
            engine = stack.enter_context(EngineClient.load(options))
            contenders[name] = partial(seconds_of_a_token, engine, arguments.tokens)
        seconds = in_turn(contenders, arguments.rounds)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    local = medians["this process"]
    n_cells = len(PROMPT) + arguments.tokens // 2
    ranges = {
        name: predicted_seconds(file, hp, *split, n_cells, local)
        for name, split in splits.items()
        if split[0]
    }
    cells = []
    for name, found in medians.items():
        least, most = ranges.get(name, (found, found))
        error = f"{found / ((least + most) / 2):.2f} x" if name in ranges else ""
        predicted = f"{1e3 * least:.1f} to {1e3 * most:.1f}" if name in ranges else ""
        cells.append(
            (name, f"{1 / found:.1f}", f"{1e3 * found:.1f}", predicted, error, f"{found / local:.2f} x")
        )
    headings = ("layers", "tokens/s", "ms per token", "predicted", "error", "to this process")
    show(arguments.model.name, headings, "lrrrrr", cells)
    print(json.dumps({"model": arguments.model.name, "seconds": medians, "predicted": ranges}))


if __name__ == "__main__":
    main()
