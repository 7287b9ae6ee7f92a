"""The demo as a whole, against the model it was made from: equality with all experts, perplexity with 12."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from support import llama_oracle

from benchmarks.demo_quality import perplexity, window_losses
from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_convert.demo import build, calibration
from dsmoe_convert.demo.build import BuildOptions, build_demo
from dsmoe_convert.demo.checkpoint import write_checkpoint
from dsmoe_convert.demo.source import Source, open_source
from dsmoe_local.base.errors import InterruptedRunError, UsageError
from tools.calibrate_demo.corpus import token_windows

TEXTS = [
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\nA force that attracts two objects.",
    "The capital of France is Paris, which lies on the river Seine in the north of the country.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
]
DENSE_TO_12 = 19.0 / 16.6
"""What the recipe without training lost on such text, and the most that we may."""


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source()


@pytest.fixture(scope="module")
def all_active(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with all 14 experts active, through the real converter, in F32."""
    folder = tmp_path_factory.mktemp("all-active")
    write_checkpoint(source, calibration.load(), folder, calibration.N_ROUTED_EXPERTS)
    out = folder / "demo.gguf"
    convert_folder(folder, out, ConvertOptions("f32"), RunOptions(force=True))
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    return out


@pytest.fixture(scope="module")
def original(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original, dequantized to F32 by the gguf package alone."""
    out = tmp_path_factory.mktemp("original") / "original.gguf"
    reader = gguf.GGUFReader(source.file.path)
    writer = gguf.GGUFWriter(out, "llama")
    own = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for key, item in reader.fields.items():
        if key.startswith(own):
            continue
        if item.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, item.contents())
        else:
            writer.add_key_value(key, item.contents(), item.types[0])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(reversed(tensor.shape.tolist()))
        writer.add_tensor(tensor.name, np.ascontiguousarray(values.reshape(shape), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_all_experts_active_is_the_dense_model(original: Path, all_active: Path) -> None:
    """A lost neuron, a wrong gate or a wrong q/k order shows in the logits."""
    for text in TEXTS:
        with llama_oracle.vocabulary(original) as vocabulary:
            ids = vocabulary.encode(text, parse_special=True)
        with llama_oracle.vocabulary(all_active) as vocabulary:
            assert vocabulary.encode(text, parse_special=True) == ids
        dense, ours = (llama_oracle.logits(path, ids) for path in (original, all_active))
        assert np.array_equal(dense.argmax(1), ours.argmax(1))
        assert np.linalg.norm(dense - ours) / np.linalg.norm(dense) < 3e-4


def test_twelve_experts_keep_the_perplexity(source: Source, original: Path, all_active: Path) -> None:
    """A calibration that does not belong to the weights, or a router that cannot route, costs far more."""
    windows = token_windows(source, "held out")[::72]
    dense, _ = perplexity(window_losses(original, windows))
    routed, _ = perplexity(window_losses(all_active, windows, calibration.N_ACTIVE))
    assert routed < 19.0
    assert routed < dense * DENSE_TO_12


def test_build_makes_both_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second `dsmoe demo` must be instant, and one with other experts must not serve the old model."""
    converted: list[str] = []

    def convert(folder: Path, kind: str, path: Path, options: BuildOptions) -> int:
        converted.append(kind)
        config = json.loads((folder / "config.json").read_text())
        return path.write_text(f"{kind} with {config['num_experts_per_tok']} experts")

    monkeypatch.setattr(build, "_convert", convert)
    folder = tmp_path / "demo"
    # Ctrl-C in the middle: no config.json may make half a checkpoint look whole.
    interrupted = BuildOptions()
    interrupted.stop.set()
    with pytest.raises(InterruptedRunError):
        build_demo(folder, interrupted)
    assert not (folder / "config.json").exists()
    assert build_demo(folder).is_new
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    second = build_demo(folder)
    assert not second.is_new
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    # A file that is gone, cut short or never finished is made again from the checkpoint.
    os.truncate(second.files["q4"], 3)
    assert build_demo(folder).is_new
    assert converted == ["q8", "q4", "q4"]
    third = build_demo(folder, BuildOptions(n_active=9))
    assert third.is_new
    assert third.files["q4"].read_text() == "q4 with 9 experts"


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    """--out on a folder with somebody's checkpoint must not delete its shards."""
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(b"precious")
    with pytest.raises(UsageError, match="has other files"):
        build_demo(tmp_path)
    assert shard.read_bytes() == b"precious"


@pytest.mark.parametrize("n_active", [0, 15, -1])
def test_impossible_numbers_of_experts_are_refused(tmp_path: Path, n_active: int) -> None:
    """0 aborts the process inside llama.cpp."""
    with pytest.raises(UsageError, match="active experts"):
        build_demo(tmp_path / "demo", BuildOptions(n_active=n_active))
    assert not (tmp_path / "demo").exists()
