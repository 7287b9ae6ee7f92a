"""What `dsmoe-batch --ray` costs, and how many records per second its driver sustains.

    python benchmarks/ray_batches.py [--workers 1000] [--records 200000]
    python benchmarks/ray_batches.py MODEL.gguf [--requests 48] [--tokens 64] [--rounds 3]
    python benchmarks/ray_batches.py --calls 2000

Without a model, workers are simulated: they have different speeds, die, hang and crash, but take no time. All
time is that of the driver: it reads the input, hands out lines, receives records and writes them with the
journal, synced, to the folder for temporary files. Ray is not used: --calls measures what one of its calls
costs the driver, with four actors on this machine that return a report of eight records at once. With a
model, it compares one worker of a Ray cluster on this machine with the same engine without Ray, and two
workers of one thread with one of two threads. Start-up is not counted. Tables, then JSON.
"""

from __future__ import annotations

import json
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.support import arguments
from benchmarks.support.runner import Row, compare, in_turn
from benchmarks.support.simulated_cluster import Behaviour, SimulatedCluster
from benchmarks.support.tables import report, show
from dsmoe_local.base.progress import ignore
from dsmoe_local.batch.cluster.interface import Answer, Cluster, Event, Joined, Report
from dsmoe_local.batch.cluster.placement import RayOptions
from dsmoe_local.batch.cluster.ray_cluster import RayCluster
from dsmoe_local.batch.cluster.ray_connection import LOCAL, connect, import_ray
from dsmoe_local.batch.cluster.run import run_on_cluster
from dsmoe_local.batch.cluster.worker import WorkerOptions
from dsmoe_local.batch.job import BatchOptions, prepared
from dsmoe_local.batch.run import run
from dsmoe_local.engine.load.parallel import Workload, choose_parallel
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, SamplingParameters
from dsmoe_local.model.identity import file_identity
from dsmoe_local.protocol.requests import RequestDefaults

ALONE = {1: "without Ray, 1 thread", 2: "without Ray, 2 threads"}
CLUSTERS = {"1 worker of 1 thread": (1, 1), "1 worker of 2 threads": (1, 2), "2 workers of 1 thread": (2, 1)}
"""Numbers of workers and of threads in each."""
N_PARALLEL = 8


def behaviours(n_workers: int) -> dict[str, Behaviour]:
    """Return clusters whose workers behave differently."""
    measured = Behaviour(n_workers, more_seconds=min(2.0, n_workers * 0.002))
    return {
        "all alike": replace(measured, spread=0.0, speed_spread=0.0),
        "as measured": measured,
        "a tenth are slow": replace(measured, n_slow=n_workers // 10),
        "die and hang": replace(measured, seconds_to_death=600.0, seconds_to_hang=3600.0),
    }


def write_input(path: Path, n_lines: int, n_tokens: int) -> None:
    """Write requests with a few common beginnings."""
    with path.open("w") as file:
        for number in range(n_lines):
            prompt = f"Question of kind {number % 50}. " + "word " * 20 + str(number)
            file.write(json.dumps({"id": f"id-{number}", "prompt": prompt, "max_tokens": n_tokens}) + "\n")


def options_of(folder: Path) -> BatchOptions:
    """Return the options of a batch that begins anew."""
    defaults = RequestDefaults(SamplingParameters(temperature=0))
    return BatchOptions((folder / "in.jsonl",), folder / "out.jsonl", defaults, "simple", restart=True)


def show_simulations(n_workers: int, n_records: int) -> dict[str, float]:
    """Simulate clusters and print a table. Return the records per second of each."""
    found, rows = {}, []
    with tempfile.TemporaryDirectory(prefix="dsmoe-bench-") as name:
        write_input(Path(name) / "in.jsonl", n_records, 64)
        for title, behaviour in behaviours(n_workers).items():
            cluster = SimulatedCluster(behaviour)
            with prepared(options_of(Path(name))) as job:
                summary = run_on_cluster(cluster, job, clock=cluster.clock)
            assert summary.n_records == n_records
            found[title] = n_records / summary.seconds
            ideal = n_records * behaviour.seconds / (behaviour.n_parallel * cluster.speed)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            used, again = f"{ideal / cluster.now:.0%}", f"{cluster.n_lines - n_records:,}"
            rows.append((title, f"{found[title]:,.0f}", used, again, f"{cluster.n_deaths:,}", f"{peak} MiB"))
    heads = ("workers", "records/s", "cluster in use", "given again", "deaths", "peak memory")
    show(f"{n_workers:,} simulated workers, {n_records:,} records", heads, "lrrrrr", rows)
    return found


class Echo:
    """Returns what it is sent."""

    def work(self, sent: Report) -> Report:
        """Return a report."""
        return sent


def show_calls(n_calls: int) -> dict[str, float]:
    """Call actors and print what a call costs. Return the driver's seconds of each, and those of its CPU."""
    ray, closed = import_ray(LOCAL), threading.Event()
    connect(ray, LOCAL, threading.Event(), closed)
    sent = Report([Answer(n, b"x" * 300, "") for n in range(8)])
    actors = [ray.remote(Echo).remote() for _ in range(4)]
    ray.get([actor.work.remote(sent) for actor in actors])
    calls = {actor.work.remote(sent): actor for actor in actors}
    began, began_cpu = time.perf_counter(), time.process_time()
    for _ in range(n_calls):
        (call,), _ = ray.wait(list(calls), timeout=None)
        ray.get(call)
        actor = calls.pop(call)
        calls[actor.work.remote(sent)] = actor
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    ray.shutdown()
    closed.set()
    found = {"seconds": seconds / n_calls, "CPU seconds": cpu_seconds / n_calls}
    rows = [(title, f"{each * 1000:.2f} ms") for title, each in found.items()]
    show(f"{n_calls:,} calls of {len(actors)} actors", ("each", "driver"), "lr", rows)
    return found


class Ready:
    """A cluster whose workers join together, so that the time in which they load the model does not count."""

    def __init__(self, cluster: Cluster, n_workers: int) -> None:
        self._cluster = cluster
        self._n_missing = n_workers
        self._events: list[Event] = []
        self.give, self.reload = cluster.give, cluster.reload
        self.discard, self.close = cluster.discard, cluster.close

    @property
    def n_starting(self) -> int:
        """See Cluster."""
        return self._cluster.n_starting

    def poll(self, seconds: float) -> Sequence[Event]:
        """See Cluster."""
        found = self._cluster.poll(seconds)
        self._events += found
        self._n_missing -= sum(isinstance(event, Joined) for event in found)
        if self._n_missing > 0:
            return []
        events, self._events = self._events, []
        return events


def without_ray(model: Path, n_threads: int, folder: Path, n_lines: int, number: int) -> float:
    """Return the requests per second of the batch in a folder. `number` is that of the round."""
    workload = Workload(n_lines, 256, 128 * n_lines)
    options = choose_parallel(ModelOptions(model, n_threads=n_threads), workload, N_PARALLEL)
    with EngineClient.load(options) as engine, prepared(options_of(folder)) as job:
        return n_lines / run(engine, job).seconds


def with_ray(model: Path, n_workers: int, n_threads: int, folder: Path, n_lines: int, number: int) -> float:
    """Return the same on a Ray cluster of this machine, from when all workers have loaded the model."""
    worker = WorkerOptions(
        batch=options_of(folder),
        model=ModelOptions(model, n_threads=n_threads),
        identity=file_identity(model),
        workload=Workload(n_lines, 256, 128 * n_lines),
        n_parallel=N_PARALLEL,
    )
    options = RayOptions(LOCAL, n_workers, n_threads)
    with (
        closing(RayCluster(options, worker, ignore, threading.Event())) as cluster,
        prepared(worker.batch) as job,
    ):
        return n_lines / run_on_cluster(Ready(cluster, n_workers), job).seconds


def batches(model: Path, n_requests: int, n_tokens: int, rounds: int) -> list[Row]:
    """Compare batches with and without Ray."""
    with tempfile.TemporaryDirectory(prefix="dsmoe-bench-") as name:
        folder = Path(name)
        write_input(folder / "in.jsonl", n_requests, n_tokens)
        contenders: dict[str, Callable[[int], float]] = {
            ALONE[n_threads]: partial(without_ray, model, n_threads, folder, n_requests)
            for n_threads in ALONE
        }
        contenders |= {
            name: partial(with_ray, model, n_workers, n_threads, folder, n_requests)
            for name, (n_workers, n_threads) in CLUSTERS.items()
        }
        found = in_turn(contenders, rounds)
    return [
        compare(name, found, name, ALONE[n_workers * n_threads], unit="requests/s")
        for name, (n_workers, n_threads) in CLUSTERS.items()
    ]


def main() -> None:
    """Measure and print."""
    given = arguments.parse(
        __doc__, "model?", workers=1000, records=200_000, requests=48, tokens=64, rounds=3, calls=0
    )
    if given.calls:
        print(json.dumps(show_calls(given.calls)))
    elif given.model is None:
        print(json.dumps({"records_per_second": show_simulations(given.workers, given.records)}))
    else:
        rows = batches(given.model, given.requests, given.tokens, given.rounds)
        report(given.model.name, rows, {"model": given.model.name})


if __name__ == "__main__":
    main()
