"""Observers of logits against numpy on llama.cpp's own logits: perplexity, a stored reference, divergence."""

from __future__ import annotations

import errno
import json
import math
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import llama_oracle
from support.block_files import resealed
from support.models import tiny_model
from support.observed import observed

from dsmoe_local.base.errors import FileError, FormatError, LockedError, UsageError
from dsmoe_local.engine.errors import EngineError, NativeError
from dsmoe_local.engine.native import Row
from dsmoe_local.engine.observe import block_file
from dsmoe_local.engine.observe.observer import Scored
from dsmoe_local.engine.observe.reference_file import Prediction, ReferenceReader, ReferenceWriter
from dsmoe_local.engine.observe.scoring import blocks
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.model.gguf_model import read_model

IDS = [0, *range(20, 58), 5, 5, 300]
OTHER = [0, 5, *range(100, 130)]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    return result


def expected_logprobs(ids: Sequence[int], path: Path | None = None) -> NDArray[np.float64]:
    return log_softmax(llama_oracle.logits(path or tiny_model(), ids))[:-1]


def nll(ids: Sequence[int]) -> NDArray[np.float64]:
    return -expected_logprobs(ids)[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logprobs_equal_numpy(chunk: int) -> None:
    """Guards: targets off by one, and tokens lost where a prompt is cut into chunks."""
    with observed(tiny_model(), ObserverOptions("logprobs")) as model:
        assert model.dispatcher.reads_logits
        assert model.dispatcher.eval_callback is None
        model.score(IDS, chunk=chunk)
        model.score(OTHER, chunk=chunk)
        summary = model.summary("logprobs")
    expected = np.concatenate([nll(IDS), nll(OTHER)])
    assert summary["tokens"] == len(expected)
    assert summary["nll"] == pytest.approx(expected.sum(), rel=1e-4)
    assert summary["nll_squares"] == pytest.approx(np.square(expected).sum(), rel=1e-4)
    perplexity = math.exp(expected.mean())
    assert summary["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    error = perplexity * expected.std(ddof=1) / math.sqrt(len(expected))
    assert summary["perplexity_error"] == pytest.approx(error, rel=1e-3)


def test_only_scored_tokens_count() -> None:
    """Guards: generated tokens, or rows of other requests, taken for the prompt to be scored."""
    with observed(tiny_model(), ObserverOptions("logprobs")) as model:
        part = IDS[:10]
        rows = [Row(0, 0, OTHER[:5], 1), Row(1, 0, part, 4), Row(2, 0, OTHER[:3], 3)]
        model.step(*rows, scored=[None, Scored("r", 7, IDS[7:10]), None])
        model.step(Row(0, 5, [7], 1))
        summary = model.summary("logprobs")
    assert summary["tokens"] == 3
    assert summary["nll"] == pytest.approx(nll(IDS)[6:9].sum(), rel=1e-4)


def test_nothing_scored_is_no_error() -> None:
    """Guards: a division by zero, or a NaN that is no JSON, before the first token."""
    with observed(tiny_model(), ObserverOptions("logprobs")) as model:
        summary = model.summary("logprobs")
    assert (summary["tokens"], summary["perplexity"]) == (0, 1.0)
    json.dumps(summary, allow_nan=False)


def test_logits_that_are_not_finite_are_an_error() -> None:
    """Guards: a perplexity of NaN at the end of a long run."""
    for bad in (np.nan, np.inf):
        logits = np.zeros((1, 8), np.float32)
        logits[0, 3] = bad
        with pytest.raises(NativeError):
            list(blocks([Row(0, 0, [1], 1)], logits, [Scored("r", 1, [2])]))


def write_reference(path: Path, model_path: Path | None = None, **parameters: Any) -> dict[str, Any]:
    options = ObserverOptions("reference", (("path", str(path)), *parameters.items()))
    with observed(model_path or tiny_model(), options) as model:
        model.score(IDS, "first", chunk=9)
        model.score(OTHER, "ünï/2", chunk=64)
        return model.summary("reference")


def compare(path: Path, model_path: Path | None = None) -> dict[str, Any]:
    with observed(model_path or tiny_model(), ObserverOptions("divergence", (("path", str(path)),))) as model:
        # In another order and in other chunks.
        model.score(OTHER, "ünï/2", chunk=7)
        model.score(IDS, "first", chunk=5)
        return model.summary("divergence")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with another output matrix."""
    path = tmp_path_factory.mktemp("changed") / "changed.gguf"
    shutil.copyfile(tiny_model(), path)
    tensor = read_model(path)[0].tensors["output.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        weights = np.frombuffer(file.read(tensor.n_bytes), np.float32)
        noise = 0.03 * np.random.default_rng(1).standard_normal(len(weights))
        file.seek(tensor.offset)
        file.write((weights + noise).astype(np.float32).tobytes())
    return path


def tail_as_one(p: NDArray[np.float64], q: NDArray[np.float64], top: int, mass: float) -> tuple[float, float]:
    """The bounds of a divergence that knows only the likeliest tokens of p."""
    order = np.argsort(-p)
    n = min(top, int((np.cumsum(np.exp(p[order])) < mass).sum()) + 1)
    kept, tail = order[:n], order[n:]
    known = float((np.exp(p[kept]) * (p[kept] - q[kept])).sum())
    m, other = float(np.exp(p[tail]).sum()), float(np.exp(q[tail]).sum())
    if not m:
        return known, known
    return known + m * math.log(m / other), known + m * (float(p[kept].min()) - float(q.min()))


@pytest.mark.parametrize(("top", "mass"), [(256, 0.9999), (5, 1.0), (1, 0.5), (640, 1.0)])
def test_divergence_is_between_its_bounds(top: int, mass: float, changed: Path, tmp_path: Path) -> None:
    """Guards: a divergence on the wrong side, tails forgotten, or bounds that are none."""
    written = write_reference(tmp_path / "ref", top=top, mass=mass)
    assert written["tokens"] == len(IDS) + len(OTHER) - 2
    found = compare(tmp_path / "ref", changed)
    p = np.concatenate([expected_logprobs(IDS), expected_logprobs(OTHER)])
    q = np.concatenate([expected_logprobs(IDS, changed), expected_logprobs(OTHER, changed)])
    exact = (np.exp(p) * (p - q)).sum(1)
    assert (found["tokens"], found["unmatched"]) == (len(exact), 0)
    assert exact.mean() > 1e-3
    assert 0 <= found["kl"] <= exact.mean() + 1e-5
    assert found["kl_upper"] >= exact.mean() - 1e-5
    merged = np.array([tail_as_one(*pair, top, mass) for pair in zip(p, q, strict=True)])
    assert found["kl"] == pytest.approx(merged[:, 0].mean(), rel=1e-3)
    assert found["kl_upper"] == pytest.approx(merged[:, 1].mean(), rel=1e-3)
    if top == 640:
        assert found["kl"] == pytest.approx(exact.mean(), rel=1e-3)
        assert found["kl_upper"] == pytest.approx(exact.mean(), rel=1e-3)
        assert found["kl_error"] == pytest.approx(exact.std(ddof=1) / math.sqrt(len(exact)), rel=1e-3)
        assert found["kl_max"] == pytest.approx(exact.max(), rel=1e-3)
        assert found["kl_quantiles"]["0.5"] == pytest.approx(np.quantile(exact, 0.5), rel=1e-3)
    parts = {"first": merged[: len(IDS) - 1, 0], "ünï/2": merged[len(IDS) - 1 :, 0]}
    assert len(found["requests"]) == len(parts)
    for each in found["requests"]:
        part = parts[each["request"]]
        assert (each["tokens"], each["kl"]) == (len(part), pytest.approx(part.mean(), rel=1e-3))
    assert found["same_top"] == int((p.argmax(1) == q.argmax(1)).sum())
    targets = [*IDS[1:], *OTHER[1:]]
    change = -q[np.arange(len(q)), targets] + p[np.arange(len(p)), targets]
    assert found["nll_change"] == pytest.approx(change.mean(), abs=1e-4)
    assert found["reference_nll"] == pytest.approx(np.concatenate([nll(IDS), nll(OTHER)]).mean(), rel=1e-4)
    assert found["nll"] == pytest.approx(found["reference_nll"] + change.mean(), rel=1e-4)
    json.dumps(found, allow_nan=False)


def test_the_model_itself_does_not_diverge(tmp_path: Path) -> None:
    """Guards: rounding that makes a model differ from itself, or be closer than itself."""
    write_reference(tmp_path / "ref")
    found = compare(tmp_path / "ref")
    assert 0 <= found["kl"] < 1e-6
    assert found["same_top"] == found["tokens"]
    assert abs(found["nll_change"]) < 1e-6


def test_other_text_is_unmatched(tmp_path: Path) -> None:
    """Guards: predictions of one text compared with those of another."""
    write_reference(tmp_path / "ref")
    options = ObserverOptions("divergence", (("path", str(tmp_path / "ref")),))
    with observed(tiny_model(), options) as model:
        model.score(OTHER, "first")
        model.score(IDS, "unknown")
        assert model.summary("divergence")["tokens"] == 0
        assert model.summary("divergence")["unmatched"] == len(IDS) + len(OTHER) - 2


def test_reference_keeps_the_likeliest(tmp_path: Path) -> None:
    """Guards: an entry left out for a less likely one; a tail that is not the rest."""
    summary = write_reference(tmp_path / "ref", top=20, mass=0.9)
    reader = ReferenceReader(tmp_path / "ref")
    sizes = []
    for position, row in enumerate(expected_logprobs(IDS)):
        found = reader.find("first", position + 1)
        assert found is not None
        assert found.target == IDS[position + 1]
        order = np.argsort(-row)[: len(found.ids)]
        np.testing.assert_allclose(found.logprobs, row[order], atol=1e-4)
        np.testing.assert_allclose(row[found.ids], row[order], atol=1e-4)
        assert found.tail_mass == pytest.approx(1 - np.exp(row[order]).sum(), abs=1e-4)
        enough = int(np.searchsorted(np.cumsum(np.exp(np.sort(row)[::-1])), 0.9)) + 1
        assert abs(len(found.ids) - min(20, enough)) <= 1
        sizes.append(len(found.ids))
    assert reader.find("first", 0) is None
    assert reader.find("first", len(IDS)) is None
    assert reader.n_tokens == summary["tokens"]
    assert summary["entries_per_token"] >= min(sizes)
    reader.close()


def test_a_reference_is_never_overwritten(tmp_path: Path) -> None:
    """Guards: hours of work lost by a second run under the same name."""
    path = tmp_path / "ref"
    write_reference(path)
    content = path.read_bytes()
    with pytest.raises(FileError, match="exists already"):
        write_reference(path)
    assert path.read_bytes() == content
    with pytest.raises(FileError):
        write_reference(tmp_path / "no" / "folder")


def reference_writer(path: Path) -> ReferenceWriter:
    return ReferenceWriter(path, 640)


def add_one(writer: ReferenceWriter, request_id: str) -> None:
    ids, logprobs = np.array([3], np.int32), np.array([-0.1], np.float32)
    writer.add(request_id, 1, [Prediction(3, -0.1, 0.1, ids, logprobs)])


def test_a_reference_has_its_name_once_it_is_asked_for(tmp_path: Path) -> None:
    """Guards: half a reference that passes for a whole one; tokens lost behind the first summary; files that
    runs without tokens leave behind.
    """
    path = tmp_path / "ref"
    writer = reference_writer(path)
    writer.publish()
    assert not path.exists()
    add_one(writer, "first")
    assert not path.exists()
    with pytest.raises(LockedError):
        reference_writer(path)
    writer.publish()
    assert ReferenceReader(path).n_tokens == 1
    add_one(writer, "second")
    writer.close()
    writer.close()
    assert ReferenceReader(path).n_tokens == 2
    reference_writer(tmp_path / "empty").close()
    with pytest.raises(FileError, match="exists already"):
        reference_writer(path)
    assert [file.name for file in tmp_path.iterdir()] == ["ref"]


def test_a_published_reference_is_never_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: hours of work under its final name that a crash in the middle of a later block makes
    unreadable; a later block that gets lost, or that is copied with a torn one.
    """
    path, part = tmp_path / "ref", tmp_path / "ref.part"
    writer = reference_writer(path)
    add_one(writer, "first")
    writer.publish()
    published, inode = path.read_bytes(), path.stat().st_ino
    writer.publish()
    assert not part.exists()
    assert path.stat().st_ino == inode
    for name in ("second", "third"):
        add_one(writer, name)
        assert path.read_bytes() == published, "what is there is as it was, whenever the process dies"
    # As by a bad disk: what is read again is not what was written.
    monkeypatch.setattr(block_file, "sync", lambda _: part.write_bytes(part.read_bytes()[:-1]))
    with pytest.raises(FormatError, match="was not finished"):
        writer.publish()
    monkeypatch.undo()
    with pytest.raises(FormatError, match="was not finished"):
        writer.close()
    assert path.read_bytes() == published


def test_what_follows_a_publication_replaces_it(tmp_path: Path) -> None:
    """Guards: later blocks that never get their name, or take somebody else's; blocks lost with them."""
    path = tmp_path / "ref"
    writer = reference_writer(path)
    for count, name in enumerate(("first", "sec\ud800nd", "third"), 1):
        add_one(writer, name)
        writer.publish()
        reader = ReferenceReader(path)
        assert reader.n_tokens == count
        assert reader.find(name, 1) is not None
        reader.close()
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["ref"]


@pytest.mark.parametrize("way", ["moved", "removed"])
def test_a_file_in_the_place_of_a_published_one(way: str, tmp_path: Path) -> None:
    """Guards: a file that took the name of a published reference replaced by the next publication."""
    path = tmp_path / "ref"
    writer = reference_writer(path)
    add_one(writer, "first")
    writer.publish()
    path.rename(tmp_path / "moved") if way == "moved" else path.unlink()
    path.write_text("theirs")
    add_one(writer, "second")
    for _ in range(2):
        with pytest.raises(FileError, match=r"ref\.part"):
            writer.publish()
    assert path.read_text() == "theirs"
    path.unlink()
    add_one(writer, "third")
    writer.close()
    assert ReferenceReader(path).n_tokens == 3
    assert not (tmp_path / "ref.part").exists()


@pytest.mark.parametrize("when", ["write", "sync"])
def test_a_full_disk_keeps_what_is_published(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a traceback for a full disk; half a block with others behind it; a part that keeps the disk
    full; a published reference lost for what did not fit.
    """
    path = tmp_path / "ref"
    writer = reference_writer(path)
    add_one(writer, "first")
    writer.publish()
    add_one(writer, "second")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "sync":
        monkeypatch.setattr(block_file, "sync", full)
        with pytest.raises(FileError, match="No space left"):
            writer.publish()
    else:
        monkeypatch.setattr(writer, "_file", FullFile(writer._file))
        with pytest.raises(FileError, match="No space left"):
            add_one(writer, "third")
    monkeypatch.undo()
    with pytest.raises(FileError, match="not complete"):
        add_one(writer, "more")
    for finish in (writer.publish, writer.close):
        with pytest.raises(FileError, match="not complete"):
            finish()
    writer.close()
    assert ReferenceReader(path).n_tokens == 1
    assert [file.name for file in tmp_path.iterdir()] == ["ref"]


def test_a_full_disk_keeps_no_half_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a copy of what is published, cut short by a full disk, that stays and keeps the disk full."""
    writer = reference_writer(tmp_path / "ref")
    add_one(writer, "first")
    writer.publish()

    def full(_: object, part: BinaryIO) -> None:
        part.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(FileError, match="No space left"):
        add_one(writer, "second")
    with pytest.raises(FileError, match="not complete"):
        writer.close()
    assert ReferenceReader(tmp_path / "ref").n_tokens == 1
    assert [file.name for file in tmp_path.iterdir()] == ["ref"]


class FullFile:
    """A file on a full disk, which finds out when it is closed, too."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        self._file.close()
        raise OSError(errno.ENOSPC, "No space left on device")


def forged(content: bytes, kind: str) -> bytes:
    """A file with right checksums that nobody of us has written."""
    changed = bytearray(content)
    start = 12 + int.from_bytes(content[8:12], "little") + 8
    count = int.from_bytes(changed[start : start + 4], "little")
    told = start + 12 + int.from_bytes(content[start + 8 : start + 12], "little")
    place = {"size": 12 * count, "id": 16 * count, "negative": 16 * count, "nan": 4 * count}.get(kind, 0)
    value = {
        "size": struct.pack("<i", 10**6),
        "id": struct.pack("<i", 640),
        "negative": struct.pack("<i", -1),
        "nan": struct.pack("<f", math.nan),
    }.get(kind, b"")
    changed[told + place : told + place + len(value)] = value
    if kind == "name":
        changed[start + 8 : start + 12] = struct.pack("<I", 10**9)
    if kind == "number":
        changed[12 : 12 + 40] = changed[12 : 12 + 40].replace(b"640", b"1.5")
    if kind == "deep":
        changed[12:start] = b"[" * (start - 20) + changed[start - 8 : start]
    return resealed(bytes(changed))


@pytest.mark.parametrize("kind", ["size", "id", "negative", "nan", "name", "number", "deep"])
def test_forged_references_are_refused(kind: str, written: Path) -> None:
    """Guards: a reference from elsewhere that ends in a traceback, or is compared with at tokens that are not
    there; numpy takes negative ids.
    """
    path = written.with_name("forged")
    path.write_bytes(forged(written.read_bytes(), kind))
    with pytest.raises(FormatError):
        compare(path)


def test_a_file_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """Guards: somebody else's work replaced when ours is done, or ours lost."""
    path = tmp_path / "ref"
    writer = reference_writer(path)
    add_one(writer, "first")
    path.write_text("theirs")
    for finish in (writer.publish, writer.close):
        with pytest.raises(FileError, match=r"ref\.part"):
            finish()
    writer.close()
    assert path.read_text() == "theirs"
    assert ReferenceReader(tmp_path / "ref.part").n_tokens == 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "whole"
    write_reference(path, top=4)
    return path


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_references_are_refused(written: Path, data: st.DataObject) -> None:
    """Guards: a torn or altered file that is compared with, or that fails inside numpy; one cut between two
    blocks that passes for a shorter one.
    """
    whole = written.read_bytes()
    where = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(("cut", "flip")))
    path = written.with_name("damaged")
    path.write_bytes(
        whole[:where] if kind == "cut" else whole[:where] + bytes([whole[where] ^ 0x41]) + whole[where + 1 :]
    )
    with pytest.raises((FileError, FormatError)):
        ReferenceReader(path)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """Guards: token ids of one vocabulary looked up in another."""
    path = tmp_path / "ref"
    write_reference(path)
    content = path.read_bytes()
    assert b'"n_vocab": 640' in content
    path.write_bytes(resealed(content.replace(b'"n_vocab": 640', b'"n_vocab": 641')))
    with pytest.raises(UsageError, match="641 tokens"):
        compare(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ObserverOptions("nothing"), "no observer"),
        (ObserverOptions("logprobs", (("path", "x"),)), "takes no"),
        (ObserverOptions("routing", (("trace", True),)), "not valid"),
        (ObserverOptions("routing", (("trace", -1),)), "out of range"),
        (ObserverOptions("routing", (("trace", 1), ("trace", 1))), "not valid"),
        (ObserverOptions("divergence"), "needs the parameter"),
        (ObserverOptions("reference", (("path", "x"), ("top", 0))), "out of range"),
        (ObserverOptions("reference", (("path", "x"), ("mass", 1.5))), "out of range"),
    ],
)
def test_wrong_options_are_refused(options: ObserverOptions, message: str, tmp_path: Path) -> None:
    """Guards: a misspelt parameter that is ignored, or that ends in a TypeError."""
    with pytest.raises(UsageError, match=message), observed(tiny_model(), options):
        pass


def test_names_are_unique_and_known() -> None:
    """Guards: the second of two observers of one name replacing the first."""
    with (
        pytest.raises(UsageError, match="given twice"),
        observed(tiny_model(), ObserverOptions("logprobs"), ObserverOptions("logprobs")),
    ):
        pass
    with observed(tiny_model(), ObserverOptions("logprobs")) as model, pytest.raises(EngineError):
        model.summary("routing")
