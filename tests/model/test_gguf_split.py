"""Models split into several files: read as one, with the same result; and those whose files do not match."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.llama_child import LlamaChild
from support.llama_oracle import logits
from support.models import tiny_model
from support.split_files import rewrite_key, split_with_gguf
from support.tiny_gguf import MOE, patch_weight, write_tiny

from dsmoe_local.base.errors import DsmoeError, FormatError
from dsmoe_local.model import identity
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.identity import exact_identity, file_identity
from dsmoe_quantize.policy.choice import Overrides
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import default_output, plan_quantization, quantize_file

PER_FILE = 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("whole") / "whole.gguf", MOE)


@pytest.fixture(scope="module")
def original(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return split_with_gguf(whole, tmp_path_factory.mktemp("split") / "tiny", PER_FILE)


@pytest.fixture
def files(original: list[Path], tmp_path: Path) -> list[Path]:
    """The files of a split model, three of them, which a test may damage."""
    folder = tmp_path / "split"
    shutil.copytree(original[0].parent, folder)
    return [folder / path.name for path in original]


def test_the_same_model(whole: Path, files: list[Path]) -> None:
    """A tensor of another file, or at its offset in the first; a key about the split that gets copied."""
    assert [path.name for path in files] == [f"tiny-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    expected, hp = read_model(whole)
    found, found_hp = read_model(files[0])
    assert found_hp == hp
    assert found.metadata == expected.metadata
    assert list(found.tensors) == list(expected.tensors)
    assert [part.path for part in found.parts] == files
    assert found.size == sum(path.stat().st_size for path in files)
    raw, raw_whole = [path.read_bytes() for path in files], whole.read_bytes()
    for name, info in found.tensors.items():
        same = expected.tensors[name]
        assert (info.shape, info.type) == (same.shape, same.type)
        data = raw[info.part][info.offset : info.offset + info.n_bytes]
        assert data == raw_whole[same.offset : same.offset + same.n_bytes], name
    for index, path in enumerate(files):
        names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
        assert names == [name for name, info in found.tensors.items() if info.part == index]


def test_quantized_like_the_whole(whole: Path, files: list[Path], tmp_path: Path) -> None:
    """Rows read from the wrong file, or `split.count` in the new file."""
    outputs = [
        quantize_file(plan_quantization(path, resolve("Q8_0")), tmp_path / f"{number}.gguf").path.read_bytes()
        for number, path in enumerate((whole, files[0]))
    ]
    assert outputs[0] == outputs[1]
    assert default_output(files[0], resolve("q4"), Overrides()) == Path("tiny-q4.gguf")


def test_the_output_is_none_of_the_files(files: list[Path]) -> None:
    """A second file overwritten by the output made from it."""
    before = files[1].read_bytes()
    with pytest.raises(DsmoeError, match="same file"):
        quantize_file(plan_quantization(files[0], resolve("Q8_0")), files[1], force=True)
    assert files[1].read_bytes() == before


def test_a_source_that_changes(files: list[Path], tmp_path: Path) -> None:
    """A file replaced between the plan and the reading."""
    plan = plan_quantization(files[0], resolve("Q8_0"))
    shutil.copyfile(files[2], tmp_path / "other")
    (tmp_path / "other").replace(files[2])
    with pytest.raises(DsmoeError, match="changed"):
        quantize_file(plan, tmp_path / "out.gguf")


def test_llama_cpp_agrees(tmp_path: Path) -> None:
    """Files that we accept and llama.cpp reads in another way."""
    model = tiny_model()
    first = split_with_gguf(model, tmp_path / "tiny", 10)[0]
    read_model(first)
    ids = [0, *range(20, 40)]
    assert np.array_equal(logits(first, ids), logits(model, ids))


def test_a_file_without_tensors(whole: Path, tmp_path: Path) -> None:
    """A first file that has only metadata, as some converters write it."""
    first, *_ = split_with_gguf(whole, tmp_path / "x", PER_FILE, small_first=True)
    assert not gguf.GGUFReader(first).tensors
    assert list(read_model(first)[0].tensors) == list(read_model(whole)[0].tensors)


def test_every_file_counts(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a later file replaced, and stored KV states or a batch continued with the old ones."""
    monkeypatch.setattr(identity, "_BLOCK", 16)
    file, _ = read_model(files[0])
    before = file_identity(files[0])
    assert before.startswith(f"{file.size} bytes ")
    assert exact_identity(file).startswith(before)
    seen = {before}
    for part in range(3):
        tensor = next(info for info in file.tensors.values() if info.part == part)
        content = files[part].read_bytes()
        patch_weight(files[part], tensor.name, 0, 7.0)
        seen.add(file_identity(files[0]))
        files[part].write_bytes(content)
        with pytest.raises(FormatError, match="has changed since"):
            exact_identity(file)
        file, _ = read_model(files[0])
    assert len(seen) == 4
    assert file_identity(files[0]) == before


def exchange(first: Path, second: Path) -> None:
    """Give two files each other's name."""
    content = first.read_bytes()
    second.replace(first)
    second.write_bytes(content)


Change = Callable[[list[Path]], object]

REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a missing file": (
        lambda files: files[1].unlink(),
        ("file 2 of the 3 files", "tiny-00002-of-00003.gguf", "one folder"),
    ),
    "the last file is missing": (lambda files: files[2].unlink(), ("file 3 of the 3 files",)),
    "a copy of another file": (
        lambda files: shutil.copyfile(files[1], files[2]),
        ("tiny-00003-of-00003.gguf", "split.no = 1, not 2"),
    ),
    "files in another order": (
        lambda files: exchange(files[1], files[2]),
        ("tiny-00002-of-00003.gguf", "split.no = 2, not 1"),
    ),
    "a file of a model of more files": (
        lambda files: rewrite_key(files[1], "split.count", 4),
        ("tiny-00002-of-00003.gguf", "split.count = 4, not 3", "another model"),
    ),
    "a file of a model with other tensors": (
        lambda files: rewrite_key(files[2], "split.tensors.count", 7),
        ("tiny-00003-of-00003.gguf", "split.tensors.count = 7, not"),
    ),
    "a count that is wrong everywhere": (
        lambda files: [rewrite_key(path, "split.tensors.count", 7) for path in files],
        ("tensors, not 7", "tiny-00001-of-00003.gguf"),
    ),
    "no number in another file": (
        lambda files: rewrite_key(files[1], "split.no", None),
        ("split.no is missing", "tiny-00002"),
    ),
    "no number": (
        lambda files: rewrite_key(files[0], "split.no", None),
        ("split.no is missing", "tiny-00001"),
    ),
    "no count of tensors": (
        lambda files: rewrite_key(files[0], "split.tensors.count", None),
        ("split.tensors.count is missing",),
    ),
    "a whole model in its place": (
        lambda files: write_tiny(files[1], MOE),
        ("split.no is missing", "tiny-00002-of-00003.gguf"),
    ),
    "a truncated file": (
        lambda files: os.truncate(files[2], files[2].stat().st_size - 100),
        ("damaged GGUF file", "tiny-00003-of-00003.gguf"),
    ),
    "a tensor twice": (
        lambda files: rewrite_key(shutil.copyfile(files[1], files[2]), "split.no", 2),
        ("is in two files", "tiny-00003-of-00003.gguf"),
    ),
}


def refused(path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(DsmoeError) as caught:
        read_model(path)
    text = str(caught.value)
    assert not [word for word in words if word not in text], text
    assert len(text.splitlines()) <= 3


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_do_not_match(case: str, files: list[Path]) -> None:
    """Weights of another model, or llama.cpp that aborts on a key of another type."""
    change, words = REFUSED[case]
    change(files)
    refused(files[0], words)


def test_not_the_first(files: list[Path]) -> None:
    """An error that does not say which file to name."""
    refused(files[1], ("file 2 of the 3 files", "name the first one, tiny-00001-of-00003.gguf"))
    files[1].rename(files[1].with_name("second.gguf"))
    refused(files[1].with_name("second.gguf"), ("file 2 of the 3 files", "name the first one"))


@pytest.mark.parametrize(
    "name", ["model.gguf", "tiny-00001-of-00004.gguf", "tiny-1-of-3.gguf", "tiny-00001-of-00003"]
)
def test_a_first_file_with_another_name(name: str, files: list[Path]) -> None:
    """llama.cpp finds the other files by the name of the first only."""
    renamed = files[0].rename(files[0].with_name(name))
    refused(renamed, ("first of 3 files", "rename it to NAME-00001-of-00003.gguf"))


def test_links(files: list[Path], tmp_path: Path) -> None:
    """The cache of the hub, whose files are links to others with names that say nothing."""
    folder = tmp_path / "links"
    folder.mkdir()
    for number, path in enumerate(files):
        path.rename(tmp_path / f"blob{number}")
        (folder / path.name).symlink_to(tmp_path / f"blob{number}")
    read_model(folder / files[0].name)


@pytest.mark.parametrize("n", [60, pytest.param(20_000, marks=pytest.mark.soak)])
def test_damage_to_any_file(n: int, tmp_path: Path) -> None:
    """A crash of the reader; a file that it accepts and of which llama.cpp dies."""
    files = split_with_gguf(tiny_model(), tmp_path / "tiny", 14)
    contents = [path.read_bytes() for path in files]
    with LlamaChild() as child:
        for number in range(n):
            rng = random.Random(f"split:{number}")
            index = rng.randrange(len(files))
            damaged = bytearray(contents[index])
            end = 600 if index else len(damaged)
            damaged[rng.randrange(end)] = rng.randrange(256)
            files[index].write_bytes(damaged)
            with suppress(DsmoeError):
                read_model(files[0])
                assert child.survives(files[0]), f"llama.cpp dies of the mutant split:{number}"
            files[index].write_bytes(contents[index])
