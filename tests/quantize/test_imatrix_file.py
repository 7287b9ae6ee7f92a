"""Importance matrices as files: as llama.cpp's code reads and writes them, and what is refused."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.imatrices import as_llama_reads, random_imatrix
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_quantize.imatrix import Imatrix, Statistics
from dsmoe_quantize.imatrix_file import read_imatrix, write_imatrix
from dsmoe_quantize.write.kernels import library_path


def same(first: Imatrix, second: Imatrix) -> bool:
    return first.entries.keys() == second.entries.keys() and all(
        np.array_equal(entry.sums, second.entries[name].sums)
        and np.array_equal(entry.counts, second.entries[name].counts)
        for name, entry in first.entries.items()
    )


def write_as_llama(imatrix: Imatrix, path: Path, **left_out: bool) -> None:
    """As llama-imatrix does it (tools/imatrix/imatrix.cpp, save_imatrix), by the `gguf` package."""
    # It writes no architecture, which the package leaves out if it has no name.
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(imatrix.datasets))
    if not left_out.get("chunk_count"):
        writer.add_uint32("imatrix.chunk_count", imatrix.n_chunks)
    writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        writer.add_tensor(f"{name}.in_sum2", entry.sums)
        if not left_out.get("counts"):
            writer.add_tensor(f"{name}.counts", entry.counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_old(imatrix: Imatrix, path: Path) -> None:
    """The legacy format (save_imatrix_legacy)."""
    parts = [struct.pack("<i", len(imatrix.entries))]
    for name, entry in imatrix.entries.items():
        n_windows = -(-int(entry.counts.max()) // imatrix.chunk_size)
        means = entry.sums / np.maximum(entry.counts, 1)[:, None] * n_windows
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", n_windows, means.size)]
        parts.append(means.astype("<f4").tobytes())
    dataset = imatrix.datasets[0].encode()
    parts.append(struct.pack("<ii", imatrix.n_chunks, len(dataset)) + dataset)
    path.write_bytes(b"".join(parts))


def test_round_trip(tmp_path: Path) -> None:
    """Guards: sums that are not raw any more, counts of experts lost, a text's name or the windows lost."""
    imatrix = random_imatrix(MOE)
    imatrix = Imatrix(imatrix.entries, ("one", "two"), 7, 512, "", {"nll": 1.5, "the text": "x"})
    path = tmp_path / "a.imatrix.gguf"
    write_imatrix(imatrix, path)
    found = read_imatrix(path)
    assert same(found, imatrix)
    assert (found.datasets, found.n_chunks, found.chunk_size) == (("one", "two"), 7, 512)
    assert found.run == imatrix.run
    assert found.name == path.name
    assert found.digest() == imatrix.digest()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_llama_cpp_reads_ours_and_we_theirs(tmp_path: Path) -> None:
    """Guards: a file that one of both refuses, or reads in another order."""
    imatrix = random_imatrix(MOE)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_imatrix(imatrix, ours)
    write_as_llama(imatrix, theirs)
    assert same(read_imatrix(theirs), imatrix)
    assert read_imatrix(theirs).datasets == imatrix.datasets
    assert as_llama_reads(ours).keys() == as_llama_reads(theirs).keys()
    for name, values in as_llama_reads(ours).items():
        assert np.array_equal(values, as_llama_reads(theirs)[name])
    mine, other = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    assert [(t.name, *t.shape, t.tensor_type) for t in mine.tensors] == [
        (t.name, *t.shape, t.tensor_type) for t in other.tensors
    ]
    assert mine.fields.keys() == other.fields.keys()


def test_ggml_opens_ours(tmp_path: Path) -> None:
    """Guards: a file that ggml's own reader refuses: it is stricter than the Python package."""
    path = tmp_path / "ours"
    write_imatrix(random_imatrix(MOE), path)
    library = ctypes.CDLL(str(library_path()))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_get_n_tensors.restype = ctypes.c_int64

    class Parameters(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))

    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Parameters]
    opened = library.gguf_init_from_file(str(path).encode(), Parameters(True, None))
    assert opened
    assert library.gguf_get_n_tensors(ctypes.c_void_p(opened)) == 2 * len(random_imatrix(MOE).entries)
    library.gguf_free(ctypes.c_void_p(opened))


def test_the_old_form(tmp_path: Path) -> None:
    """Guards: means times windows taken for sums over tokens, experts of one tensor mixed up."""
    imatrix = random_imatrix(MOE)
    path = tmp_path / "old.dat"
    write_old(imatrix, path)
    found = read_imatrix(path)
    assert found.is_legacy
    assert (found.datasets, found.n_chunks) == (imatrix.datasets, imatrix.n_chunks)
    for name, entry in imatrix.entries.items():
        shape = (len(entry.counts), 7, entry.sums.shape[1]) if len(entry.counts) > 1 else (7, entry.sums.size)
        expected, values = imatrix.importance(name, shape), found.importance(name, shape)
        assert expected is not None
        assert values is not None
        np.testing.assert_allclose(values, expected, rtol=1e-5)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def another_kind(path: Path) -> None:
    path.unlink()
    write_tiny(path, MOE)


def without_counts(path: Path) -> None:
    write_as_llama(random_imatrix(MOE), path, counts=True)


def without_windows(path: Path) -> None:
    write_as_llama(random_imatrix(MOE), path, chunk_count=True)


def changed(sums: float | None = None, count: int | None = None) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        imatrix = random_imatrix(MOE)
        entry = imatrix.entries["blk.1.ffn_up_exps.weight"]
        if sums is not None:
            entry.sums[1, 3] = sums
        if count is not None:
            entry.counts[1] = count
        write_imatrix(imatrix, path)

    return damage


def no_windows(path: Path) -> None:
    imatrix = random_imatrix(MOE)
    write_imatrix(Imatrix(imatrix.entries, ("a",), 0, 0), path)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        another_kind,
        without_counts,
        without_windows,
        changed(sums=float("nan")),
        changed(sums=float("inf")),
        changed(sums=-1.0),
        changed(count=-5),
        no_windows,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: path.write_bytes(struct.pack("<iii", 1, 3, 0)),
        lambda path: path.write_bytes(struct.pack("<i", 1 << 30) + bytes(64)),
        lambda path: path.write_bytes(struct.pack("<ii3sii", 1, 3, b"abc", 1, 1 << 29) + bytes(64)),
        lambda path: path.write_bytes(struct.pack("<ii3siif", 1, 3, b"abc", 1, 1, float("nan"))),
        lambda path: path.write_text("a text that is no matrix at all"),
    ],
    ids=[
        "cut",
        "a model",
        "no counts",
        "no windows",
        "nan",
        "infinite",
        "negative",
        "negative count",
        "windows of nothing",
        "empty",
        "noise",
        "old, cut",
        "old, many entries",
        "old, long entry",
        "old, nan",
        "text",
    ],
)
def test_what_is_no_matrix_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """Guards: a traceback, memory for what a file claims, a model quantized by garbage."""
    path = tmp_path / "a"
    write_imatrix(random_imatrix(MOE), path)
    damage(path)
    with pytest.raises(FormatError) as raised:
        read_imatrix(path)
    assert str(path) in str(raised.value)


def test_a_missing_file(tmp_path: Path) -> None:
    """Guards: a traceback."""
    with pytest.raises(FileError, match="cannot read the importance matrix"):
        read_imatrix(tmp_path / "none")


def test_random_damage_of_the_old_form(tmp_path: Path) -> None:
    """Guards: anything but our errors from any bytes."""
    path = tmp_path / "old.dat"
    write_old(Imatrix({"abc": Statistics(np.ones((1, 8), np.float32), np.array([64]))}, ("t",), 2, 64), path)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for at in generator.integers(0, len(content), 2):
            damaged[at] = generator.integers(0, 256)
        path.write_bytes(bytes(damaged))
        with suppress(FormatError):
            read_imatrix(path)
