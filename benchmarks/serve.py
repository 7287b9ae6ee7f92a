"""How does the server behave under load, and what does HTTP cost? A table, then one JSON line.

    python -m benchmarks.serve                                      the demo model (`dsmoe demo` makes it)
    python -m benchmarks.serve --only load --minutes 3              64 clients, good and bad, and no leaks
    python -m benchmarks.serve --only mixed --llama-server BUILD/bin/llama-server
    python -m benchmarks.serve --only first-token                   what the server adds at idle
    python -m benchmarks.serve --quick                              all of it, small: does it run?

The server is a process of its own, started by `dsmoe serve`. `load` needs Linux: it reads /proc.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.support import arguments
from benchmarks.support.bare import read_vocabulary
from benchmarks.support.clients import Connection, Load, run_load, throughput
from benchmarks.support.ours import Ours
from benchmarks.support.runner import WARM_UP, Bar, Row, compare, in_turn, say
from benchmarks.support.tables import report
from benchmarks.support.tools import Server, running
from benchmarks.support.workloads import Corpus, Ids, Workload, batch_of, completion, help_texts, sentences
from dsmoe_local.base.paths import demo_folder
from dsmoe_local.batch.run import run
from dsmoe_local.engine.load.machine import physical_cores, resident_memory
from dsmoe_local.engine.load.parallel import choose_parallel
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import Message, ModelOptions

OURS, BATCH = "dsmoe serve", "dsmoe-batch"
LLAMA = "llama-server -no-kvu"  # its faster cache mode, see docs/performance.md; ours is the same here
LEAKS = {
    "file descriptors": Bar(0, at_most=True),
    "memory of the server": Bar(10, at_most=True),
    "memory of the engine": Bar(20, at_most=True),
}
"""The most that the server may hold after a load beyond what it held before."""
_SETTLE_SECONDS = 30.0
_CLOSE_SECONDS = 5.0
_MEGABYTE = 1e6
_N_WORDS = 40
_N_WARM_UP = 3

Bodies = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Bench:
    """What every row needs.

    Each slot has `n_each` tokens of context, as many as the model was trained for, so that ours chooses a KV
    cache for each slot, as it does by default.
    """

    path: Path
    n_threads: int
    rounds: int
    seconds: float
    llama_server: Path | None
    n_slots: int = 8
    n_each: int = 8192
    n_clients: int = 64

    @property
    def options(self) -> ModelOptions:
        """What our engines have in common."""
        n_context = self.n_slots * self.n_each
        return ModelOptions(self.path, n_threads=self.n_threads, n_context=n_context)

    def ours(self) -> AbstractContextManager[Server]:
        """Run our server."""
        return running([Path(sys.executable).with_name("dsmoe"), "serve", *self._arguments])

    def llama(self) -> AbstractContextManager[Server]:
        """Run llama-server."""
        assert self.llama_server is not None
        return running([self.llama_server, *self._arguments, *LLAMA.split()[1:]])

    @property
    def _arguments(self) -> tuple[str, ...]:
        n_context = self.n_slots * self.n_each
        sizes = ("-t", self.n_threads, "-np", self.n_slots, "-c", n_context)
        return ("-m", str(self.path), *map(str, sizes))


def held_by(server: Server) -> dict[str, float]:
    """Return what the server and its engine hold while no request runs, from /proc. Memory is in MB."""
    tasks = Path(f"/proc/{server.pid}/task").glob("*/children")
    (engine,) = itertools.chain.from_iterable(task.read_text().split() for task in tasks)
    folders = [Path(f"/proc/{pid}") for pid in (server.pid, engine)]
    descriptors, threads = (
        sum(len(list((folder / what).iterdir())) for folder in folders) for what in ("fd", "task")
    )
    return {
        "file descriptors": descriptors,
        "threads": threads,
        "memory of the server": resident_memory(server.pid) / _MEGABYTE,
        "memory of the engine": resident_memory(int(engine)) / _MEGABYTE,
    }


def under_load(bench: Bench) -> list[Row]:
    """Send the requests of many clients, good and bad. Measure the server before and after, at idle."""
    with bench.ours() as server:
        n_context = _idle(server)["n_context"]
        warm_up = run_load(server.port, bench.n_clients, bench.seconds / 6, seed=1, n_context=n_context)
        _idle(server)
        before = held_by(server)
        load = run_load(server.port, bench.n_clients, bench.seconds, seed=2, n_context=n_context)
        idle_seconds = _idle(server)["seconds"]
        after = held_by(server)
        gives_up = time.perf_counter() + _CLOSE_SECONDS
        while after["file descriptors"] > before["file descriptors"] and time.perf_counter() < gives_up:
            after = held_by(server)  # the last connections are being closed
        _show_load(load, idle_seconds)
        if warm_up.wrong or load.wrong or "Traceback" in server.log():
            raise SystemExit("\n".join([*warm_up.wrong[:5], *load.wrong[:20], server.log()[-2000:]]))
    total = f"{sum(load.kinds.values()):,} requests in {load.seconds:.0f} s, none with a wrong answer"
    rows = [
        Row(
            f"{what}, after",
            now,
            "before",
            before[what],
            now - before[what],
            "MB" if "memory" in what else "",
            LEAKS.get(what),
            is_difference=True,
        )
        for what, now in after.items()
    ]
    return [replace(rows[0], note=total), *rows[1:]]


def _idle(server: Server) -> dict[str, Any]:
    """Wait until no request runs. Return the seconds, and the context of a request.

    SystemExit if a request keeps its slot.
    """
    began = time.perf_counter()
    while True:
        connection = Connection(server.port)
        health = json.loads(connection.get("/health"))
        (model,) = [each for each in json.loads(connection.get("/v1/models"))["data"] if each["loaded"]]
        connection.close()
        seconds = time.perf_counter() - began
        if not health["running"] and not health["queued"]:
            return {"seconds": seconds, "n_context": model["max_model_len"]}
        if seconds > _SETTLE_SECONDS:
            raise SystemExit(f"requests are still running after {_SETTLE_SECONDS:.0f} s: {health}")


def _show_load(load: Load, idle_seconds: float) -> None:
    for kind, number in sorted(load.kinds.items()):
        say(f"  {number:6,} {kind}")
    say(f"  first token: median {load.percentile(50):.2f} s, 95 % within {load.percentile(95):.2f} s")
    say(f"  all slots free {idle_seconds:.2f} s after the last answer")


@dataclass(frozen=True, slots=True)
class Kind:
    """A workload: how many of the prompts share a prefix of how many tokens, and the bar for llama-server."""

    title: str
    n_shared: int
    share: float
    n_new: int
    bar: Bar


KINDS = {
    "mixed": Kind("half of the prompts share 400 tokens", 400, 0.5, 32, Bar(1.1)),
    "prefix1600": Kind("all prompts share 1,600 tokens", 1600, 1.0, 16, Bar(1.4)),
}


def throughputs(bench: Bench, name: str) -> list[Row]:
    """Send all requests at once, every second one streamed. Compare new tokens per second."""
    kind = KINDS[name]
    vocabulary = read_vocabulary(bench.path, help_texts())
    corpus = Corpus(vocabulary.corpus)
    prompts = [_prompts(corpus, kind, bench.n_clients, seed) for seed in range(bench.rounds + 1)]
    prompts[WARM_UP] = prompts[WARM_UP][:2]
    bodies = [[completion(prompt, kind.n_new, vocabulary.ends) for prompt in each] for each in prompts]
    with ExitStack() as stack:
        ask = partial(_ask_all, stack.enter_context(bench.ours()), bodies, kind.n_new, {})
        contenders: dict[str, Callable[[int], float]] = {OURS: ask}
        if bench.llama_server is not None:
            llama = stack.enter_context(bench.llama())
            cheapest = {"top_k": 1, "samplers": ["top_k"]}
            contenders[LLAMA] = partial(_ask_all, llama, bodies, kind.n_new, cheapest)
        with batch_of(bodies[-1]) as job:
            options = replace(bench.options, prompt_ratio=job.prompt_ratio)
            options = choose_parallel(options, job.workload, bench.n_slots)
        engine = stack.enter_context(EngineClient.load(options))
        contenders[BATCH] = partial(_batch, engine, bodies)
        figures = in_turn(contenders, bench.rounds)
    title = f"{bench.n_clients} requests, {kind.title}, {kind.n_new} new each"
    note = f"{bench.n_slots} slots"
    return [
        compare(title, figures, OURS, name, bar=bar, note=note)
        for name, bar in {BATCH: Bar(0.97), LLAMA: kind.bar}.items()
        if name in figures
    ]


def _prompts(corpus: Corpus, kind: Kind, n_prompts: int, seed: int) -> list[Ids]:
    n_sharing = round(kind.share * n_prompts)
    prompts = [
        *corpus.prompts(Workload("", n_sharing, kind.n_new, kind.n_shared), seed),
        *corpus.prompts(Workload("", n_prompts - n_sharing, kind.n_new, 0), seed),
    ]
    random.Random(seed).shuffle(prompts)
    return prompts


def _ask_all(server: Server, bodies: list[Bodies], n_new: int, extra: Mapping[str, Any], at: int) -> float:
    """Return the throughput of a round, with `extra` fields in each request."""
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    asked = [{**body, **extra, **(stream if number % 2 else {})} for number, body in enumerate(bodies[at])]
    rate, n_failed = throughput(server.port, asked, n_new, len(asked))
    if n_failed:
        raise SystemExit(f"{n_failed} requests failed: {server.log()[-600:]}")
    return rate


def _batch(engine: EngineClient, bodies: list[Bodies], at: int) -> float:
    """Return the throughput of dsmoe-batch in a round."""
    with batch_of(bodies[at]) as job:
        summary = run(engine, job)
    return summary.n_completion_tokens / summary.seconds


def first_token(bench: Bench) -> list[Row]:
    """Wait for the first token of a chat at idle: through HTTP, and through the engine client alone."""
    n_rounds = 10 * bench.rounds
    with bench.ours() as server, Ours(replace(bench.options, n_parallel=bench.n_slots), ()) as ours:
        connection = Connection(server.port)

        def over_http(at: int) -> float:
            messages = [{"role": "user", "content": sentences(_N_WORDS, at + _N_WARM_UP)}]
            body = {"messages": messages, "max_tokens": 2, "temperature": 0, "stream": True}
            return 1000 * connection.ask("/v1/chat/completions", json.dumps(body).encode()).first_seconds

        def direct(at: int) -> float:
            messages = (Message("user", sentences(_N_WORDS, at + _N_WARM_UP)),)
            return 1000 * ours.reply(messages, 2).first_token_seconds

        contenders = {OURS: over_http, "engine client": direct}
        figures = in_turn(contenders, n_rounds, n_warm_up=_N_WARM_UP, told=None)
        connection.close()
    added = [a - b for a, b in zip(figures[OURS], figures["engine client"], strict=True)]
    row = compare(
        "first token of a streamed chat at idle",
        figures,
        OURS,
        "engine client",
        bar=Bar(5, at_most=True),
        unit="ms",
        note=f"median of {n_rounds} pairs, prompts of {_N_WORDS} words",
    )
    return [replace(row, result=statistics.median(added), is_difference=True, spread=None)]


MEASURES: Mapping[str, Callable[[Bench], list[Row]]] = {
    "load": under_load,
    **{name: partial(throughputs, name=name) for name in KINDS},
    "first-token": first_token,
}


def main() -> None:
    """Measure and print."""
    given = arguments.parse(
        __doc__,
        model=demo_folder() / "demo-q4.gguf",
        only=tuple(MEASURES),
        minutes=3.0,
        llama_server=Path,
        threads=physical_cores(),
        rounds=3,
        quick=False,
    )
    bench = Bench(given.model, given.threads, given.rounds, 60 * given.minutes, given.llama_server)
    if given.quick:
        bench = replace(bench, n_slots=4, rounds=1, n_clients=8, seconds=6.0)
    rows: list[Row] = []
    for name in given.only:
        say(name)
        rows += MEASURES[name](bench)
    record = {"model": given.model.name, "threads": given.threads}
    record |= {"clients": bench.n_clients, "slots": bench.n_slots}
    report(f"{given.model.name}, {given.threads} threads", rows, record)


if __name__ == "__main__":
    main()
