"""What it costs to compute layers on workers: a model in one process, and split over workers on loopback.

    python -m benchmarks.workers MODEL.gguf [--tokens 96] [--rounds 5]

Measured speeds are shown beside those that `dsmoe plan` predicts from the speed in one process. All processes
have one thread: with more, those of several processes would compete for the cores, which they do not on
machines of their own. The weights have the same form everywhere. Table, then JSON.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from benchmarks.support import arguments
from benchmarks.support.runner import compare, in_turn
from benchmarks.support.tables import report
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
LOCAL = "this process"
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


def milliseconds_of_a_token(engine: EngineClient, n_tokens: int, number: int) -> float:
    """Return the mean time of a decoded token. `number` is that of the round."""
    request = Request("r", PROMPT, SamplingParameters(temperature=0), n_tokens, logit_bias=NO_END)
    *_, last = engine.submit(request)
    assert last.usage is not None
    return 1000 * last.usage.completion_seconds / (last.usage.completion_tokens - 1)


def predicted(
    file: GgufFile, hp: Hyperparameters, n_workers: int, n_layers: int, n_cells: int, local: float
) -> str:
    """Return the predicted milliseconds of a token after `n_cells` tokens. `local` is that of one process."""
    tensors = loaded_tensors(file, hp)
    cache = kv_bytes_per_token(hp) * n_cells
    speed = 1000 * (bytes_per_token(hp, tensors) + cache) / local
    devices = [DeviceMemory(str(n), _SIZE, worker=str(n)) for n in range(1, n_workers + 1)]
    sizes = weight_sizes(tensors, hp)
    placement = place(sizes, devices, PlacementOptions(n_layers), cache=cache // hp.n_layers, compute={})
    machines = [Machine(_SIZE, (speed, speed))] * (1 + n_workers)
    plan = planned(file, hp, placement, machines, parse_network("loopback"), n_cells)
    slow, fast = plan.tokens_per_second(1.0)
    return f"predicted: {1000 / fast:.1f} to {1000 / slow:.1f} ms"


def main() -> None:
    """Measure, predict, print."""
    given = arguments.parse(__doc__, "model", tokens=96, rounds=5)
    file, hp = read_model(given.model)
    splits = {"half on 1 worker": (1, hp.n_layers // 2)}
    splits |= {f"all on {count}": (count, -1) for count in (1, 2, 3)}
    ports = iter(range(_FIRST_PORT + os.getpid() % 10_000, 32_000))
    with ExitStack() as stack:
        contenders: dict[str, Callable[[int], float]] = {}
        for name, (n_workers, n_layers) in {LOCAL: (0, 0), **splits}.items():
            addresses = tuple(stack.enter_context(worker(next(ports))) for _ in range(n_workers))
            options = ModelOptions(
                given.model, CONTEXT, n_threads=1, kernels="plain", n_gpu_layers=n_layers, workers=addresses
            )
            engine = stack.enter_context(EngineClient.load(options))
            contenders[name] = partial(milliseconds_of_a_token, engine, given.tokens)
        found = in_turn(contenders, given.rounds, LOCAL)
    rows = []
    for name, split in splits.items():
        row = compare(f"token, {name}", found, name, LOCAL, unit="ms")
        note = predicted(file, hp, *split, len(PROMPT) + given.tokens // 2, row.theirs)
        rows.append(replace(row, note=note))
    report(given.model.name, rows, {"model": given.model.name})


if __name__ == "__main__":
    main()
