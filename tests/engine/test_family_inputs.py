"""The inputs of all matrices, observed in llama.cpp's graph, against the classes of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.family import MEMBERS, tiny_model, write_member
from support.family_inputs import squares
from support.observed import observed

from dsmoe_convert.convert import convert_folder
from dsmoe_local.engine.native import Row
from dsmoe_local.engine.observe.arrays import unpack
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.evaluate.importance import statistics_of
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.imatrix import Imatrix

IDS = [0, *range(20, 70), 5, 5, 300]
NAMES = ("deepseek2 lite", "deepseek3 groups", "glm4 lite", "qwen2moe", "qwen3moe", "glm4moe", "olmoe")


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_those_of_transformers(name: str, unified: bool, tmp_path: Path) -> None:
    """Matrices that are said to have the same input and have not; heads of MLA mixed up; a matrix left out.

    Without a unified KV cache, attention has one dimension more.
    """
    model = tiny_model(MEMBERS[name])
    out = convert_folder(write_member(tmp_path / "model", MEMBERS[name], model), tmp_path / "out.gguf").path
    _, hp = read_model(out)
    with observed(out, ObserverOptions("activations"), n_ubatch=128, unified=unified) as engine:
        engine.step(*(Row(sequence, 0, IDS, len(IDS)) for sequence in range(2)))
        summary = engine.summary("activations")
    expected = squares(model, hp, IDS)
    found = {
        name: (unpack(entry["sums"]), unpack(entry["counts"]))
        for entry in summary["inputs"]
        for name in entry["weights"]
    }
    vectors = {name for name in found if name.endswith("ffn_gate_inp_shexp.weight")}
    assert set(found) - vectors == set(expected) - {"token_embd.weight"}
    for tensor in found:
        sums, counts = expected[tensor.replace("inp_shexp", "inp")]
        assert found[tensor][1].tolist() == [2 * count for count in counts], tensor
        np.testing.assert_allclose(
            found[tensor][0], 2 * sums, rtol=5e-3, atol=1e-3 * sums.max(), err_msg=tensor
        )
    imatrix = Imatrix(statistics_of(summary, with_output=True), (), 1, 2 * len(IDS))
    file, _ = read_model(out)
    for tensor in found:
        importance = imatrix.importance(tensor, file.tensors[tensor].shape)
        assert importance is not None
        assert importance.shape == found[tensor][0].shape
