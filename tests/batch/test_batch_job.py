"""Batches on a fake engine: one record per line, errors, crashes, resuming, order."""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.batches import GREEDY, answer, batch, by_id, records, run_batch, write_lines
from support.crashing import CrashingEngine
from support.fake_engine import FakeEngine

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, InterruptedRunError, LockedError, UsageError
from dsmoe_local.base.progress import Event, Note
from dsmoe_local.batch.job import BatchOptions, prepared
from dsmoe_local.batch.journal import journal_path
from dsmoe_local.batch.writer import ErrorLimitError
from dsmoe_local.engine.errors import EngineCrashError, EngineError, ModelLoadError, NativeError
from dsmoe_local.engine.types import Request, SamplingParameters
from dsmoe_local.model.identity import file_identity
from dsmoe_local.protocol.requests import RequestDefaults


def test_simple_records(tmp_path: Path) -> None:
    """Guards: a change of the simple format."""
    options = batch(tmp_path, {"prompt": "a"}, {"id": "b"}, {"id": "two", "prompt": "a", "n": 2})
    found = by_id(answer(FakeEngine(), options))
    timing = found["line-1"].pop("timing")
    assert set(timing) == {"seconds", "prompt_seconds", "completion_seconds", "tokens_per_second"}
    assert found["line-1"] == {
        "id": "line-1",
        "text": "a",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        "error": None,
    }
    assert found["b"] == {
        "id": "b",
        "text": None,
        "finish_reason": None,
        "usage": None,
        "timing": None,
        "error": {
            "code": "invalid_request",
            "message": "line 2: the line has no prompt and no messages",
            "line": 2,
        },
    }
    assert (found["two"]["text"], found["two"]["finish_reason"]) == (["a", "a"], ["stop", "stop"])
    assert found["two"]["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def test_errors_become_records(tmp_path: Path) -> None:
    """Guards: one bad line ending the run; an error that is not counted, or names the wrong line."""
    options = batch(
        tmp_path, {"prompt": "x" * 99}, "broken", {"prompt": "y"}, b'{"prompt": "\xff"}', {"prompt": "boom"}
    )

    def reply(text: str) -> str:
        if text == "boom":
            raise NativeError("llama_decode failed")
        return text

    engine = FakeEngine(reply, n_context=50)
    summary = run_batch(engine, options)
    found = by_id(records(options.out))
    assert found["line-3"]["text"] == "y"
    errors = {name: record["error"] for name, record in found.items() if record["error"]}
    assert {name: (error["code"], error["line"]) for name, error in errors.items()} == {
        "line-1": ("context_length_error", 1),
        "line-2": ("invalid_request", 2),
        "line-4": ("invalid_request", 4),
        "line-5": ("native_error", 5),
    }
    assert (summary.n_requests, summary.n_records, summary.n_failed) == (5, 5, 4)


def test_many_requests_are_in_flight(tmp_path: Path) -> None:
    """Guards: requests that run one after the other although the engine could decode eight at once."""
    everybody = threading.Barrier(8, timeout=60)
    options = batch(tmp_path, *({"prompt": str(number % 10)} for number in range(16)))

    def gate(index: int) -> None:
        everybody.wait()

    engine = FakeEngine(n_parallel=8, gate=gate)
    assert len(answer(engine, options)) == 16


def test_a_window_of_requests(tmp_path: Path) -> None:
    """Guards: a million requests given to the engine at once."""
    options = batch(tmp_path, *({"prompt": "a"} for _ in range(200)))
    running, most = Counter[str](), 0
    lock = threading.Lock()

    class Watched(FakeEngine):
        def start(self, request: Request, deliver: Any) -> Any:
            nonlocal most
            with lock:
                running[request.id] += 1
                most = max(most, running.total())

            def watch(event: Any) -> None:
                if event is None:
                    with lock:
                        running[request.id] -= 1
                deliver(event)

            return super().start(request, watch)

    assert len(answer(Watched(n_parallel=4), options)) == 200
    assert most <= 8


def test_work_goes_on_where_it_ended(tmp_path: Path) -> None:
    """Guards: lines answered twice, or left out, by the second run; new lines that are ignored."""
    lines = [{"id": str(number), "prompt": f"p{number}"} for number in range(20)]
    answer(FakeEngine(), batch(tmp_path, *lines[:12], "bad"))
    engine = FakeEngine()
    options = batch(tmp_path, *lines[:12], "bad", *lines[12:])
    notes: list[Event] = []
    assert len(answer(engine, options, notes.append)) == 21
    assert sorted(int(request.id) for request in engine.requests) == list(range(12, 20))
    assert Note("13 records from earlier runs") in notes
    summary = run_batch(FakeEngine(), options)
    assert (summary.n_records, summary.n_failed, summary.n_resumed) == (21, 1, 21)
    by_id(records(options.out))


def test_a_changed_line_is_refused(tmp_path: Path) -> None:
    """Guards: an old answer to a new question; two records with one id."""
    answer(FakeEngine(), batch(tmp_path, {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}))
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(FileError, match="changed") as refusal:
        run_batch(FakeEngine(), batch(tmp_path, {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "z"}))
    assert "line 2" in str(refusal.value)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    notes: list[Event] = []
    answer(FakeEngine(), batch(tmp_path, {"id": "a", "prompt": "x"}), notes.append)
    assert Note("1 record for lines that are no longer in the input") in notes


@pytest.mark.parametrize(
    "change",
    [
        {"form": "openai"},
        {"settings": {"model": "other"}},
        {"deterministic": True},
        {"defaults": RequestDefaults(SamplingParameters(temperature=1))},
        {"defaults": RequestDefaults(GREEDY.sampling, max_tokens=3)},
        {"defaults": RequestDefaults(GREEDY.sampling, stop=("x",))},
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Guards: a setting that shapes replies and is not compared."""
    options = batch(tmp_path, {"prompt": "a"})
    answer(FakeEngine(), options)
    with pytest.raises(FileError, match="started with another"):
        run_batch(FakeEngine(), replace(options, **change))
    assert len(answer(FakeEngine(), replace(options, **change, restart=True))) == 1


def test_settings_that_may_change(tmp_path: Path) -> None:
    """Guards: a run that cannot be continued, or starts over, because of how many were parallel or
    ordered.
    """
    options = batch(tmp_path, {"prompt": "a"})
    answer(FakeEngine(), options)
    engine = FakeEngine(n_parallel=4)
    assert len(answer(engine, replace(options, ordered=True, max_errors=3))) == 1
    assert engine.requests == []


@pytest.mark.parametrize(
    ("content", "restart", "told"),
    [
        (b"precious\n", False, "name another$"),
        (b'{"precious": 1}\n', False, "--restart"),
        (b"GGUF precious", True, "not the output of a batch"),
    ],
)
def test_output_is_never_overwritten_by_accident(
    tmp_path: Path, content: bytes, restart: bool, told: str
) -> None:
    """Guards: results, or a model, lost by a mistyped name."""
    options = batch(tmp_path, {"prompt": "a"}, restart=restart)
    options.out.write_bytes(content)
    with pytest.raises(FileError, match=told):
        run_batch(FakeEngine(), options)
    assert options.out.read_bytes() == content


def test_input_and_output_are_different_files(tmp_path: Path) -> None:
    """Guards: an input lost, through a link or because it is called like a journal."""
    options = batch(tmp_path, {"prompt": "a"}, restart=True)
    for make in (Path.hardlink_to, Path.symlink_to):
        make(options.out, tmp_path / "in.jsonl")
        with pytest.raises(UsageError, match="same file"):
            run_batch(FakeEngine(), options)
        options.out.unlink()
    with pytest.raises(UsageError, match="same file"):
        run_batch(FakeEngine(), replace(options, sources=[write_lines(journal_path(options.out), ["{}"])]))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("-", "not a regular file"),
        ("/dev/null", "not a regular file"),
        (".", "is a folder"),
        ("no/out", "folder does not exist"),
    ],
)
def test_outputs_that_are_not_files(tmp_path: Path, name: str, told: str) -> None:
    """Guards: records written where no run can find them again."""
    with pytest.raises(FileError, match=told):
        run_batch(FakeEngine(), batch(tmp_path, {"prompt": "a"}, out=Path(name)))


def test_an_output_behind_a_link(tmp_path: Path) -> None:
    """Guards: a link replaced by a file; two runs on one file by two names."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "disk" / "out.jsonl")
    options = batch(tmp_path, {"prompt": "a"}, out=link)
    for restart in (False, False, True):
        assert len(answer(FakeEngine(), replace(options, restart=restart))) == 1
    assert link.is_symlink()
    assert journal_path(link.resolve()).exists()
    with durable.locked(link.resolve()), pytest.raises(LockedError):
        run_batch(FakeEngine(), options)


def test_input_that_can_be_read_only_once_is_refused(tmp_path: Path) -> None:
    """Guards: a pipe that the index empties, so that no record is written and the run succeeds."""
    options = batch(tmp_path)
    (tmp_path / "in.jsonl").unlink()
    os.mkfifo(tmp_path / "in.jsonl")
    with pytest.raises(FileError, match="regular file"):
        run_batch(FakeEngine(), options)
    assert not options.out.exists()


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    """Guards: records of two runs mixed in one file; a model loaded for nothing."""
    options = batch(tmp_path, {"prompt": "a"})
    with prepared(options), pytest.raises(LockedError, match="another run"):
        run_batch(FakeEngine(), options)


def test_records_count_when_they_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: records that are only in the page cache at a power failure."""
    options = batch(tmp_path, *({"prompt": letter} for letter in "abcdef"))
    synced: list[int] = []
    real = durable.sync

    def sync(descriptor: int) -> None:
        real(descriptor)
        if os.path.samestat(os.fstat(descriptor), options.out.stat()):
            synced.append(options.out.read_bytes().count(b"\n"))

    monkeypatch.setattr(durable, "sync", sync)
    counted = 0

    def listen(event: Event) -> None:
        nonlocal counted
        counted += getattr(event, "amount", 0)
        assert counted <= (synced[-1] if synced else 0)

    assert len(answer(FakeEngine(), options, listen)) == 6
    assert counted == synced[-1] == 6


def test_ordered(tmp_path: Path) -> None:
    """Guards: records in the order of completion with --ordered."""
    second_is_done = threading.Event()

    class Uneven(FakeEngine):
        def start(self, request: Request, deliver: Any) -> Any:
            def late(event: Any) -> None:
                if request.id == "line-1":
                    assert second_is_done.wait(60)
                deliver(event)
                if request.id == "line-2" and event is None:
                    second_is_done.set()

            return super().start(request, late)

    options = batch(tmp_path, {"prompt": "a"}, {"prompt": "b"}, "bad", {"prompt": "c", "max_tokens": 900})
    found = answer(Uneven(n_parallel=4), replace(options, ordered=True))
    assert [record["id"] for record in found] == ["line-1", "line-2", "line-3", "line-4"]


@pytest.mark.parametrize(
    ("there", "told"), [("", False), ("ab", False), ("c", True), ("ba", True), ("abcde", False)]
)
def test_an_order_that_cannot_be_had(tmp_path: Path, there: str, told: bool) -> None:
    """Guards: --ordered on the output of an unordered run, which stays out of order without a note."""
    answer(FakeEngine(), batch(tmp_path, *({"id": name, "prompt": name} for name in there), ordered=True))
    notes: list[Event] = []
    options = batch(tmp_path, *({"id": name, "prompt": name} for name in "abcde"), ordered=True)
    found = answer(FakeEngine(), options, notes.append)
    assert any(isinstance(note, Note) and "--ordered" in note.text for note in notes) == told
    assert told or [record["id"] for record in found] == list("abcde")
    notes.clear()
    answer(FakeEngine(), replace(options, ordered=False), notes.append)
    assert not any(isinstance(note, Note) and "--ordered" in note.text for note in notes)


def test_deterministic_requests_have_seeds(tmp_path: Path) -> None:
    """Guards: sampling that differs after a resume; the same seed for all lines; a given seed replaced."""
    lines: list[dict[str, Any]] = [{"id": name, "prompt": "p", "temperature": 1} for name in "abc"]
    lines += [{"id": "own", "prompt": "p", "temperature": 1, "seed": 7}, {"id": "greedy", "prompt": "p"}]
    seeds = []
    for run in range(2):
        folder = tmp_path / str(run)
        folder.mkdir()
        engine = FakeEngine(n_parallel=2)
        answer(engine, replace(batch(folder, *lines), deterministic=True))
        seeds.append({request.id: request.sampling.seed for request in engine.requests})
    assert seeds[0] == seeds[1]
    assert seeds[0]["own"] == 7
    assert seeds[0]["greedy"] is None
    assert len({seeds[0][name] for name in "abc"} - {None}) == 3


@pytest.mark.parametrize("change", [{"n_threads": 2}, {"kernels": "repacked"}, {"n_context": 8}])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_model_loaded_otherwise(tmp_path: Path, change: dict[str, Any], deterministic: bool) -> None:
    """Guards: --deterministic texts that depend on free memory; a resume refused for no reason."""
    lines = [{"prompt": "abc", "max_tokens": 9}, {"prompt": "d", "max_tokens": 2}]
    options = batch(tmp_path, lines[0], deterministic=deterministic)
    answer(FakeEngine(), options)
    options = batch(tmp_path, *lines, deterministic=deterministic)
    engine = FakeEngine()
    engine.info = replace(engine.info, **change)
    if not deterministic:
        assert len(answer(engine, options)) == 2
        return
    with pytest.raises(FileError, match="started with another setting"):
        answer(engine, options)
    engine.info = replace(FakeEngine().info, n_context=12)
    assert len(answer(engine, options)) == 2


def test_interruption_ends_the_running_replies(tmp_path: Path) -> None:
    """Guards: Ctrl-C waiting for a long reply; a cancelled reply written as a record; a finished one lost."""
    options = batch(tmp_path, {"prompt": "a"}, {"prompt": "bbb"}, {"prompt": "ccc"})
    stop = threading.Event()

    def gate(index: int) -> None:
        if index == 1:
            assert stop.wait(60)
            while not all(engine._cancelled.values()):
                pass

    engine = FakeEngine(gate=gate)

    def listen(event: Event) -> None:
        if getattr(event, "amount", 0):
            stop.set()

    with pytest.raises(InterruptedRunError, match="1 of 3"):
        run_batch(engine, options, listen, stop)
    assert [record["id"] for record in records(options.out)] == ["line-1"]
    assert len(answer(FakeEngine(), options)) == 3


def test_too_many_errors_in_order_get_somewhere(tmp_path: Path) -> None:
    """Guards: failed lines that wait for earlier ones, are dropped, and fail again in every run."""
    lines = [{"prompt": "a"}] * 3 + ["bad"] * 3 + [{"prompt": "b"}] * 3
    options = batch(tmp_path, *lines, ordered=True, max_errors=1)
    with pytest.raises(ErrorLimitError, match="more than --max-errors 1"):
        run_batch(FakeEngine(), options)
    assert [record["error"] is not None for record in records(options.out)] == [False] * 3 + [True] * 2
    found = answer(FakeEngine(), options)
    assert [record["id"] for record in found] == [f"line-{number}" for number in range(1, 10)]


def test_too_many_errors(tmp_path: Path) -> None:
    """Guards: a thousand error records for a wrong file; good lines lost."""
    options = batch(tmp_path, *["bad"] * 300, {"id": "good", "prompt": "x"})
    options = replace(options, max_errors=4, ordered=True)
    with pytest.raises(ErrorLimitError, match="max-errors 4"):
        run_batch(FakeEngine(), options)
    n_before = len(records(options.out))
    assert 5 <= n_before < 300
    found = answer(FakeEngine(), replace(options, max_errors=None))
    assert len(by_id(found)) == 301
    with pytest.raises(ErrorLimitError):
        run_batch(FakeEngine(), replace(options, max_errors=0, restart=True))


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (EngineCrashError("the engine was killed by SIGSEGV"), "engine_crash_error"),
        (NativeError("llama.cpp cannot decode (status -3)"), "native_error"),
    ],
)
def test_a_crash_costs_only_its_culprit(tmp_path: Path, failure: EngineError, code: str) -> None:
    """Guards: records lost in a crash or a failed step; other lines blamed; a culprit retried forever."""
    culprits = {"line-2", "line-9"}
    lines = [{"prompt": "kill" if f"line-{n + 1}" in culprits else "live"} for n in range(20)]
    engine = CrashingEngine(lambda prompt: prompt == "kill", patience=3, error=failure)
    notes: list[Event] = []
    found = by_id(answer(engine, replace(batch(tmp_path, *lines), ordered=True), notes.append))
    assert len(found) == 20
    assert {name for name, record in found.items() if record["error"]} == culprits
    error = found["line-2"]["error"]
    assert error["code"] == code
    assert failure.what in error["message"]
    assert engine.in_flight_at_crashes[0] > 1
    # Each culprit crashes with others, then alone.
    assert engine.in_flight_at_crashes[1] == 1
    assert len(engine.in_flight_at_crashes) == 4
    assert any(isinstance(note, Note) and "one at a time" in note.text for note in notes)


@pytest.mark.parametrize("kind", [ModelLoadError, EngineCrashError])
def test_a_model_that_cannot_be_loaded_again(tmp_path: Path, kind: type[EngineError]) -> None:
    """Guards: every line blamed for a model that is gone, or whose loading kills the process."""

    def reload() -> None:
        raise kind("the model is gone")

    options = batch(tmp_path, *({"prompt": text} for text in ("live", "kill", "live", "live")))
    engine = CrashingEngine(lambda prompt: prompt == "kill", patience=3, reload=reload)
    with pytest.raises(kind):
        run_batch(engine, replace(options, ordered=True))
    assert [record["id"] for record in records(options.out)] == ["line-1"]
    assert len(answer(FakeEngine(), options)) == 4


def test_a_model_that_is_replaced(tmp_path: Path) -> None:
    """Guards: records of two models in one output after a crash of the engine."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"the model")

    def kills(prompt: str) -> bool:
        if prompt == "kill":
            model.write_bytes(b"another")
        return prompt == "kill"

    options = batch(
        tmp_path,
        *({"prompt": text} for text in ("live", "kill", "live", "live")),
        model=model,
        settings={"model": file_identity(model)},
        ordered=True,
    )
    with pytest.raises(FileError, match="the model was replaced"):
        run_batch(CrashingEngine(kills, patience=3), options)
    assert [record["id"] for record in records(options.out)] == ["line-1"]
    with pytest.raises(FileError, match="the model was replaced"):
        run_batch(FakeEngine(), options)
    model.write_bytes(b"the model")
    assert len(answer(FakeEngine(), options)) == 4


def test_an_input_that_changes_meanwhile(tmp_path: Path) -> None:
    """Guards: answers to a line that was not indexed."""
    options: BatchOptions = batch(tmp_path, {"prompt": "a"})
    with prepared(options) as job:
        write_lines(tmp_path / "in.jsonl", [{"prompt": "b"}])
        with pytest.raises(Exception, match="changed since"):
            job.line(0)


def test_models_that_lines_name(tmp_path: Path) -> None:
    """Guards: a note for each line; a record that names another model."""
    notes: list[Event] = []
    options = batch(tmp_path, *({"prompt": "a", "model": "gpt-4o"} for _ in range(3)), form="openai")
    found = answer(FakeEngine(), options, notes.append)
    assert {record["response"]["body"]["model"] for record in found} == {"fake"}
    assert [event for event in notes if isinstance(event, Note)] == [
        Note("fake answers all lines, including those that name another model")
    ]
