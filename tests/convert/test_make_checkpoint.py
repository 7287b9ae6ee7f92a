"""The benchmark's checkpoint maker: what it writes must be convertible, or a 33 GB run ends in an error."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support import llama_oracle
from support.checkpoints import TINY
from tokenizers import Tokenizer

from dsmoe_convert.convert import ConvertOptions, convert_folder
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.presets import PRESETS, Preset

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_checkpoint.py"
HP = replace(TINY, n_vocab=102400)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with a tiny shape in place of the 16B model's."""
    spec = importlib.util.spec_from_file_location("make_checkpoint_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PRESETS", {module.PRESET: Preset(HP, 16)})
    return module


def test_made_checkpoints_convert(script: ModuleType, tmp_path: Path) -> None:
    """Weights in the wrong shard, or a tokenizer that is not recognised or splits otherwise in llama.cpp."""
    folder = tmp_path / "made"
    script.make_checkpoint(folder, layers=3)
    assert len(list(folder.glob("*.safetensors"))) == 1 + 3
    out = convert_folder(folder, tmp_path / "out.gguf", ConvertOptions("q8")).path
    file, hp = read_model(out)
    assert replace(hp, name="") == HP
    assert file.get("tokenizer.ggml.pre") == "deepseek-llm"
    assert np.isfinite(llama_oracle.logits(out, [1, 2, 3])).all()
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with llama_oracle.vocabulary(out) as vocabulary:
        for text in ("Hello world 123", "人工智能", "a\n\n b"):
            assert vocabulary.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_made_weights_look_like_weights(script: ModuleType) -> None:
    """Weights so regular that a quantizer is faster, or fails, on them."""
    pool = (script.make_pool(0).astype(np.uint32) << 16).view(np.float32)
    assert abs(float(pool.mean())) < 1e-4
    assert float(pool.std()) == pytest.approx(script.DEVIATION, rel=1e-2)
    assert len(np.unique(pool[:1000])) > 500


def test_the_shape_is_the_published_one(script: ModuleType) -> None:
    """A benchmark of another model: it has 16.4 billion weights."""
    shapes = [shape for _, _, shape, _ in script.tensors_of(PRESETS[script.PRESET].hp)]
    assert sum(map(math.prod, shapes)) == 16_375_728_128
