"""Quantizer runs killed at every named point and at random: the same bytes in the end, no half file."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.kills import Job, check_every_point, check_random_kills
from support.tiny_gguf import MOE, write_tiny

from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file


def quantize(source: str, out: str) -> None:
    """The work of a child."""
    quantize_file(plan_quantization(Path(source), resolve("Q4_0")), Path(out), threads=2)


def quantize_by_force(source: str, out: str) -> None:
    """The same over an existing output."""
    quantize_file(plan_quantization(Path(source), resolve("Q4_0")), Path(out), threads=2, force=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "source.gguf", MOE)


@pytest.fixture
def expected(tmp_path: Path, source: Path) -> bytes:
    out = tmp_path / "expected.gguf"
    quantize_file(plan_quantization(source, resolve("Q4_0")), out)
    return out.read_bytes()


@pytest.fixture
def make_job(tmp_path: Path, source: Path) -> Callable[[], Job]:
    numbers = itertools.count()

    def make() -> Job:
        folder = tmp_path / f"run-{next(numbers)}"
        folder.mkdir()
        return Job(quantize, [str(source)], folder / "out.gguf")

    return make


def test_kill_at_every_point(make_job: Callable[[], Job], expected: bytes) -> None:
    """A step of the write path that is not repeated, or trusted, after a crash."""
    check_every_point(make_job, expected)


def test_kill_at_random(make_job: Callable[[], Job], expected: bytes) -> None:
    """A crash between two named points."""
    check_random_kills(make_job, expected, n_kills=8, seed=1)


@pytest.mark.soak
def test_soak_quantize(make_job: Callable[[], Job], expected: bytes) -> None:
    """As above, a thousand times."""
    check_random_kills(make_job, expected, n_kills=1000, seed=2)


def test_resume_skips_what_is_done(make_job: Callable[[], Job], source: Path) -> None:
    """A resume that encodes everything again, or keeps quiet about going on."""
    job = make_job()
    assert job.run("output.journaled:5")[0] == -signal.SIGKILL
    notes: list[object] = []
    summary = quantize_file(plan_quantization(source, resolve("Q4_0")), job.out, listen=notes.append)
    assert 5 <= summary.n_resumed < summary.n_tensors
    assert any("continuing" in str(note) for note in notes)


def test_changed_type_starts_over(make_job: Callable[[], Job], source: Path, tmp_path: Path) -> None:
    """A resume that mixes tensors of two types, or starts over without saying why."""
    job = make_job()
    assert job.run("output.journaled:5")[0] == -signal.SIGKILL
    notes: list[object] = []
    plan = plan_quantization(source, resolve("Q8_0"))
    summary = quantize_file(plan, job.out, listen=notes.append)
    assert summary.n_resumed == 0
    assert any("starting over" in str(note) and "the type" in str(note) for note in notes)
    fresh = quantize_file(plan, tmp_path / "fresh.gguf")
    assert job.out.read_bytes() == fresh.path.read_bytes()


def test_changed_source_starts_over(make_job: Callable[[], Job], source: Path, tmp_path: Path) -> None:
    """A resume that mixes tensors of two models."""
    job = make_job()
    assert job.run("output.journaled:5")[0] == -signal.SIGKILL
    write_tiny(source, MOE, seed=7)
    notes: list[object] = []
    plan = plan_quantization(source, resolve("Q4_0"))
    assert quantize_file(plan, job.out, listen=notes.append).n_resumed == 0
    assert any("starting over" in str(note) and "the source" in str(note) for note in notes)
    fresh = quantize_file(plan, tmp_path / "fresh.gguf")
    assert job.out.read_bytes() == fresh.path.read_bytes()


def test_lost_part_file_starts_over(make_job: Callable[[], Job], expected: bytes) -> None:
    """A journal that is believed although the file it speaks of is gone."""
    job = make_job()
    assert job.run("output.journaled:5")[0] == -signal.SIGKILL
    job.out.with_name(".out.gguf.part").unlink()
    assert job.run()[0] == 0
    assert job.out.read_bytes() == expected
    assert job.is_clean()


def test_damaged_journal_starts_over(make_job: Callable[[], Job], expected: bytes) -> None:
    """A journal with garbage in the middle, or a torn last line."""
    job = make_job()
    assert job.run("output.journaled:5")[0] == -signal.SIGKILL
    journal = job.journal
    journal.write_bytes(journal.read_bytes()[:-20] + b"\n\xff\xfe{\n[tor")
    assert job.run()[0] == 0
    assert job.out.read_bytes() == expected
    assert job.is_clean()


def test_existing_output_survives_a_kill(make_job: Callable[[], Job], source: Path) -> None:
    """An output that is destroyed by a failed run over it."""
    job = make_job()
    job.out.write_bytes(b"precious")
    assert job.run()[0] != 0
    assert job.out.read_bytes() == b"precious"
    forced = Job(quantize_by_force, job.arguments, job.out)
    for point in ("output.slab:3", "output.complete", "output.verified"):
        assert forced.run(point)[0] == -signal.SIGKILL
        assert job.out.read_bytes() == b"precious"
    assert forced.run()[0] == 0
    assert job.out.read_bytes() != b"precious"
