"""Files told apart by a sample of them: what must show in it, and what may not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.tiny_gguf import EIGHT_EXPERTS, patch_weight, write_tiny

from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.model import identity
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_local.model.identity import exact_identity, file_identity


def copied(path: Path, to: Path) -> Path:
    """With its times."""
    shutil.copy2(path, to)
    return to


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("identity") / "tiny.gguf", EIGHT_EXPERTS)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return copied(original, tmp_path / "model.gguf")


def test_every_tensor_is_sampled_at_both_ends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a model of which a few tensors were changed taken for the one that it was."""
    # A file so small would be read as a whole.
    monkeypatch.setattr(identity, "_BLOCK", 16)
    before = file_identity(model)
    for tensor in read_gguf(model).tensors.values():
        for index in (0, tensor.n_weights - 1):
            content = model.read_bytes()
            patch_weight(model, tensor.name, index, 7.0)
            assert file_identity(model) != before, (tensor.name, index)
            model.write_bytes(content)
    assert file_identity(model) == before


def test_the_header_is_read_as_a_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a number of the metadata changed, which decides what is computed."""
    monkeypatch.setattr(identity, "_BLOCK", 16)
    before = file_identity(model)
    content = bytearray(model.read_bytes())
    at = content.index(b"rope.freq_base") + len(b"rope.freq_base") + 4
    content[at] ^= 1
    model.write_bytes(content)
    assert read_gguf(model).get("deepseek.rope.freq_base") != EIGHT_EXPERTS.rope_theta
    assert file_identity(model) != before


def test_a_copy_is_the_same_model_and_another_file(model: Path, tmp_path: Path) -> None:
    """Guards: a batch that cannot go on after its model was moved; a KV cache that outlives its weights."""
    copy = copied(model, tmp_path / "copy.gguf")
    assert file_identity(copy) == file_identity(model)
    assert exact_identity(read_gguf(copy)) != exact_identity(read_gguf(model))
    assert exact_identity(read_gguf(model)) == exact_identity(read_gguf(model))


def test_whatever_was_written_shows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: one expert changed where nothing is sampled, by a program that sets the time back."""
    monkeypatch.setattr(identity, "_BLOCK", 16)
    monkeypatch.setattr(identity, "_END", 16)
    header = read_gguf(model)
    before, sampled = exact_identity(header), file_identity(model)
    status = model.stat()
    patch_weight(
        model, "blk.2.ffn_up_exps.weight", header.tensors["blk.2.ffn_up_exps.weight"].n_weights // 2, 7
    )
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_identity(model) == sampled
    assert exact_identity(header) != before


def test_a_header_of_another_file_is_refused(model: Path) -> None:
    """Guards: the identity of a file that took the place of the one that was checked."""
    header = read_gguf(model)
    other = copied(model, model.with_name("other"))
    other.replace(model)
    with pytest.raises(FormatError, match="has changed since"):
        exact_identity(header)
    model.unlink()
    with pytest.raises(FileError, match="cannot be read"):
        exact_identity(header)


def test_files_of_other_kinds(model: Path, tmp_path: Path) -> None:
    """Guards: a chat template, or a damaged model, whose identity is an error."""
    text = tmp_path / "template.jinja"
    text.write_text("{{ a }}")
    before = file_identity(text)
    text.write_text("{{ b }}")
    assert file_identity(text) != before
    model.write_bytes(model.read_bytes()[:200])
    assert file_identity(model).startswith("200 bytes ")
    with pytest.raises(FileError, match="cannot be read"):
        file_identity(tmp_path)
