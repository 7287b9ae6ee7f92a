"""What observers cost a decode step: steps with and without them in turn, on one model. Table, then JSON.

    python -m benchmarks.observers MODEL.gguf [--steps 64] [--sequences 1,16] [--only routing] [--threads 1]

Each observer gets a context of its own beside a plain one. The two decode the same tokens alternately, so
that other load on the machine affects both. With --threads 1, the processor's time is measured instead of
wall time: other programs hardly change it. A look is a summary, written as JSON: a chat's panel takes two or
three of them a second.
"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack, closing
from functools import partial

import numpy as np

from benchmarks.support import arguments
from benchmarks.support.runner import Bar, Row, in_turn
from benchmarks.support.tables import report
from dsmoe_local.engine import native
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.observe.dispatcher import Dispatcher
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import Hyperparameters

PROMPT = 16
LOOKS = 9
N_WARM_UP = 4
BARS = {"routing": Bar(1.05, at_most=True)}


class Side:
    """A context with observers, or with none."""

    def __init__(
        self, model: native.Model, hp: Hyperparameters, names: tuple[str, ...], n_sequences: int, threads: int
    ) -> None:
        self.dispatcher = Dispatcher([ObserverOptions(name) for name in names], model, hp)
        options = native.ContextOptions(
            n_context=n_sequences * 512,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            n_sequences=n_sequences,
            n_outputs=n_sequences,
            eval_callback=self.dispatcher.eval_callback,
        )
        self._context = native.Context(model, options)
        self._clock = time.thread_time if threads == 1 else time.perf_counter

    def step(self, rows: list[native.Row]) -> float:
        """Decode as the engine does. Return the milliseconds."""
        begin = self._clock()
        self.dispatcher.before_step(rows)
        assert self._context.decode(rows) == native.DECODED
        self.dispatcher.after_step(rows, self._context.logits())
        return 1000 * (self._clock() - begin)

    def look(self, name: str) -> float:
        """Return the milliseconds of a summary."""
        begin = self._clock()
        json.dumps(self.dispatcher.summary(name))
        return 1000 * (self._clock() - begin)

    def close(self) -> None:
        """Free the context."""
        self._context.close()
        self.dispatcher.close()


def compare(
    model: native.Model, hp: Hyperparameters, name: str, n_sequences: int, n_steps: int, threads: int
) -> Row:
    """Compare steps with and without an observer."""
    tokens = np.random.default_rng(0).integers(10, hp.n_vocab, (n_sequences, PROMPT + n_steps)).tolist()

    def step(side: Side, number: int) -> float:
        at = PROMPT + number + N_WARM_UP - 1
        return side.step([native.Row(each, at, ids[at : at + 1], 1) for each, ids in enumerate(tokens)])

    with ExitStack() as stack:
        plain, observed = (
            stack.enter_context(closing(Side(model, hp, names, n_sequences, threads)))
            for names in ((), (name,))
        )
        for side in (plain, observed):
            for sequence, ids in enumerate(tokens):
                side.step([native.Row(sequence, 0, ids[:PROMPT], 1)])
        contenders = {"plain": partial(step, plain), "observed": partial(step, observed)}
        found = in_turn(contenders, n_steps - N_WARM_UP, n_warm_up=N_WARM_UP, told=None)
        look = statistics.median(observed.look(name) for _ in range(LOOKS))
    theirs = statistics.median(found["plain"])
    # The mean: one step in eight is observed in detail, which a median would miss.
    differences = np.subtract(found["observed"], found["plain"])
    low, high = np.quantile(differences, (0.05, 0.95))
    ours = theirs + float(differences[(differences >= low) & (differences <= high)].mean())
    measure = f"step of {n_sequences} sequences, {name}"
    return Row(
        measure, ours, "no observer", theirs, ours / theirs, "ms", BARS.get(name), f"a look: {look:.2f} ms"
    )


def main() -> None:
    """Measure and print."""
    given = arguments.parse(
        __doc__,
        "model",
        steps=64,
        sequences=(1, 16),
        only=("routing", "activations"),
        threads=physical_cores(),
    )
    _, hp = read_model(given.model)
    with closing(native.Model(given.model)) as model:
        rows = [
            compare(model, hp, name, count, given.steps, given.threads)
            for name in given.only
            for count in given.sequences
        ]
    report(f"{given.model.name}, {given.threads} threads", rows, {"model": given.model.name})


if __name__ == "__main__":
    main()
