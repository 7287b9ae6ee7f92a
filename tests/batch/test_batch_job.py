"""Batches: records in both forms, on disk before the next; kills, interruptions and full disks lose none."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.models import tiny_model

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, InterruptedRunError, LockedError, NoSpaceError, UsageError
from dsmoe_local.batch.job import BatchOptions, BatchSummary, run_batch
from dsmoe_local.batch.records import BatchDefaults
from dsmoe_local.engine.fake import FakeEngine
from dsmoe_local.engine.types import SamplingParameters


def batch(folder: Path, *lines: dict[str, Any] | str, **options: Any) -> BatchOptions:
    source = folder / "in.jsonl"
    source.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return BatchOptions(source, folder / "out.jsonl", BatchDefaults(SamplingParameters()), **options)


def records(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    assert content.endswith(b"\n") or not content
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def test_openai_records(tmp_path: Path) -> None:
    """Guards: a form that OpenAI's readers do not take; it stays."""
    options = batch(
        tmp_path,
        {"id": "t", "prompt": "é🚀"},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
        "broken",
    )
    engine = FakeEngine(replies=[" é🚀"])
    summary = run_batch(engine, options)
    text, chat, failed = records(options.out)
    assert (summary.n_records, summary.n_failed) == (3, 1)
    assert set(text) == set(chat) == set(failed) == {"id", "custom_id", "response", "error"}
    body = text["response"]["body"]
    assert (text["custom_id"], text["error"], text["response"]["status_code"]) == ("t", None, 200)
    assert (body["object"], body["model"]) == ("text_completion", "fake")
    assert body["choices"] == [{"index": 0, "text": " é🚀", "logprobs": None, "finish_reason": "stop"}]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == 6 + 7
    body = chat["response"]["body"]
    assert body["object"] == "chat.completion"
    # The fourth byte is only a part of the emoji.
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "é",
        "refusal": None,
    }
    assert body["choices"][0]["finish_reason"] == "length"
    assert (failed["response"], failed["custom_id"], failed["error"]["line"]) == (None, "line-3", 3)
    assert failed["error"]["code"] == "invalid_request"
    assert len({record["id"] for record in (text, chat, failed)}) == 3


def test_simple_records(tmp_path: Path) -> None:
    """Guards: the simple form changing; it stays."""
    options = batch(tmp_path, {"prompt": "a"}, {"id": "b"}, form="simple")
    run_batch(FakeEngine(), options)
    assert records(options.out) == [
        {
            "id": "line-1",
            "text": "a",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            "error": None,
        },
        {
            "id": "b",
            "text": None,
            "finish_reason": None,
            "usage": None,
            "error": {
                "code": "invalid_request",
                "message": "line 2: a line takes either prompt or messages",
                "line": 2,
            },
        },
    ]


def test_engine_errors_become_records(tmp_path: Path) -> None:
    """Guards: one prompt over the context ending the run."""
    options = batch(tmp_path, {"prompt": "x" * 99}, {"prompt": "y"}, form="simple")
    summary = run_batch(FakeEngine(n_context=50), options)
    first, second = records(options.out)
    assert first["error"]["code"] == "prompt_error"
    assert second["text"] == "y"
    assert summary.n_failed == 1


def test_each_record_is_synced_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: records that are only in the page cache when the power goes."""
    options = batch(tmp_path, *({"prompt": letter} for letter in "abc"))
    order: list[str] = []
    real = durable.sync

    def sync(descriptor: int) -> None:
        real(descriptor)
        order.append("sync")

    monkeypatch.setattr(durable, "sync", sync)
    run_batch(FakeEngine(gate=lambda index: order.append("token")), options)
    assert order == ["token", "sync"] * 3


def test_output_is_never_overwritten_by_accident(tmp_path: Path) -> None:
    """Guards: results lost by running the command again, or through a link to the input."""
    options = batch(tmp_path, {"prompt": "a"})
    options.out.write_text("precious\n")
    with pytest.raises(FileError, match="exists"):
        run_batch(FakeEngine(), options)
    for make in (Path.hardlink_to, Path.symlink_to):
        options.out.unlink()
        make(options.out, options.source)
        with pytest.raises(UsageError, match="same file"):
            run_batch(FakeEngine(), BatchOptions(options.source, options.out, options.defaults, force=True))
    options.out.unlink()
    options.out.write_text("old\n")
    run_batch(FakeEngine(), BatchOptions(options.source, options.out, options.defaults, force=True))
    assert len(records(options.out)) == 1
    with pytest.raises(FileError, match="folder"):
        run_batch(FakeEngine(), BatchOptions(options.source, tmp_path / "no" / "out", options.defaults))


def test_input_that_can_be_read_only_once_is_refused(tmp_path: Path) -> None:
    """Guards: a pipe that the check empties, so that no record is written and the run succeeds."""
    options = batch(tmp_path)
    options.source.unlink()
    os.mkfifo(options.source)
    with pytest.raises(FileError, match="regular file"):
        run_batch(FakeEngine(), options)
    assert not options.out.exists()


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    """Guards: records of two runs mixed in one file."""
    options = batch(tmp_path, {"prompt": "a"})
    with durable.locked(options.out), pytest.raises(LockedError, match="another run"):
        run_batch(FakeEngine(), options)


def test_full_disk_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: half a record at the end of the file."""
    options = batch(tmp_path, {"prompt": "a"}, {"prompt": "b"})
    real, writes = os.write, iter([None, 10])

    def write(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[: next(writes)])

    monkeypatch.setattr("dsmoe_local.batch.job.os.write", write)
    with pytest.raises(NoSpaceError):
        run_batch(FakeEngine(), options)
    assert len(records(options.out)) == 1

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.undo()
    monkeypatch.setattr(durable, "sync", failing)
    with pytest.raises(FileError, match="bad disk"):
        run_batch(FakeEngine(), BatchOptions(options.source, options.out, options.defaults, force=True))


def test_interruption_ends_the_running_reply(tmp_path: Path) -> None:
    """Guards: Ctrl-C waiting for a long reply; a cut reply written as a record."""
    options = batch(tmp_path, {"prompt": "a"}, {"prompt": "bbb"}, {"prompt": "c"})
    stop = threading.Event()
    engine = FakeEngine()
    engine._gate = lambda index: _stop_in(engine, stop) if len(engine.requests) == 2 else None
    with pytest.raises(InterruptedRunError, match="1 of 3"):
        run_batch(engine, options, stop=stop)
    assert [record["custom_id"] for record in records(options.out)] == ["line-1"]


def _stop_in(engine: FakeEngine, stop: threading.Event) -> None:
    stop.set()
    while not all(engine._cancelled.values()):
        time.sleep(0.01)


COMMAND = "from dsmoe_local.cli.main import batch; batch()"


def command(options: BatchOptions, *more: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        COMMAND,
        str(options.source),
        "-o",
        str(options.out),
        "-m",
        str(tiny_model()),
        *more,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_command(tmp_path: Path) -> None:
    """Guards: an exit status that hides failed lines; anything on stdout."""
    lines: list[dict[str, Any]] = [
        {"prompt": "The quick", "max_tokens": 4, "temperature": 0},
        {"prompt": "fox " * 300},
    ]
    options = batch(tmp_path, *lines)
    done = subprocess.run(command(options), capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "2 records (1 failed)" in done.stderr
    good, bad = records(options.out)
    assert good["response"]["body"]["usage"]["completion_tokens"] in range(5)
    assert "context" in bad["error"]["message"]
    done = subprocess.run(command(options), capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1
    assert "--force" in done.stderr
    options = batch(tmp_path, lines[0])
    more = ("--force", "--format", "simple")
    done = subprocess.run(
        command(options, *more), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0
    assert set(records(options.out)[0]) == {"id", "text", "finish_reason", "usage", "error"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_command_keeps_its_records(tmp_path: Path, number: signal.Signals) -> None:
    """Guards: acknowledged records lost by a kill; a torn line that passes for a record."""
    options = batch(tmp_path, *({"prompt": f"The quick {i}", "max_tokens": 20} for i in range(2000)))
    child = subprocess.Popen(command(options), stderr=subprocess.PIPE, env=environment())
    deadline = time.monotonic() + 60
    while (
        not options.out.exists() or options.out.read_bytes().count(b"\n") < 3
    ) and time.monotonic() < deadline:
        time.sleep(0.02)
    acknowledged = options.out.read_bytes()
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert b"Traceback" not in errors
    content = options.out.read_bytes()
    assert content.startswith(acknowledged[: acknowledged.rfind(b"\n") + 1])
    *whole, tail = content.split(b"\n")
    assert [json.loads(line)["custom_id"] for line in whole] == [f"line-{i + 1}" for i in range(len(whole))]
    assert tail == b"" or number == signal.SIGKILL


def test_summary_starts_empty() -> None:
    """Guards: counts that begin elsewhere."""
    assert BatchSummary() == BatchSummary(0, 0, 0, 0, 0.0)
