"""Outputs that are split into several files: layout, crashes, and files that may not be replaced."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import write_checkpoint
from support.kills import Job, check_every_point, check_random_kills
from support.llama_oracle import logits
from support.tiny_gguf import MOE, NARROW, write_tiny

from dsmoe_convert.convert import ConvertOptions, convert_folder
from dsmoe_local.base.errors import DsmoeError, FileError, UsageError
from dsmoe_local.model.ggml import GgmlType, Tensor
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.gguf_writer import plan_files, plan_gguf
from dsmoe_local.model.split_name import SplitName
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file
from dsmoe_quantize.write import output

SIZE = 1_500_000
"""Splits the model of these tests into four files."""
N_FILES = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "source.gguf", MOE)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The content of each file, from a run that nothing disturbed."""
    return [path.read_bytes() for path in written(source, tmp_path_factory.mktemp("expected") / "out.gguf")]


def written(
    source: Path, out: Path, word: str = "Q8_0", *, force: bool = False, size: int = SIZE
) -> list[Path]:
    plan = plan_quantization(source, resolve(word))
    summary = quantize_file(plan, out, split_max_size=size, force=force)
    split = SplitName.of(summary.path)
    return split.paths if split else [summary.path]


def test_the_same_weights(source: Path, tmp_path: Path) -> None:
    """Weights at the place of others; a file above the size; keys that llama.cpp's reader does not accept."""
    whole = quantize_file(plan_quantization(source, resolve("Q8_0")), tmp_path / "whole.gguf").path
    files = written(source, tmp_path / "out.gguf")
    assert [path.name for path in files] == [f"out-{number:05}-of-00004.gguf" for number in (1, 2, 3, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(path.name for path in files), "whole.gguf"]
    readers = [gguf.GGUFReader(path) for path in files]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for found, same in zip(tensors, gguf.GGUFReader(whole).tensors, strict=True):
        assert (found.name, found.tensor_type) == (same.name, same.tensor_type)
        assert np.array_equal(found.data, same.data), found.name
    for number, (path, reader) in enumerate(zip(files, readers, strict=True)):
        assert path.stat().st_size <= SIZE
        assert reader.tensors
        for key, kind, value in (
            ("split.no", GGUFValueType.UINT16, number),
            ("split.count", GGUFValueType.UINT16, N_FILES),
            ("split.tensors.count", GGUFValueType.INT32, len(tensors)),
        ):
            field = reader.fields[key]
            assert (field.types, field.contents()) == ([kind], value)
    assert read_model(files[0])[0].metadata == read_model(whole)[0].metadata


def test_the_converter_splits_too(tmp_path: Path) -> None:
    """Another split than the quantizer's; files that llama.cpp does not load, or loads as another model."""
    checkpoint = write_checkpoint(tmp_path / "model")
    whole = convert_folder(checkpoint, tmp_path / "whole.gguf", ConvertOptions("f32")).path
    summary = convert_folder(checkpoint, tmp_path / "a.gguf", ConvertOptions("f32", split_max_size=400_000))
    assert summary.n_files == 3
    assert summary.n_bytes == read_model(summary.path)[0].size
    stepwise = written(whole, tmp_path / "b.gguf", "f32", size=400_000)
    split = SplitName.of(summary.path)
    assert split
    assert [path.read_bytes() for path in split.paths] == [path.read_bytes() for path in stepwise]
    ids = [0, *range(20, 40)]
    assert np.array_equal(logits(summary.path, ids), logits(whole, ids))


def test_a_split_model_as_the_source(source: Path, tmp_path: Path) -> None:
    """A split that is joined, or split in another way, with other weights."""
    whole = quantize_file(plan_quantization(source, resolve("Q8_0")), tmp_path / "whole.gguf").path
    first, *_ = written(source, tmp_path / "bf16.gguf", "bf16", size=2 * SIZE)
    joined = quantize_file(plan_quantization(first, resolve("Q8_0")), tmp_path / "joined.gguf").path
    assert joined.read_bytes() == whole.read_bytes()
    again = written(first, tmp_path / "again.gguf")
    assert len(again) == N_FILES


def test_a_model_that_fits_is_one_file(source: Path, tmp_path: Path) -> None:
    """A single file that is called 1 of 1, or has keys about a split."""
    whole = quantize_file(plan_quantization(source, resolve("Q8_0")), tmp_path / "whole.gguf").path
    n_bytes = whole.stat().st_size
    assert written(source, tmp_path / "one.gguf", size=n_bytes) == [tmp_path / "one.gguf"]
    assert (tmp_path / "one.gguf").read_bytes() == whole.read_bytes()
    assert len(written(source, tmp_path / "two.gguf", size=n_bytes - 1)) == 2


@settings(max_examples=150)
@given(
    columns=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    max_size=st.integers(1, 20_000),
    n_tokens=st.integers(1, 500),
    alignment=st.sampled_from([None, 8, 64, 4096]),
)
def test_any_layout(columns: list[int], max_size: int, n_tokens: int, alignment: int | None) -> None:
    """A file above the size whose tensors would have fitted into two; an order that is not the model's."""
    metadata = {"tokens": Field(["token"] * n_tokens, GGUFValueType.ARRAY, GGUFValueType.STRING)}
    if alignment:
        metadata["general.alignment"] = Field(alignment, GGUFValueType.UINT32)
    tensors = [Tensor(f"t{number}", (size,), GgmlType.F32) for number, size in enumerate(columns)]
    plans = plan_files(metadata, tensors, max_size)
    assert [name for plan in plans for name in plan.offsets] == [tensor.name for tensor in tensors]
    if plan_gguf(metadata, tensors).size <= max_size:
        assert len(plans) == 1
    for number, plan in enumerate(plans):
        assert plan.size <= max_size or len(plan.offsets) <= 1
        assert plan.offsets or (number == 0 and len(plans) > 1)


@dataclass(frozen=True)
class SplitJob(Job):
    """A job whose output is split. It is used by the name of its first file."""

    def content(self) -> bytes | None:
        first = SplitName(self.out.parent, self.out.stem, 1, N_FILES)
        if not first.path(1).exists():
            return None
        return b"".join(path.read_bytes() if path.exists() else b"missing" for path in first.paths)

    def is_clean(self) -> bool:
        names = [path.name for path in SplitName(self.out.parent, self.out.stem, 1, N_FILES).paths]
        return sorted(path.name for path in self.out.parent.iterdir()) == names


def quantize(source: str, out: str) -> None:
    """The work of a child."""
    plan = plan_quantization(Path(source), resolve("Q8_0"))
    quantize_file(plan, Path(out), threads=2, split_max_size=SIZE)


def quantize_by_force(source: str, out: str) -> None:
    """The same over an existing output."""
    plan = plan_quantization(Path(source), resolve("Q8_0"))
    quantize_file(plan, Path(out), threads=2, split_max_size=SIZE, force=True)


@pytest.fixture
def make_job(tmp_path: Path, source: Path) -> Callable[[], Job]:
    numbers = itertools.count()

    def make() -> Job:
        folder = tmp_path / f"run-{next(numbers)}"
        folder.mkdir()
        return SplitJob(quantize, [str(source)], folder / "out.gguf")

    return make


def test_split_output_killed_at_every_point(make_job: Callable[[], Job], expected: list[bytes]) -> None:
    """A first file whose others are missing or old; a run that cannot go on after some renames."""
    check_every_point(make_job, b"".join(expected), "split")


@pytest.mark.soak
def test_soak_split_output(make_job: Callable[[], Job], expected: list[bytes]) -> None:
    """As above, at random, a thousand times."""
    check_random_kills(make_job, b"".join(expected), n_kills=1000, seed=3)


def test_an_older_output_is_never_mixed_with_the_new(
    make_job: Callable[[], Job], source: Path, expected: list[bytes]
) -> None:
    """Files of two models under one name, of which a kill makes a model that looks complete."""
    job = make_job()
    older = write_tiny(job.out.parent / "older", MOE, seed=9)
    old = b"".join(path.read_bytes() for path in written(older, job.out))
    older.unlink()
    assert job.run()[0] != 0
    assert job.content() == old
    forced = SplitJob(quantize_by_force, job.arguments, job.out)
    for point in ("output.slab:3", "output.complete", "output.verified"):
        assert forced.run(point)[0] == -signal.SIGKILL
        assert forced.content() == old
    for point in ("split.renamed:1", "split.renamed:2", "split.renamed:1", "output.renamed"):
        assert forced.run(point)[0] == -signal.SIGKILL
        assert forced.content() in (None, b"".join(expected))
    assert forced.run()[0] == 0
    assert forced.content() == b"".join(expected)
    assert forced.is_clean()


def test_a_split_run_continues(make_job: Callable[[], Job], source: Path, expected: list[bytes]) -> None:
    """A resumed run that encodes everything again; hidden files of another split that stay for good."""
    job = make_job()
    assert job.run("output.journaled:5")[0] == -signal.SIGKILL
    assert len(list(job.out.parent.glob(".out.gguf.*-of-00004.part"))) == N_FILES
    plan = plan_quantization(source, resolve("Q8_0"))
    summary = quantize_file(plan, job.out, split_max_size=SIZE)
    assert 5 <= summary.n_resumed < summary.n_tensors
    assert job.content() == b"".join(expected)
    other = make_job()
    assert other.run("output.journaled:5")[0] == -signal.SIGKILL
    notes: list[object] = []
    summary = quantize_file(plan, other.out, split_max_size=2 * SIZE, listen=notes.append)
    assert summary.n_resumed == 0
    assert any("starting over" in str(note) and "--split-max-size" in str(note) for note in notes)
    assert sorted(path.name for path in other.out.parent.iterdir()) == [
        "out-00001-of-00002.gguf",
        "out-00002-of-00002.gguf",
    ]


def test_existing_files(source: Path, tmp_path: Path) -> None:
    """An output replaced without --force, or a second model of the same name beside it."""
    out = tmp_path / "out.gguf"
    files = written(source, out)
    before = [path.read_bytes() for path in files]
    with pytest.raises(FileError, match="exists already"):
        written(source, out)
    for force in (False, True):
        with pytest.raises(FileError, match="another number of files"):
            written(source, out, size=2 * SIZE, force=force)
    assert [path.read_bytes() for path in files] == before
    assert written(source, out, force=True) == files
    files[0].unlink()
    with pytest.raises(FileError, match="exists already"):
        written(source, out)
    with pytest.raises(FileError, match="exists already"):
        output.refuse_early(out, force=False, split=True)
    output.refuse_early(out, force=True, split=True)
    output.refuse_early(out, force=False)


def test_a_source_is_never_a_file_of_the_output(source: Path, tmp_path: Path) -> None:
    """A file of the source replaced by one of the output."""
    first, *_ = written(source, tmp_path / "model.gguf", "bf16", size=2 * SIZE)
    before = first.read_bytes()
    n_files = len(SplitName.of(first).paths)  # type: ignore[union-attr]
    size = next(size for size in range(SIZE, 3 * SIZE, 10_000) if n_split(first, size) == n_files)
    with pytest.raises(UsageError, match="same file"):
        written(first, tmp_path / "model.gguf", size=size, force=True)
    assert first.read_bytes() == before


def n_split(source: Path, size: int) -> int:
    plan = plan_quantization(source, resolve("Q8_0"))
    return len(plan_files(plan.metadata, plan.choices, size))


def test_a_place_that_is_taken(source: Path, tmp_path: Path) -> None:
    """A folder with the name of a file, found when everything is encoded."""
    (tmp_path / "out-00003-of-00004.gguf").mkdir()
    with pytest.raises(UsageError, match="not a file"):
        written(source, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out-00003-of-00004.gguf"]


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo in the unit that makes a file of each tensor."""
    monkeypatch.setattr(output, "MAX_FILES", 20)
    source = write_tiny(tmp_path / "source.gguf", NARROW)
    with pytest.raises(DsmoeError, match="split into 24 files"):
        written(source, tmp_path / "out.gguf", size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]
