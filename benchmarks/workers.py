"""What it costs to compute layers on workers: a model in one process, and split over workers on loopback.

    python benchmarks/workers.py MODEL.gguf [--tokens 96] [--rounds 5]

All parts of a model read the memory of this machine, one after another, so that the differences are the cost
of the protocol. The weights have the same form everywhere. Table, then JSON.
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
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Request, SamplingParameters
from dsmoe_local.model.gguf_model import read_model

CONTEXT = 1024
PROMPT = tuple(range(10, 26))
NO_END = tuple((token_id, -100.0) for token_id in range(3))  # the demo's tokens that end a reply
_FIRST_PORT = 20_000  # below those that the system gives to connections
_COMMAND = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


@contextmanager
def worker(port: int) -> Iterator[str]:
    """Run a worker until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, "worker", "--port", str(port)], stdout=subprocess.DEVNULL
    )
    try:
        while True:
            assert process.poll() is None, "the worker ended"
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                pass
        # Equal sizes that are too small: the layers are divided evenly.
        yield f"127.0.0.1:{port}=1MiB"
    finally:
        process.kill()
        process.wait()


def seconds_of_a_token(engine: EngineClient, n_tokens: int, number: int) -> float:
    """Return the mean time of a decoded token. `number` is that of the round."""
    request = Request("r", PROMPT, SamplingParameters(temperature=0), n_tokens, logit_bias=NO_END)
    *_, last = engine.submit(request)
    assert last.usage is not None
    return last.usage.completion_seconds / (last.usage.completion_tokens - 1)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    _, hp = read_model(arguments.model)
    splits = {"this process": (0, 0), "half on 1 worker": (1, hp.n_layers // 2), "all on 1": (1, -1)}
    splits |= {"all on 2": (2, -1), "all on 3": (3, -1)}
    ports = iter(range(_FIRST_PORT + os.getpid() % 10_000, 32_000))
    with ExitStack() as stack:
        contenders: dict[str, Callable[[int], float]] = {}
        for name, (n_workers, n_layers) in splits.items():
            addresses = tuple(stack.enter_context(worker(next(ports))) for _ in range(n_workers))
            options = ModelOptions(
                arguments.model, CONTEXT, kernels="plain", n_gpu_layers=n_layers, workers=addresses
            )
            engine = stack.enter_context(EngineClient.load(options))
            contenders[name] = partial(seconds_of_a_token, engine, arguments.tokens)
        seconds = in_turn(contenders, arguments.rounds)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    local = medians["this process"]
    cells = [
        (name, f"{1 / found:.1f}", f"{1e3 * found:.1f}", f"{found / local:.2f} x")
        for name, found in medians.items()
    ]
    show(arguments.model.name, ("layers", "tokens/s", "ms per token", "time"), "lrrr", cells)
    print(json.dumps({"model": arguments.model.name, "seconds": medians}))


if __name__ == "__main__":
    main()
