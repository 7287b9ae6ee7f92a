"""How does the server behave under load, and what does HTTP cost? A table, then one JSON line.

    python -m benchmarks.serve                                      the demo model (`dsmoe demo` makes it)
    python -m benchmarks.serve --only load --minutes 3              64 clients, good and bad, and no leaks
    python -m benchmarks.serve --only mixed --llama-server BUILD/bin/llama-server
    python -m benchmarks.serve --only first-token                   what the server adds at idle
    python -m benchmarks.serve --quick                              all of it, small: does it run?

The server is a process of its own, started by `dsmoe serve`. `load` needs Linux: it reads /proc.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.support.bare import read_vocabulary
from benchmarks.support.clients import Connection, Load, run_load, throughput
from benchmarks.support.ours import GREEDY, Ours
from benchmarks.support.runner import WARM_UP, Bar, Row, compare, in_turn, say
from benchmarks.support.tables import report
from benchmarks.support.tools import Server, running
from benchmarks.support.workloads import Corpus, Ids, Workload, help_texts, sentences
from dsmoe_local.base.paths import demo_folder
from dsmoe_local.batch.job import BatchOptions, Job, prepared
from dsmoe_local.batch.run import run
from dsmoe_local.engine.load.machine import physical_cores, resident_memory
from dsmoe_local.engine.load.parallel import choose_parallel
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import Message, ModelOptions
from dsmoe_local.protocol.requests import RequestDefaults

OURS, BATCH = "dsmoe serve", "dsmoe-batch"
_LLAMA = "llama-server -no-kvu"  # its faster cache mode, see docs/performance.md; ours is the same here
_BAN = -100
_SETTLE_SECONDS = 30.0
_CLOSE_SECONDS = 5.0
_MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class Bench:
    """What every row needs.

    Each slot has `n_each` tokens of context, as many as the model was trained for, so that ours chooses a KV
    cache for each slot, as it does by default.
    """

    path: Path
    n_threads: int
    n_slots: int
    n_each: int
    rounds: int
    n_clients: int
    seconds: float
    llama_server: Path | None

    @property
    def options(self) -> ModelOptions:
        """What our engines have in common."""
        n_context = self.n_slots * self.n_each
        return ModelOptions(self.path, n_threads=self.n_threads, n_context=n_context)

    def ours(self, *arguments: str) -> AbstractContextManager[Server]:
        """Our server, running."""
        program = Path(sys.executable).with_name("dsmoe")
        return running([program, "serve", "-m", self.path, *self._arguments, *arguments])

    def llama(self, *arguments: str) -> AbstractContextManager[Server]:
        """llama-server, running."""
        assert self.llama_server is not None
        return running([self.llama_server, "-m", self.path, *self._arguments, *arguments])

    @property
    def _arguments(self) -> tuple[str, ...]:
        sizes = {"-t": self.n_threads, "-np": self.n_slots, "-c": self.n_slots * self.n_each}
        return tuple(itertools.chain.from_iterable((flag, str(size)) for flag, size in sizes.items()))


# --- load ---


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server and its engine hold while no request runs."""

    descriptors: int
    threads: int
    server_bytes: int
    engine_bytes: int

    @classmethod
    def of(cls, server: Server) -> Sample:
        """Read /proc."""
        tasks = Path(f"/proc/{server.pid}/task").glob("*/children")
        (engine,) = itertools.chain.from_iterable(task.read_text().split() for task in tasks)
        folders = [Path(f"/proc/{pid}") for pid in (server.pid, engine)]
        descriptors, threads = (
            sum(len(list((folder / what).iterdir())) for folder in folders) for what in ("fd", "task")
        )
        return cls(descriptors, threads, resident_memory(server.pid), resident_memory(int(engine)))


def under_load(bench: Bench) -> list[Row]:
    """Many clients, good and bad. The server is measured before and after, at idle."""
    with bench.ours() as server:
        n_context = _idle(server)["n_context"]
        warm_up = run_load(server.port, bench.n_clients, bench.seconds / 6, seed=1, n_context=n_context)
        _idle(server)
        before = Sample.of(server)
        load = run_load(server.port, bench.n_clients, bench.seconds, seed=2, n_context=n_context)
        idle_seconds = _idle(server)["seconds"]
        after = Sample.of(server)
        gives_up = time.perf_counter() + _CLOSE_SECONDS
        while after.descriptors > before.descriptors and time.perf_counter() < gives_up:
            after = Sample.of(server)  # the last connections are being closed
        _show_load(load, idle_seconds)
        if warm_up.wrong or load.wrong or "Traceback" in server.log():
            raise SystemExit("\n".join([*warm_up.wrong[:5], *load.wrong[:20], server.log()[-2000:]]))
    rows = [
        _difference("file descriptors", after.descriptors, before.descriptors, "", 0),
        _difference("threads", after.threads, before.threads, "", None),
        _difference(
            "memory of the server", after.server_bytes / _MEGABYTE, before.server_bytes / _MEGABYTE, "MB", 10
        ),
        _difference(
            "memory of the engine", after.engine_bytes / _MEGABYTE, before.engine_bytes / _MEGABYTE, "MB", 20
        ),
    ]
    total = f"{sum(load.kinds.values()):,} requests in {load.seconds:.0f} s, none with a wrong answer"
    return [replace(rows[0], note=total), *rows[1:]]


def _idle(server: Server) -> dict[str, Any]:
    """Wait until no request runs. Return the seconds, and the context of a request. Ends the program if a
    request keeps its slot.
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


def _difference(measure: str, after: float, before: float, unit: str, most: float | None) -> Row:
    bar = None if most is None else Bar(most, at_most=True)
    return Row(f"{measure}, after", after, "before", before, after - before, unit, bar, is_difference=True)


# --- throughput ---


@dataclass(frozen=True, slots=True)
class Kind:
    """A workload: how many of the prompts share a prefix of how many tokens, and the bars."""

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
    """New tokens per second, with all requests sent at once. Every second one is streamed."""
    kind = KINDS[name]
    vocabulary = read_vocabulary(bench.path, help_texts())
    corpus = Corpus(vocabulary.corpus)
    prompts = [_prompts(corpus, kind, bench.n_clients, seed) for seed in range(bench.rounds + 1)]
    prompts[WARM_UP] = prompts[WARM_UP][:2]
    bodies = [[_body(prompt, kind.n_new, vocabulary.ends) for prompt in each] for each in prompts]
    return _compare_throughput(bench, kind, bodies)


def _prompts(corpus: Corpus, kind: Kind, n_prompts: int, seed: int) -> list[Ids]:
    n_sharing = round(kind.share * n_prompts)
    prompts = [
        *corpus.prompts(Workload("", n_sharing, kind.n_new, kind.n_shared), seed),
        *corpus.prompts(Workload("", n_prompts - n_sharing, kind.n_new, 0), seed),
    ]
    random.Random(seed).shuffle(prompts)
    return prompts


def _body(prompt: Ids, n_new: int, ends: Sequence[int]) -> dict[str, Any]:
    """A greedy completion of exactly `n_new` tokens."""
    bias = {str(token_id): _BAN for token_id in ends}
    return {"prompt": prompt, "max_tokens": n_new, "temperature": 0, "logit_bias": bias}


def _compare_throughput(bench: Bench, kind: Kind, bodies: list[list[dict[str, Any]]]) -> list[Row]:
    with ExitStack() as stack:
        servers = {OURS: stack.enter_context(bench.ours())}
        if bench.llama_server is not None:
            servers[_LLAMA] = stack.enter_context(bench.llama(*_LLAMA.split()[1:]))
        batch = stack.enter_context(_Batch(bench))
        contenders: dict[str, Callable[[int], float]] = {
            name: partial(_ask_all, server, bodies, kind.n_new, is_llama=name != OURS)
            for name, server in servers.items()
        }
        contenders[BATCH] = lambda at: batch.rate(bodies[at])
        figures = in_turn(contenders, bench.rounds)
    bars = {BATCH: Bar(0.97), _LLAMA: kind.bar}
    return [
        compare(
            f"{bench.n_clients} requests, {kind.title}, {kind.n_new} new each",
            figures,
            OURS,
            name,
            bar=bar,
            note=f"{bench.n_slots} slots",
        )
        for name, bar in bars.items()
        if name in figures
    ]


def _ask_all(
    server: Server, bodies: list[list[dict[str, Any]]], n_new: int, at: int, *, is_llama: bool
) -> float:
    # llama-server's cheapest greedy sampler.
    extra = {"top_k": 1, "samplers": ["top_k"]} if is_llama else {}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    encoded = [
        json.dumps({**body, **extra, **(stream if number % 2 else {})}).encode()
        for number, body in enumerate(bodies[at])
    ]
    return throughput(server.port, encoded, n_new)


class _Batch:
    """dsmoe-batch with the server's slots, without the time to load the model."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._folder = tempfile.TemporaryDirectory()
        self._numbers = itertools.count()
        self._engine: EngineClient | None = None

    def rate(self, bodies: list[dict[str, Any]]) -> float:
        """Generated tokens per second of one batch."""
        folder = Path(self._folder.name) / str(next(self._numbers))
        folder.mkdir()
        source = folder / "in.jsonl"
        source.write_text("".join(f"{json.dumps(body)}\n" for body in bodies))
        with prepared(BatchOptions([source], folder / "out.jsonl", RequestDefaults(GREEDY))) as job:
            if self._engine is None:
                self._engine = self._load(job)
            summary = run(self._engine, job)
        return summary.n_completion_tokens / summary.seconds

    def _load(self, job: Job) -> EngineClient:
        options = replace(self._bench.options, prompt_ratio=job.prompt_ratio)
        return EngineClient.load(choose_parallel(options, job.workload, self._bench.n_slots))

    def __enter__(self) -> _Batch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()
        self._folder.cleanup()


# --- first token ---

_N_WORDS = 40
_N_WARM_UP = 3


def first_token(bench: Bench) -> list[Row]:
    """The time to the first token of a chat at idle: through HTTP, and through the engine client alone."""
    n_rounds = 10 * bench.rounds
    with bench.ours() as server, Ours(replace(bench.options, n_parallel=bench.n_slots), ()) as ours:
        connection = Connection(server.port)

        def over_http(at: int) -> float:
            messages = [{"role": "user", "content": _question(at)}]
            body = {"messages": messages, "max_tokens": 2, "temperature": 0, "stream": True}
            return 1000 * connection.ask("/v1/chat/completions", json.dumps(body).encode()).first_seconds

        def direct(at: int) -> float:
            return 1000 * ours.reply((Message("user", _question(at)),), 2).first_token_seconds

        figures = in_turn(
            {OURS: over_http, "engine client": direct}, n_rounds, n_warm_up=_N_WARM_UP, told=None
        )
        connection.close()
    added = [a - b for a, b in zip(figures[OURS], figures["engine client"], strict=True)]
    return [
        Row(
            "first token of a streamed chat at idle",
            statistics.median(figures[OURS]),
            "engine client",
            statistics.median(figures["engine client"]),
            statistics.median(added),
            "ms",
            Bar(5, at_most=True),
            f"median of {n_rounds} pairs, prompts of {_N_WORDS} words",
            is_difference=True,
        )
    ]


def _question(at: int) -> str:
    return sentences(_N_WORDS, at + _N_WARM_UP)


MEASURES: dict[str, Callable[[Bench], list[Row]]] = {
    "load": under_load,
    **{name: partial(throughputs, name=name) for name in KINDS},
    "first-token": first_token,
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FILE", default=demo_folder() / "demo-q4.gguf")
    parser.add_argument("--only", metavar="ROW,...", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--minutes", type=float, default=3, metavar="N", help="length of the load [3]")
    parser.add_argument("--llama-server", type=Path, metavar="FILE", help="llama.cpp's server")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="that count [3]")
    parser.add_argument("--quick", action="store_true", help="small sizes; the figures mean nothing")
    given = parser.parse_args()
    if set((given.only or "").split(",")) - set(MEASURES) - {""}:
        parser.error(f"--only takes {', '.join(MEASURES)}")
    return given


def main() -> None:
    """Measure, print."""
    given = arguments()
    bench = Bench(
        given.model,
        given.threads,
        n_slots=8,
        n_each=8192,
        rounds=given.rounds,
        n_clients=64,
        seconds=60 * given.minutes,
        llama_server=given.llama_server,
    )
    if given.quick:
        bench = replace(bench, n_slots=4, rounds=1, n_clients=8, seconds=6.0)
    rows: list[Row] = []
    for name in given.only.split(",") if given.only else MEASURES:
        say(name)
        rows += MEASURES[name](bench)
    record = {
        "model": given.model.name,
        "threads": given.threads,
        "clients": bench.n_clients,
        "slots": bench.n_slots,
    }
    report(f"{given.model.name}, {given.threads} threads", rows, record)


if __name__ == "__main__":
    main()
