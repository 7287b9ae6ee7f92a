"""What observers cost a decode step: steps with and without them in turn, on one model. Table, then JSON.

    python benchmarks/observers.py MODEL.gguf [--steps 64] [--sequences 1,16] [--only routing] [--threads 1]

Each observer gets a context of its own beside a plain one; the two decode the same tokens alternately, so
that whatever else the machine does strikes both. With --threads 1 the processor's time is measured instead of
the wall's, which other programs hardly change. A look is a summary, written as JSON: a chat's panel takes two
or three of them a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.support.runner import in_turn
from benchmarks.support.tables import show
from dsmoe_local.engine import native
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.observe.dispatcher import Dispatcher
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import Hyperparameters

PROMPT = 16
LOOKS = 9
N_WARM_UP = 4


class Side:
    """A context with observers, or with none."""

    def __init__(
        self,
        model: native.Model,
        hp: Hyperparameters,
        names: tuple[str, ...],
        n_sequences: int,
        n_cells: int,
        threads: int,
    ) -> None:
        self.dispatcher = Dispatcher([ObserverOptions(name) for name in names], model, hp)
        options = native.ContextOptions(
            n_context=n_cells,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            n_sequences=n_sequences,
            n_outputs=n_sequences,
            eval_callback=self.dispatcher.eval_callback,
        )
        self.context = native.Context(model, options)
        self.clock = time.thread_time if threads == 1 else time.perf_counter

    def step(self, rows: list[native.Row]) -> float:
        """Decode as the engine does; the seconds that it takes."""
        begin = self.clock()
        self.dispatcher.before_step(rows)
        assert self.context.decode(rows) == native.DECODED
        logits = self.context.logits()
        self.dispatcher.after_step(rows, logits)
        return self.clock() - begin

    def look(self, name: str) -> float:
        """Seconds that a summary takes."""
        begin = self.clock()
        json.dumps(self.dispatcher.summary(name))
        return self.clock() - begin

    def close(self) -> None:
        self.context.close()
        self.dispatcher.close()


def compare(
    model: native.Model, hp: Hyperparameters, name: str, n_sequences: int, n_steps: int, threads: int
) -> tuple[float, float, float]:
    """Seconds of a step without and with the observer, and of a look at it."""
    n_cells = n_sequences * (PROMPT + n_steps) + 256
    sides = [Side(model, hp, names, n_sequences, n_cells, threads) for names in ((), (name,))]
    generator = np.random.default_rng(0)
    try:
        for sequence in range(n_sequences):
            prompt = generator.integers(10, hp.n_vocab, PROMPT).tolist()
            for side in sides:
                side.step([native.Row(sequence, 0, prompt, 1)])
        tokens = generator.integers(10, hp.n_vocab, (n_steps, n_sequences)).tolist()

        def rows_of(number: int) -> list[native.Row]:
            at = number + N_WARM_UP - 1
            position = PROMPT + at
            return [native.Row(sequence, position, [token], 1) for sequence, token in enumerate(tokens[at])]

        contenders = {
            "plain": lambda number: sides[0].step(rows_of(number)),
            "observed": lambda number: sides[1].step(rows_of(number)),
        }
        seconds = in_turn(contenders, n_steps - N_WARM_UP, n_warm_up=N_WARM_UP, told=None)
        plain = statistics.median(seconds["plain"])
        # Their mean: one step in eight is observed in detail, which a median would miss.
        differences = np.subtract(seconds["observed"], seconds["plain"])
        low, high = np.quantile(differences, (0.05, 0.95))
        observed = plain + float(differences[(differences >= low) & (differences <= high)].mean())
        return plain, observed, statistics.median(sides[1].look(name) for _ in range(LOOKS))
    finally:
        for side in sides:
            side.close()


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--sequences", default="1,16")
    parser.add_argument("--only", default="routing,activations")
    parser.add_argument("--threads", type=int, default=physical_cores())
    arguments = parser.parse_args()
    _, hp = read_model(arguments.model)
    model = native.Model(arguments.model)
    results = []
    lines = []
    for name in arguments.only.split(","):
        for count in map(int, arguments.sequences.split(",")):
            plain, observed, look = compare(model, hp, name, count, arguments.steps, arguments.threads)
            cost = observed / plain - 1
            bar = "5 %" if name == "routing" else ""
            times = (f"{1e3 * plain:.2f}", f"{1e3 * observed:.2f}", f"{cost:.1%}", f"{1e3 * look:.2f}")
            lines.append((name, str(count), *times, bar))
            results.append(
                {"observer": name, "sequences": count, "plain": plain, "observed": observed, "look": look}
            )
    model.close()
    heads = ("observer", "sequences", "plain ms", "observed ms", "cost", "look ms", "bar")
    show(f"{arguments.model.name}, {arguments.threads} threads", heads, "lrrrrrl", lines)
    print(json.dumps({"model": arguments.model.name, "n_layers": hp.n_layers, "results": results}))


if __name__ == "__main__":
    main()
