"""Importance matrices against `llama-imatrix` and `llama-quantize`, if they are on the PATH."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import WIDE, write_checkpoint
from support.quantize_oracle import assert_same, tensor_data

from dsmoe_convert.convert import convert_folder
from dsmoe_local.evaluate.text import built_in
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.imatrix import MIN_TOKENS
from dsmoe_quantize.imatrix_file import read_imatrix
from dsmoe_quantize.policy.plan import UNWEIGHTED
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

COLLECTOR = shutil.which("llama-imatrix") or ""
QUANTIZER = shutil.which("llama-quantize") or ""
pytestmark = pytest.mark.skipif(
    not (COLLECTOR and QUANTIZER), reason="llama-imatrix and llama-quantize are not on the PATH"
)

# Not the defaults: roundings that differ would choose other experts.
OPTIONS = ("-c", "64", "--chunks", "12", "-t", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32")
TYPES = ["Q4_0", "Q4_K_M", "IQ4_NL"]
GGUF, OLD, OURS = "llama.imatrix.gguf", "llama.imatrix.dat", "dsmoe.imatrix.gguf"


def run(folder: Path, *command: str) -> None:
    # Theirs cuts what it shows of the tokens, in the middle of a character.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model.gguf` and its importance matrices: both formats of llama.cpp's tool, and ours."""
    folder = tmp_path_factory.mktemp("tools")
    convert_folder(write_checkpoint(folder / "checkpoint", WIDE, form="single"), folder / "model.gguf")
    (folder / "text.txt").write_text(built_in().content[1000:4000])
    options = ("--process-output", *OPTIONS)
    for name in (GGUF, OLD):
        form = ("--output-format", name.rpartition(".")[2])
        run(folder, COLLECTOR, "-m", "model.gguf", "-f", "text.txt", "-o", name, *form, *options)
    ours = (sys.executable, "-c", "from dsmoe_local.cli.main import dsmoe; dsmoe()", "imatrix")
    run(folder, *ours, "model.gguf", "--text", "text.txt", "-o", OURS, *options)
    return folder


def test_the_matrix_is_llama_cpps(folder: Path) -> None:
    """Guards: other windows, other tokens, experts or tensors than llama.cpp's tool sums up."""
    found, expected = read_imatrix(folder / OURS), read_imatrix(folder / GGUF)
    assert found.entries.keys() == expected.entries.keys()
    assert (found.n_chunks, found.chunk_size) == (expected.n_chunks, expected.chunk_size) == (12, 64)
    assert found.datasets == expected.datasets == ("text.txt",)
    for name, entry in expected.entries.items():
        assert found.entries[name].counts.tolist() == entry.counts.tolist(), name
        np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=1e-4)


@pytest.mark.parametrize("word", TYPES)
@pytest.mark.parametrize("matrix", [GGUF, OLD, OURS])
def test_quantized_as_llama_cpps_tool_does(folder: Path, tmp_path: Path, matrix: str, word: str) -> None:
    """Guards: a file of its collector that we read otherwise, or one of ours that its quantizer does: means
    taken for sums, an expert with another's, a matrix without effect.
    """
    imatrix = read_imatrix(folder / matrix)
    # Of experts with fewer tokens we make more than the tool does, on purpose.
    assert imatrix.is_legacy or min(entry.counts.min() for entry in imatrix.entries.values()) >= MIN_TOKENS
    ours, theirs, plain = (tmp_path / f"{name}.gguf" for name in ("ours", "theirs", "plain"))
    source = folder / "model.gguf"
    quantize_file(plan_quantization(source, resolve(word), imatrix=imatrix), ours, threads=1)
    run(folder, QUANTIZER, "--imatrix", matrix, "model.gguf", str(theirs), word, "1")
    assert_same(ours, theirs)
    assert read_gguf(theirs).get("quantize.imatrix.entries_count") == len(imatrix.entries)
    run(folder, QUANTIZER, "model.gguf", str(plain), word, "1")
    data, without = tensor_data(read_gguf(ours)), tensor_data(read_gguf(plain))
    weighed = [name for name in imatrix.entries if data[name][0] not in UNWEIGHTED]
    assert len(weighed) > len(imatrix.entries) / 2
    assert [name for name in weighed if data[name] == without[name]] == []
