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

from dsmoe_local.engine import native
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.observe.dispatcher import Dispatcher
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import Hyperparameters

PROMPT = 16
LOOKS = 9


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
        self.seconds: list[float] = []

    def step(self, rows: list[native.Row], *, counted: bool) -> None:
        """Decode as the engine does, timed."""
        begin = self.clock()
        self.dispatcher.before_step(rows)
        assert self.context.decode(rows) == native.DECODED
        logits = self.context.logits()
        self.dispatcher.after_step(rows, logits)
        if counted:
            self.seconds.append(self.clock() - begin)

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
                side.step([native.Row(sequence, 0, prompt, 1)], counted=False)
        for step in range(n_steps):
            tokens = generator.integers(10, hp.n_vocab, n_sequences).tolist()
            rows = [native.Row(sequence, PROMPT + step, [token], 1) for sequence, token in enumerate(tokens)]
            for side in sides if step % 2 else sides[::-1]:
                side.step(rows, counted=step >= 4)
        plain = statistics.median(sides[0].seconds)
        # Their mean: one step in eight is observed in detail, which a median would miss.
        differences = np.subtract(sides[1].seconds, sides[0].seconds)
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
    print(
        f"{'observer':14}{'sequences':>10}{'plain ms':>10}{'observed ms':>13}{'cost':>8}{'look ms':>9}   bar"
    )
    for name in arguments.only.split(","):
        for count in map(int, arguments.sequences.split(",")):
            plain, observed, look = compare(model, hp, name, count, arguments.steps, arguments.threads)
            cost = observed / plain - 1
            bar = "5 %" if name == "routing" else ""
            times = f"{plain * 1e3:>10.2f}{observed * 1e3:>13.2f}{cost:>8.1%}{look * 1e3:>9.2f}"
            print(f"{name:14}{count:>10}{times}   {bar}")
            results.append(
                {"observer": name, "sequences": count, "plain": plain, "observed": observed, "look": look}
            )
    model.close()
    print(json.dumps({"model": arguments.model.name, "n_layers": hp.n_layers, "results": results}))


if __name__ == "__main__":
    main()
