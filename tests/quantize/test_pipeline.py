"""Threads of the encoder that fail beside their slabs: told, and never taken for the end of the work."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.tiny_gguf import MOE, write_tiny

from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file
from dsmoe_quantize.write import output, pipeline
from dsmoe_quantize.write.encoder import Slab, TensorJob, slabs
from dsmoe_quantize.write.output import Summary

OUT = "out.gguf"


def quantize(folder: Path) -> Summary:
    plan = plan_quantization(write_tiny(folder / "source.gguf", MOE), resolve("q8_0"))
    return quantize_file(plan, folder / OUT, threads=2)


def check_nothing_is_left(folder: Path) -> None:
    """No output, and no thread that goes on."""
    assert not (folder / OUT).exists()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("encoder", "syncer"))]


@pytest.mark.parametrize("ordinal", [1, 9])
def test_tasks_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ordinal: int) -> None:
    """Guards: a generator that failed, and so has nothing more to give, taken for one that gave all."""
    calls = itertools.count(1)

    def failing(job: TensorJob) -> Iterator[Slab]:
        if next(calls) == ordinal:
            raise ZeroDivisionError
        return slabs(job)

    monkeypatch.setattr(pipeline, "slabs", failing)
    with pytest.raises(ZeroDivisionError):
        quantize(tmp_path)
    check_nothing_is_left(tmp_path)


def test_encoders_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: threads that all end before they begin, and a run that succeeds."""

    def failing() -> object:
        raise MemoryError

    monkeypatch.setattr(pipeline, "SlabEncoder", failing)
    with pytest.raises(MemoryError):
        quantize(tmp_path)
    check_nothing_is_left(tmp_path)


def test_threads_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: those that could be, which then go on writing into a file that is closed."""
    start = threading.Thread.start

    def failing(thread: threading.Thread) -> None:
        if thread.name == "encoder-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="can't start"):
        quantize(tmp_path)
    check_nothing_is_left(tmp_path)


def test_an_encoder_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a file with holes, whose header is right, that gets its final name."""

    def lazy(jobs: Sequence[TensorJob], *others: object) -> None:
        pipeline.encode_all(jobs[:-1], *others)  # type: ignore[arg-type]

    monkeypatch.setattr(output, "encode_all", lazy)
    with pytest.raises(RuntimeError, match="ended early"):
        quantize(tmp_path)
    check_nothing_is_left(tmp_path)
    monkeypatch.undo()
    assert quantize(tmp_path).path.exists()
