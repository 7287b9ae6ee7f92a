"""A worker of a cluster, without the cluster: lines, crashes, and how it finds or gets its model."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from support import hosted
from support.batches import GREEDY
from support.models import tiny_model

from dsmoe_local.base.durable import locked
from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.batch.cluster.interface import Item
from dsmoe_local.batch.cluster.ray_cluster import _reason
from dsmoe_local.batch.cluster.worker import Loaded, LoadLater, NoModelError, Worker, WorkerOptions
from dsmoe_local.batch.job import BatchOptions
from dsmoe_local.batch.lines import Key, Line
from dsmoe_local.engine.errors import EngineCrashError
from dsmoe_local.engine.load.parallel import Workload
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.identity import file_identity

BATCH = BatchOptions((Path("in.jsonl"),), Path("out.jsonl"), GREEDY, "simple")


def options(**changes: Any) -> WorkerOptions:
    path = tiny_model()
    made = WorkerOptions(
        BATCH, ModelOptions(path), file_identity(path), Workload(8, 64, 512), 2, factory=hosted.FAKE
    )
    return replace(made, **changes)


def item(task: int, **values: Any) -> Item:
    return Item(task, Line(task, f"line {task}", f"id-{task}", Key(task, 0), values))


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker that has loaded a fake engine."""
    made = Worker(options(), n_cpus=1)
    assert isinstance(made.load(), Loaded)
    yield made
    made.close()


def answers(worker: Worker, *items: Item) -> dict[int, dict[str, Any]]:
    """Return the records of lines."""
    found: dict[int, dict[str, Any]] = {}
    given = list(items)
    while len(found) < len(items):
        report = worker.work(given, 10.0, 0.0)
        assert report.crash is None
        found |= {answer.task: json.loads(answer.content) for answer in report.answers}
        given = []
    return found


def test_lines_and_faulty_lines(worker: Worker) -> None:
    """Guards: a line with an error that ends the worker; tokens that are not counted."""
    found = answers(worker, item(0, prompt="abc"), item(1, prompt="abc", top_k="x"), item(2, nothing=1))
    assert found[0]["text"] == "abc"
    assert "top_k" in found[1]["error"]["message"]
    assert found[2]["error"]["message"].startswith("line 2: ")
    report = worker.work([], 0.0, 0.0)
    assert (report.answers, report.n_tokens) == ([], 3)
    before = report.progress
    answers(worker, item(3, prompt="abcd"))
    report = worker.work([], 0.0, 0.0)
    assert report.n_tokens == 7
    assert report.progress > before


def test_a_crash_and_the_next_load(worker: Worker) -> None:
    """Guards: a worker that is lost with its engine; an event of the old engine in the new one."""
    report = worker.work([item(0, prompt="signal SIGSEGV"), item(1, prompt="signal SIGSEGV")], 60.0, 0.0)
    assert report.crash is not None
    assert isinstance(report.crash, EngineCrashError)
    assert "SIGSEGV" in report.crash.what
    assert isinstance(worker.load(), Loaded)
    assert answers(worker, item(1, prompt="abc"))[1]["text"] == "abc"


def test_a_model_that_is_replaced_before_the_next_load(tmp_path: Path) -> None:
    """Guards: after a crash, replies of another model with the fingerprint of the first; a copy of the right
    model that is not used then.
    """
    path = tmp_path / tiny_model().name
    content = tiny_model().read_bytes()
    path.write_bytes(content)
    worker = Worker(options(model=ModelOptions(path)), n_cpus=1)
    assert isinstance(worker.load(), Loaded)
    assert worker.work([item(0, prompt="signal SIGSEGV")], 60.0, 0.0).crash is not None
    path.write_bytes(content[:-1] + b"?")
    missing = worker.load()
    assert isinstance(missing, NoModelError)
    assert missing.what == "another file has the name of the model"
    assert copied(worker, content) is None
    assert isinstance(worker.load(), Loaded)
    assert answers(worker, item(1, prompt="abc"))[1]["text"] == "abc"
    worker.close()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"factory": hosted.NOT_LOADED}, "no room"),
        ({"factory": hosted.DYING_AT_LOAD}, "SIGABRT"),
        ({"version": "0.0.1"}, "the batch is run by 0.0.1"),
    ],
)
def test_a_worker_that_cannot_load(changes: dict[str, Any], what: str) -> None:
    """Guards: an exception of our own classes that another process cannot read."""
    error = pickle.loads(pickle.dumps(Worker(options(**changes), n_cpus=1).load()))
    assert isinstance(error, DsmoeError)
    assert what in error.what


def copied(worker: Worker, content: bytes, digest: str = "") -> DsmoeError | LoadLater | None:
    """Send a worker a copy in two parts."""
    name = tiny_model().name
    half = len(content) // 2
    steps = [
        worker.begin_copy(len(content)),
        worker.write_copy(name, content[:half]),
        worker.write_copy(name, content[half:]),
        worker.finish_copy(digest or blake2b(content).hexdigest()),
    ]
    return next((step for step in steps if step is not None), None)


def test_a_model_that_is_copied(tmp_path: Path) -> None:
    """Guards: a copy that is not whole but used; one that a kill cut off, in the way of the next."""
    away = replace(options().model, path=tmp_path / tiny_model().name)
    worker = Worker(options(model=away), n_cpus=1)
    missing = worker.load()
    assert isinstance(missing, NoModelError)
    assert missing.what == "the model is missing"
    away.path.write_bytes(b"another")
    other = worker.load()
    assert isinstance(other, NoModelError)
    assert other.what == "another file has the name of the model"
    content = tiny_model().read_bytes()
    damaged = copied(worker, content[:-1] + b"\0\0")
    assert isinstance(damaged, DsmoeError)
    assert damaged.what == "the copy of the model is not equal to it"
    # The sample of `file_identity` is equal.
    damaged = copied(worker, content, blake2b(content[1:]).hexdigest())
    assert isinstance(damaged, DsmoeError)
    assert damaged.what == "the copy of the model is not equal to it"
    folder = cache_folder() / "batch-models"
    assert list(folder.iterdir()) == []
    assert worker.begin_copy(len(content)) is None  # and killed
    worker._copy._stack.close()  # type: ignore[union-attr]
    assert copied(worker, content) is None
    (copy,) = folder.iterdir()
    assert (copy / tiny_model().name).read_bytes() == content
    assert worker.begin_copy(len(content)) == LoadLater()  # another machine has copied it in between
    assert isinstance(worker.load(), Loaded)
    worker.close()


def test_a_copy_that_cannot_be_made(tmp_path: Path) -> None:
    """Guards: two copies at once in one folder; a full disk that ends the worker."""
    away = replace(options().model, path=tmp_path / "away.gguf")
    worker = Worker(options(model=away), n_cpus=1)
    no_space = worker.begin_copy(1 << 60)
    assert isinstance(no_space, DsmoeError)
    assert "not enough disk space" in no_space.what
    with locked(worker._copy_folder):
        assert worker.begin_copy(1) == LoadLater()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("No module named 'dsmoe_local.batch.cluster'", "another version of dsmoe-local"),
        (
            "cannot import name 'Worker' from 'dsmoe_local.batch.cluster.worker'",
            "another version of dsmoe-local",
        ),
        ("No module named 'dsmoe_local'", "the package dsmoe_local is not installed"),
        ("No module named 'msgspec'", "the package msgspec is not installed"),
    ],
)
def test_why_a_node_cannot_start_workers(text: str, reason: str) -> None:
    """Guards: "not installed" on a node that has dsmoe-local, from before it could use Ray."""
    assert _reason(RuntimeError(f"ModuleNotFoundError: {text}")).startswith(reason)


@pytest.mark.parametrize(("n_workers", "n_threads"), [(1, 8), (2, 4), (16, 1)])
def test_workers_of_one_node_share_it(
    monkeypatch: pytest.MonkeyPatch, n_workers: int, n_threads: int
) -> None:
    """Guards: workers that together have more threads than cores, or KV caches than memory."""
    monkeypatch.setattr("dsmoe_local.batch.cluster.worker.physical_cores", lambda: 8)
    engines: list[int] = []

    def choose(model: ModelOptions, *rest: object, n_engines: int) -> ModelOptions:
        engines.append(n_engines)
        return model

    monkeypatch.setattr("dsmoe_local.batch.cluster.worker.choose_parallel", choose)
    made = Worker(options(), n_cpus=max(1, 16 // n_workers), n_workers=n_workers)
    assert made._model_options(tiny_model()).n_threads == n_threads
    assert engines == [n_workers]


def test_a_template_is_sent(tmp_path: Path) -> None:
    """Guards: --chat-template with a file that only the machine of the command has."""
    model = replace(options().model, chat_template=str(tmp_path / "gone.jinja"))
    worker = Worker(options(model=model, template=b"{{ messages }}"), n_cpus=3)
    made = worker._model_options(tiny_model())
    assert Path(made.chat_template or "").read_bytes() == b"{{ messages }}"
    assert made.n_threads in range(1, 4)
