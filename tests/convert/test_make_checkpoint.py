"""The benchmark's checkpoint maker: what it writes must be convertible, or a 33 GB run ends in an error."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import llama_oracle
from support.checkpoints import TINY
from tokenizers import Tokenizer

from benchmarks import make_checkpoint
from dsmoe_convert.convert import ConvertOptions, convert_folder
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.presets import PRESETS, Preset

HP = replace(TINY, n_vocab=102400)


def test_made_checkpoints_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in the wrong shard, or a tokenizer that is not recognised or splits otherwise in llama.cpp."""
    monkeypatch.setattr(make_checkpoint, "PRESETS", {make_checkpoint.PRESET: Preset(HP, 16)})
    folder = tmp_path / "made"
    make_checkpoint.make_checkpoint(folder, layers=3)
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


def test_made_weights_look_like_weights() -> None:
    """Weights so regular that a quantizer is faster, or fails, on them."""
    pool = make_checkpoint.to_f32(make_checkpoint.make_pool(0))
    assert abs(float(pool.mean())) < 1e-4
    assert float(pool.std()) == pytest.approx(make_checkpoint.DEVIATION, rel=1e-2)
    assert len(np.unique(pool[:1000])) > 500


def test_the_shape_is_the_published_one() -> None:
    """A benchmark of another model: it has 16.4 billion weights."""
    tensors = make_checkpoint.tensors_of(PRESETS[make_checkpoint.PRESET].hp)
    assert sum(math.prod(shape) for _, _, shape, _ in tensors) == 16_375_728_128
