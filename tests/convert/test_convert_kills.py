"""Converter runs killed at every named point and at random: the same bytes in the end, no half file."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import write_checkpoint
from support.kills import Job, check_every_point, check_random_kills, paced

from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Event, Note

TYPE = "Q4_0"


def convert(source: str, word: str, out: str) -> None:
    """The work of a child."""
    convert_folder(
        Path(source), Path(out), ConvertOptions(word), RunOptions(threads=1, listen=paced(Path(out)))
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def expected(tmp_path: Path, checkpoint: Path) -> bytes:
    return convert_folder(checkpoint, tmp_path / "expected.gguf", ConvertOptions(TYPE)).path.read_bytes()


@pytest.fixture
def make_job(tmp_path: Path, checkpoint: Path) -> Callable[[], Job]:
    numbers = itertools.count()

    def make() -> Job:
        folder = tmp_path / f"run-{next(numbers)}"
        folder.mkdir()
        return Job(convert, [str(checkpoint), TYPE], folder / "out.gguf")

    return make


def test_convert_killed_at_every_point(make_job: Callable[[], Job], expected: bytes) -> None:
    """A step of the write path that is not repeated, or trusted, after a crash."""
    check_every_point(make_job, expected)


def test_convert_killed_at_random(make_job: Callable[[], Job], expected: bytes) -> None:
    """A crash between two named points."""
    check_random_kills(make_job, expected, n_kills=8, seed=1)


@pytest.mark.soak
def test_soak_convert(make_job: Callable[[], Job], expected: bytes) -> None:
    """As above, a thousand times."""
    check_random_kills(make_job, expected, n_kills=1000, seed=2)


def resumed_notes(job: Job, checkpoint: Path, options: ConvertOptions) -> tuple[int, str]:
    """Tensors taken over from a killed run, and what the next run says."""
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    summary = convert_folder(checkpoint, job.out, options, RunOptions(listen=listen))
    return summary.n_resumed, "\n".join(notes)


def test_resumed_conversion_skips_what_is_done(make_job: Callable[[], Job], checkpoint: Path) -> None:
    """A resume that encodes everything again, or keeps quiet about going on."""
    job = make_job()
    assert job.run("output.journaled:5")[0] == -signal.SIGKILL
    n_resumed, notes = resumed_notes(job, checkpoint, ConvertOptions(TYPE))
    assert n_resumed >= 5
    assert "continuing" in notes


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: write_checkpoint(folder, seed=9), "the checkpoint"),
        (lambda folder: (folder / "model-00001-of-00003.safetensors").touch(), "the checkpoint"),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
            "metadata",
        ),
    ],
)
def test_changed_checkpoint_starts_over(
    make_job: Callable[[], Job],
    checkpoint: Path,
    tmp_path: Path,
    change: Callable[[Path], object],
    named: str,
) -> None:
    """A resume that mixes tensors of two checkpoints, or starts over without saying why."""
    job = make_job()
    assert job.run("output.journaled:5")[0] == -signal.SIGKILL
    change(checkpoint)
    n_resumed, notes = resumed_notes(job, checkpoint, ConvertOptions(TYPE))
    assert n_resumed == 0
    assert "starting over" in notes
    assert named in notes
    fresh = convert_folder(checkpoint, tmp_path / "fresh.gguf", ConvertOptions(TYPE))
    assert job.out.read_bytes() == fresh.path.read_bytes()


def test_changed_option_starts_over(make_job: Callable[[], Job], checkpoint: Path) -> None:
    """A resume that mixes tensors of two types."""
    job = make_job()
    assert job.run("output.journaled:5")[0] == -signal.SIGKILL
    n_resumed, notes = resumed_notes(job, checkpoint, ConvertOptions("Q8_0"))
    assert n_resumed == 0
    assert "the type" in notes


def test_interruption_is_resumable(checkpoint: Path, tmp_path: Path, expected: bytes) -> None:
    """Ctrl-C that leaves a file at the final path, or loses what was done."""
    out = tmp_path / "out.gguf"
    options = RunOptions(threads=1)

    def stop_soon(event: Event) -> None:
        if isinstance(event, Advanced):
            options.stop.set()

    with pytest.raises(InterruptedRunError) as caught:
        convert_folder(
            checkpoint,
            out,
            ConvertOptions(TYPE),
            RunOptions(threads=1, listen=stop_soon, stop=options.stop),
        )
    assert "same command" in caught.value.remedy
    assert not out.exists()
    assert convert_folder(checkpoint, out, ConvertOptions(TYPE)).path.read_bytes() == expected


def test_checkpoint_is_never_the_output(checkpoint: Path) -> None:
    """An output that overwrites a shard, by its own name or through a link."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    shard = checkpoint / next(iter(index["weight_map"].values()))
    before = shard.read_bytes()
    link = checkpoint / "link.gguf"
    link.hardlink_to(shard)
    for out in (shard, link):
        with pytest.raises(Exception, match="same file"):
            convert_folder(checkpoint, out, ConvertOptions(TYPE), RunOptions(force=True))
    assert shard.read_bytes() == before
