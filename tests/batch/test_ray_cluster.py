"""Batches on a Ray cluster of several nodes on this machine: workers and nodes that die, hang and come."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support import hosted
from support.batches import answer, batch, by_id, records, write_lines
from support.models import tiny_model

from dsmoe_local.base.errors import DsmoeError, FileError, MissingExtraError
from dsmoe_local.base.progress import Event, Note
from dsmoe_local.batch.cluster import ray_cluster, run
from dsmoe_local.batch.cluster.interface import Item, Joined, Refused
from dsmoe_local.batch.cluster.placement import RayOptions
from dsmoe_local.batch.cluster.ray_cluster import RayCluster
from dsmoe_local.batch.cluster.ray_connection import import_ray
from dsmoe_local.batch.cluster.worker import WorkerOptions
from dsmoe_local.batch.job import BatchOptions, prepared
from dsmoe_local.cli.commands import load_command
from dsmoe_local.engine.load.parallel import Workload
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.identity import file_identity

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(300)

COMMAND = "from dsmoe_local.cli.main import batch; batch()"
N_LINES = 200


class Nodes:
    """A cluster whose head has no CPU, and nodes with one each. `cache` is the cache folder of all."""

    def __init__(self, cache: Path) -> None:
        from ray.cluster_utils import Cluster

        self._cache = cache
        with self._environment():
            self._cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.address: str = self._cluster.address
        self.nodes: list[Any] = []
        self.add()
        self.add()

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """Workers have the environment in which their node was started."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            patch.setenv("XDG_CACHE_HOME", str(self._cache))
            yield

    def add(self) -> None:
        with self._environment():
            self.nodes.append(self._cluster.add_node(num_cpus=1))

    def remove(self, node_id: str) -> None:
        node = next(each for each in self.nodes if each.node_id == node_id)
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of the nodes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def nodes(cache: Path) -> Iterator[Nodes]:
    """A cluster with two nodes."""
    import_ray("auto")
    started = Nodes(cache)
    yield started
    started.close()


class Cluster(RayCluster):
    """Calls `given` with each worker that gets lines for the first time. `pids`: their processes."""

    given: Callable[[Cluster, str], None] | None = None
    pids: dict[str, int]

    def give(self, worker: str, items: Sequence[Item]) -> None:
        if self.given is None or not items or worker in self.pids:
            super().give(worker, items)
            return
        call = self._members[worker].actor.__ray_call__.remote(lambda self: os.getpid())
        self.pids[worker] = self._ray.get(call)
        super().give(worker, items)
        self.given(self, worker)


def options_of(folder: Path, n_lines: int = N_LINES) -> BatchOptions:
    return batch(folder, *({"id": str(n), "prompt": f"p{n} " + "word " * 20} for n in range(n_lines)))


def run_batch(
    nodes: Nodes,
    options: BatchOptions,
    *,
    model: Path | None = None,
    factory: str = hosted.FAKE,
    ray: dict[str, Any] | None = None,
    given: Callable[[Cluster, str], None] | None = None,
) -> list[str]:
    """Run a batch on an engine without a model. Return the notes."""
    worker = WorkerOptions(
        batch=options,
        model=ModelOptions(model or tiny_model(), n_threads=1),
        identity=file_identity(tiny_model()),
        workload=Workload(N_LINES, 100, 100 * N_LINES),
        n_parallel=2,
        factory=factory,
    )
    events: list[Event] = []
    stop = threading.Event()
    with (
        closing(Cluster(RayOptions(nodes.address, **(ray or {})), worker, events.append, stop)) as cluster,
        prepared(options) as job,
    ):
        cluster.given, cluster.pids = given, {}
        run.run_on_cluster(cluster, job, events.append, stop)
    return [event.text for event in events if isinstance(event, Note)]


def check(options: BatchOptions, n_lines: int = N_LINES) -> None:
    found = by_id(records(options.out))
    assert {name for name, record in found.items() if record["error"] is None} == {
        str(n) for n in range(n_lines)
    }
    assert all(record["text"].startswith(f"p{name} word") for name, record in found.items())


def kill(cluster: Cluster, worker: str) -> None:
    """Kill the process of a worker."""
    os.kill(cluster.pids[worker], signal.SIGKILL)


def command(source: Path, out: Path, *more: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    words = [str(source), "-o", str(out), "-m", str(tiny_model()), "-t", "1", "--deterministic", *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DSMOE_FAULT": fault}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words], env=environment, capture_output=True, text=True, check=False
    )


def test_as_the_plain_command_and_after_a_kill(nodes: Nodes, tmp_path: Path) -> None:
    """Guards: other replies than without Ray; records lost or doubled by a killed driver; text on stdout."""
    lines = [{"id": str(n), "prompt": f"The quick {n % 7} {n}", "max_tokens": 8} for n in range(60)]
    (tmp_path / "plain").mkdir()
    model = ModelOptions(tiny_model(), n_parallel=4, unified=False, deterministic=True, n_threads=1)
    with EngineClient.load(model) as engine:
        plain = by_id(answer(engine, batch(tmp_path / "plain", *lines)))
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    more = ("--temp", "0", "--format", "simple", "--ray", nodes.address, "--json")
    killed = command(source, out, *more, fault="batch.synced")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = command(source, out, *more)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    summary = json.loads(done.stderr.splitlines()[-1])
    assert summary["n_records"] == len(lines)
    assert summary["n_resumed"] > 0
    found = by_id(records(out))
    assert {name: record["text"] for name, record in found.items()} == {
        name: record["text"] for name, record in plain.items()
    }


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file. Until it exists, the engines of models beside it do not answer."""
    (tmp_path / "tiny.gguf").write_bytes(tiny_model().read_bytes())
    return tmp_path / "go"


def test_a_killed_worker(nodes: Nodes, tmp_path: Path, gate: Path) -> None:
    """Guards: lines that die with a worker's process; a worker that is not replaced."""
    options = options_of(tmp_path)

    def given(cluster: Cluster, worker: str) -> None:
        if len(cluster.pids) == 1:
            kill(cluster, worker)
        elif len(cluster.pids) == 3:
            gate.touch()

    notes = run_batch(nodes, options, model=gate.with_name("tiny.gguf"), factory=hosted.GATED, given=given)
    assert sum("was lost; others answer the lines that it had" in note for note in notes) == 1
    check(options)


def test_a_node_goes_and_another_comes(nodes: Nodes, tmp_path: Path, gate: Path) -> None:
    """Guards: lines that are lost with a node; a new node that stays idle."""
    options = options_of(tmp_path)
    used: list[str] = []

    def given(cluster: Cluster, worker: str) -> None:
        used.append(cluster._members[worker].node.id)
        if len(used) == 1:
            nodes.remove(used[0])
            nodes.add()
        elif len(set(used)) == 3:
            gate.touch()

    notes = run_batch(nodes, options, model=gate.with_name("tiny.gguf"), factory=hosted.GATED, given=given)
    assert any("was lost; others answer the lines that it had" in note for note in notes)
    check(options)


def test_a_worker_that_hangs(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a batch that never ends because an engine never answers."""
    monkeypatch.setattr(run, "SILENT_SECONDS", 5.0)
    model = tmp_path / "tiny.gguf"
    model.write_bytes(tiny_model().read_bytes())
    options = options_of(tmp_path, 20)
    one = {"n_workers": 1}  # another one would copy the lines

    def given(cluster: Cluster, worker: str) -> None:
        if len(cluster.pids) == 2:
            monkeypatch.setattr(run, "SILENT_SECONDS", 300.0)  # this one does not hang

    notes = run_batch(nodes, options, model=model, factory=hosted.HALTING_ONCE, ray=one, given=given)
    assert sum("is replaced: no progress" in note for note in notes) == 1
    check(options, 20)


def test_a_line_that_crashes_the_engine(nodes: Nodes, tmp_path: Path) -> None:
    """Guards: a worker that is lost with its engine; lines beside the culprit that fail with it."""
    prompts = {str(n): f"p{n} word" for n in range(12)} | {"5": "signal SIGSEGV"}
    options = batch(tmp_path, *({"id": name, "prompt": prompt} for name, prompt in prompts.items()))
    notes = run_batch(nodes, options)
    assert any("its lines are retried one at a time" in note for note in notes)
    found = by_id(records(options.out))
    assert {name: record["text"] for name, record in found.items()} == prompts | {"5": None}
    assert found["5"]["error"]["code"] == "engine_crash_error"


@pytest.fixture
def only_here() -> Iterator[Path]:
    """The path of the model in this process. Others do not have the descriptor in it."""
    folder = os.open(tiny_model().parent, os.O_RDONLY | os.O_DIRECTORY)
    high = fcntl.fcntl(folder, fcntl.F_DUPFD_CLOEXEC, 900)
    yield Path(f"/proc/self/fd/{high}/{tiny_model().name}")
    os.close(folder)
    os.close(high)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_model_that_nodes_do_not_have(nodes: Nodes, tmp_path: Path, only_here: Path, cache: Path) -> None:
    """Guards: an error that names no node; a copy that is not whole; a file copied for each worker."""
    options = options_of(tmp_path, 20)
    with pytest.raises(DsmoeError) as caught:
        run_batch(nodes, options, model=only_here)
    assert "node " in caught.value.what
    assert "the model is missing" in caught.value.what
    assert "--ship-model" in caught.value.remedy
    notes = run_batch(nodes, options, model=only_here, ray={"ship_model": True})
    # The nodes share the cache folder. The one that comes second waits for the copy.
    assert sum("copying tiny.gguf" in note for note in notes) == 1
    assert not any("cannot be used" in note for note in notes)
    check(options, 20)
    (copy,) = cache.rglob("*.gguf")
    assert copy.read_bytes() == tiny_model().read_bytes()
    assert [path.name for path in copy.parent.parent.iterdir()] == [copy.parent.name]


def worker_options(options: BatchOptions, **changes: Any) -> WorkerOptions:
    model = ModelOptions(tiny_model(), n_threads=1)
    values = {"factory": hosted.FAKE, "n_parallel": 2, **changes}
    return WorkerOptions(options, model, file_identity(tiny_model()), Workload(1, 1, 1), **values)


def test_a_cluster_that_others_use(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a wait without an end or a message; a worker that does not start when there is room again."""
    monkeypatch.setattr(ray_cluster, "_START_SECONDS", 0.0)
    notes: list[str] = []
    found: list[Any] = []
    worker = worker_options(options_of(tmp_path, 1))
    stop = threading.Event()
    with closing(
        RayCluster(RayOptions(nodes.address), worker, lambda event: notes.append(str(event)), stop)
    ) as cluster:
        other = cluster._ray.remote(num_cpus=1)(type("Other", (), {}))
        others = [other.remote() for _ in nodes.nodes]
        cluster._ray.get([each.__ray_ready__.remote() for each in others])
        while not any("cannot start yet: one needs 1 CPU" in note for note in notes):
            found += cluster.poll(0.1)
        assert found == []
        for each in others:
            cluster._ray.kill(each)
        while not any(isinstance(event, Joined) for event in found):
            found += cluster.poll(0.1)


def test_a_minute_for_a_new_node(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a batch that fails at once after hours, because some node was refused at its start."""
    worker = worker_options(options_of(tmp_path, 1))
    stop = threading.Event()
    cluster = RayCluster(RayOptions(nodes.address, n_workers=1), worker, lambda event: None, stop)
    with closing(cluster):
        joined = None
        while joined is None:
            joined = next((event for event in cluster.poll(0.1) if isinstance(event, Joined)), None)
        cluster._refused = Refused("another", "another node", FileError("the model is missing"))
        cluster._placement.limits = {node["NodeID"]: 0 for node in cluster._ray.nodes()}
        cluster.discard(joined.worker, for_good=False)
        assert list(cluster.poll(0)) == []
        monkeypatch.setattr(ray_cluster, "_NODE_SECONDS", 0.0)
        cluster._looked = -math.inf
        with pytest.raises(DsmoeError, match="another node: the model is missing"):
            cluster.poll(0)


def test_no_node_has_room(nodes: Nodes, tmp_path: Path) -> None:
    """Guards: a run that waits for ever for GPUs that no node has."""
    with pytest.raises(DsmoeError, match="no node of the cluster has room") as caught:
        run_batch(nodes, options_of(tmp_path, 1), ray={"n_gpus": 8})
    assert len(str(caught.value).splitlines()) == 3


def test_nothing_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: minutes of waiting for a cluster that is not there; a traceback without the extra."""
    options = options_of(tmp_path, 1)
    worker = WorkerOptions(options, ModelOptions(tiny_model()), "", Workload(1, 1, 1))

    def connect(address: str) -> None:
        RayCluster(RayOptions(address), worker, lambda event: None, threading.Event())

    with pytest.raises(DsmoeError, match="the Ray cluster cannot be reached: Connection refused"):
        connect("127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"dsmoe-local\[ray\]"):
        connect("local")


def test_addresses_stay_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: passwords in the URLs of inputs and outputs that are sent to all nodes."""
    sent: list[bytes] = []

    def connect(options: RayOptions, worker: WorkerOptions, *_: object) -> None:
        sent.append(pickle.dumps(worker))
        raise DsmoeError("this is far enough")

    monkeypatch.setattr(ray_cluster, "RayCluster", connect)
    source, out = write_lines(tmp_path / "password.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    words = [str(source), "-o", str(out), "-m", str(tiny_model()), "-t", "1", "--ray", "local"]
    assert CliRunner().invoke(load_command("batch"), words).exit_code == 1
    assert len(sent) == 1
    assert b"password" not in sent[0]


_CONNECT_LOCALLY = """
import os, subprocess, sys, threading
from dsmoe_local.batch.cluster.ray_connection import LOCAL, connect, import_ray

ray, closed = import_ray(LOCAL), threading.Event()
connect(ray, LOCAL, threading.Event(), closed)
ask = "import sys; from ray._raylet import GcsClient as C; C(sys.argv[1]).get_all_node_info(timeout=60)"
command = [sys.executable, "-c", ask, ray.get_runtime_context().gcs_address]
for environment in ({}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    print("used" if not done.returncode else "refused" if "token" in done.stderr else done.stderr)
ray.shutdown()
closed.set()
"""


def test_a_local_cluster_needs_the_token(tmp_path: Path) -> None:
    """Guards: a cluster that everybody in the network can use, and a token that every user can read."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "disabled",
    }
    done = subprocess.run(
        [sys.executable, "-c", _CONNECT_LOCALLY], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["used", "refused", "refused"], done.stdout + done.stderr
    assert not (tmp_path / ".ray" / "auth_token").exists()
