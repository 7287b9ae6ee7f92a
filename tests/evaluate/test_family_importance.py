"""From importance matrix to quantized model that runs, for other architectures than the first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import llama_oracle
from support.family import MEMBERS, tiny_model, write_member
from support.mix_models import MIX_MODELS
from support.tiny_gguf import write_tiny

from dsmoe_convert.convert import convert_folder
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.importance import ACTIVATIONS, collect, importance_file
from dsmoe_local.evaluate.importance_coverage import coverage_of
from dsmoe_local.evaluate.measure import options_for
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_local.evaluate.windows import cut_windows
from dsmoe_quantize.imatrix_file import read_imatrix
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

TEXT = Text("a text", built_in().content[1000:1400])
N_CONTEXT = 64


@pytest.mark.parametrize("name", ["deepseek3 groups", "qwen2moe"])
def test_a_collected_matrix_covers_every_matrix(name: str, tmp_path: Path) -> None:
    """Biases that are waited for in vain; tokens that are not counted; a tensor without importance."""
    folder = write_member(tmp_path / "model", MEMBERS[name], tiny_model(MEMBERS[name]))
    model = convert_folder(folder, tmp_path / "model.gguf").path
    options = options_for(ModelOptions(model, n_threads=1), N_CONTEXT, ACTIVATIONS)
    with Engine.load(options) as engine, importance_file(tmp_path / "i.gguf") as out:
        windows = cut_windows(engine, TEXT, N_CONTEXT)
        collect(engine, windows, out, with_output=True)
    imatrix = read_imatrix(tmp_path / "i.gguf")
    assert coverage_of(imatrix).n_tokens == N_CONTEXT * len(windows.tokens)
    plan = plan_quantization(model, resolve("q4"), imatrix=imatrix)
    assert plan.used_imatrix is imatrix
    embedding = "the importance matrix has nothing about token_embd.weight"
    assert [note for note in plan.notes if "nothing about" in note] in ([], [embedding])


@pytest.mark.parametrize("name", MIX_MODELS)
def test_quantized_models_compute_nearly_the_same(name: str, tmp_path: Path) -> None:
    """A type that llama.cpp's kernels do not take for some tensor; heads that are stored in another order."""
    source = write_tiny(tmp_path / "source.gguf", MIX_MODELS[name], "f32")
    ids = [*range(2, 42)]
    expected = llama_oracle.logits(source, ids)
    for word, tolerance in (("q8", 0.1), ("q4", 0.5)):
        out = tmp_path / f"{word}.gguf"
        quantize_file(plan_quantization(source, resolve(word)), out)
        difference = llama_oracle.logits(out, ids) - expected
        assert np.sqrt(np.square(difference).mean()) < tolerance * expected.std(), word
