"""Damaged and wrong inputs of `dsmoe eval` and `dsmoe imatrix` end in short errors."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.checkpoints import TINY
from support.imatrices import random_imatrix
from support.models import tiny_model

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError
from dsmoe_local.cli.commands import load_command
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.importance import importance_file
from dsmoe_local.evaluate.importance_coverage import coverage_of
from dsmoe_local.evaluate.measure import measure, options_for
from dsmoe_local.evaluate.reference import compare, is_kept, keep, record, recorders, reserved, unpack
from dsmoe_local.evaluate.text import Text, built_in, read_text
from dsmoe_local.evaluate.windows import cut_windows
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.budget.sensitivity import Probe, Probes, Sensitivity, TensorErrors
from dsmoe_quantize.budget.sensitivity_file import read_sensitivity, write_sensitivity
from dsmoe_quantize.imatrix_file import read_imatrix, write_imatrix

TEXT = Text("t", built_in().content[1000:1300])
N_CONTEXT = 32


def options(path: Path) -> ModelOptions:
    return ModelOptions(path, n_threads=1, n_ubatch=N_CONTEXT)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"%PDF-1.4\n1 0 obj\n", "the text is a PDF"),
        (gzip.compress(b"a text", mtime=0), "the text is a gzip file"),
        (b"PK\x03\x04....", "the text is a ZIP archive"),
        (b"GGUF\x03\0\0\0", "the text is a GGUF model"),
        ("a text".encode("utf-16"), "the text is UTF-16"),
        ("caf\u00e9".encode("latin-1"), "byte 3"),
        (b" \n\n", "the text is empty"),
        (b"", "the text is empty"),
        (None, "this is a folder, not a text"),
    ],
)
def test_texts_that_are_none(content: bytes | None, words: str, tmp_path: Path) -> None:
    """Guards: a PDF measured as prose, a message that does not say what to do."""
    path = tmp_path / "text"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DsmoeError, match=words) as caught:
        read_text(str(path))
    assert caught.value.remedy or "empty" in words


def test_folders_as_outputs(tmp_path: Path) -> None:
    """Guards: the advice to remove a folder, or to try --force with it."""
    with pytest.raises(FileError, match="is a folder") as caught, reserved(tmp_path):
        raise AssertionError
    assert "remove" not in str(caught.value)
    with pytest.raises(FileError, match="is a folder"), importance_file(tmp_path, force=True):
        raise AssertionError


def damaged_model(path: Path, value: float) -> Path:
    """Write the tiny model with `value` as all weights of its last norm."""
    content = bytearray(tiny_model().read_bytes())
    norm = read_gguf(tiny_model()).tensors["output_norm.weight"]
    content[norm.offset : norm.offset + norm.n_bytes] = struct.pack("<f", value) * norm.n_weights
    path.write_bytes(content)
    return path


def test_nan_names_the_model(tmp_path: Path) -> None:
    """Guards: NaN as a result; with two models in one command, an error that is either's."""
    path = damaged_model(tmp_path / "damaged.gguf", float("nan"))
    with Engine.load(options_for(options(path), N_CONTEXT)) as engine:
        windows = cut_windows(engine, TEXT, N_CONTEXT, 2)
        with pytest.raises(EngineError, match="not finite\ndamaged\n"):
            measure(engine, windows)


def test_large_logits_stay_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: infinity in JSON, which the engine's process cannot send and nobody can read; 300 digits."""
    path, text = damaged_model(tmp_path / "damaged.gguf", 1e30), tmp_path / "text"
    text.write_text(TEXT.content)
    shared = ["-c", str(N_CONTEXT), "--chunks", "2", "-t", "1", "--text", str(text)]
    for models in ([path], [path, "--against", tiny_model()], [tiny_model(), "--against", path]):
        arguments = [*map(str, models), *shared]
        load_command("eval").main([*arguments, "--json"], standalone_mode=False)
        found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert found["perplexity"]["perplexity"]["value"] > 1
        load_command("eval").main(arguments, standalone_mode=False)
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def mutated(content: bytes, choose: random.Random) -> bytes:
    """Cut the content, or remove, insert or replace bytes."""
    found = bytearray(content)
    at = choose.randrange(len(found))
    match choose.randrange(4):
        case 0:
            del found[at:]
        case 1:
            del found[at : at + choose.choice((1, 2, 8, 100))]
        case 2:
            found[at:at] = choose.randbytes(choose.choice((1, 4, 64)))
        case _:
            for _ in range(choose.choice((1, 2, 8, 64))):
                found[choose.randrange(len(found))] = choose.choice((0, 127, 128, 255, choose.randrange(256)))
    return bytes(found)


def told(read: Callable[[Path], object], path: Path) -> str:
    """Return the DsmoeError of a reader, or None if it accepts the file."""
    try:
        read(path)
    except DsmoeError as error:
        return str(error)
    return ""


def check(content: bytes, read: Callable[[Path], object], folder: Path, n: int, seed: int = 0) -> None:
    """Damage a file `n` times. `read` must accept it or raise a short DsmoeError."""
    choose = random.Random(seed)
    path = folder / "damaged"
    for _ in range(n):
        path.write_bytes(mutated(content, choose))
        assert len(told(read, path).splitlines()) <= 3


def sensitivity(path: Path) -> bytes:
    probes = Probes("t", "d", 16, 1, (GgmlType.Q4_0,), 0.1, {"output": {GgmlType.Q4_0: Probe(0.1, 0.1, 0.1)}})
    tensors = {"output.weight": TensorErrors(10, 5, 1.0, {GgmlType.Q4_K: 0.1})}
    write_sensitivity(Sensitivity("source", "", "kernels", 10, tensors, {"output": 1.0}, probes), path)
    return path.read_bytes()


def imatrix(path: Path) -> bytes:
    write_imatrix(random_imatrix(TINY), path)
    return path.read_bytes()


def read_coverage(path: Path) -> str:
    return json.dumps(coverage_of(read_imatrix(path)).as_json())


FILES: Mapping[str, tuple[Callable[[Path], bytes], Callable[[Path], object]]] = {
    "sensitivity": (sensitivity, read_sensitivity),
    "importance matrix": (imatrix, read_coverage),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    """Guards: tracebacks and hangs on files that a disk or an editor has changed."""
    make, read = FILES[name]
    check(make(tmp_path / "whole"), read, tmp_path, 300)


def check_references(folder: Path, n: int) -> None:
    """Damage the archive, or its members with correct checksums."""
    work = folder / "work"
    work.mkdir()
    with Engine.load(options_for(options(tiny_model()), N_CONTEXT, *recorders(work, tiny_model()))) as engine:
        reference, _ = record(engine, cut_windows(engine, TEXT, N_CONTEXT, 2), work)
    keep(reference, folder / "kept")
    members = {path.name: path.read_bytes() for path in work.iterdir()}
    choose = random.Random(1)

    def use(path: Path) -> None:
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        found = unpack(path, place)
        n_context = found.windows.n_context
        with Engine.load(
            options_for(options(tiny_model()), n_context, *found.observers(tiny_model()))
        ) as engine:
            json.dumps(compare(engine, found).as_json(), allow_nan=False)

    check((folder / "kept").read_bytes(), use, folder, n // 2)
    for name in [choose.choice(list(members)) for _ in range(n // 2)]:
        with zipfile.ZipFile(folder / "archive", "w") as archive:
            for each, content in members.items():
                archive.writestr(each, mutated(content, choose) if each == name else content)
        assert len(told(use, folder / "archive").splitlines()) <= 3


def test_damaged_references(tmp_path: Path) -> None:
    """Guards: tracebacks, hangs and NaN from a kept reference that was damaged."""
    check_references(tmp_path, 30)


def test_a_reference_that_was_cut_short(tmp_path: Path) -> None:
    """Guards: a reference whose copy was interrupted called no GGUF file, with the advice to convert one."""
    with zipfile.ZipFile(tmp_path / "whole", "w") as archive:
        archive.writestr("about.json", "{}" + 1000 * " ")
    cut = tmp_path / "cut"
    cut.write_bytes((tmp_path / "whole").read_bytes()[:500])
    assert is_kept(cut)
    assert not is_kept(tiny_model())
    with pytest.raises(FormatError, match=r"truncated or damaged.*\n.*\nmake it again"):
        unpack(cut, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", [*FILES, "reference"])
def test_soak_damaged_files(name: str, tmp_path: Path) -> None:
    """Run the tests above many times."""
    if name == "reference":
        check_references(tmp_path, 2000)
    else:
        make, read = FILES[name]
        check(make(tmp_path / "whole"), read, tmp_path, 50_000, seed=2)
