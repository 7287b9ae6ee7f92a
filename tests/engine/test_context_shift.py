"""Context shift for every architecture: keys at new positions are those of the tokens that are left.

In a model of one layer, keys and values of a token do not depend on earlier ones. After tokens are dropped
and the others moved, logits must therefore be those of the remaining tokens read anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny_gguf import FAMILY, write_tiny

from dsmoe_local.engine import native
from dsmoe_local.model.hyperparameters import RopeScaling

YARN = RopeScaling("yarn", 4.0, 64)
MODELS = {
    **{name: hp for name, hp in FAMILY.items() if hp.is_moe},
    "qwen3moe, YaRN": replace(FAMILY["qwen3moe"], rope_scaling=YARN),
    "deepseek2, YaRN": replace(FAMILY["deepseek2"], rope_scaling=replace(YARN, mscale_all_dim=0.707)),
}
N_KEPT, N_DROPPED = 4, 9


@pytest.mark.parametrize("name", MODELS)
def test_a_shifted_cache_is_that_of_the_rest(name: str, tmp_path: Path) -> None:
    """Guards: a part of the key that must not be rotated; rotation in another order of values."""
    hp = replace(MODELS[name], n_layers=1, n_dense_layers=0)
    model = native.Model(write_tiny(tmp_path / "one.gguf", hp, "f32"))
    ids = list(range(3, 43))
    rest = ids[:N_KEPT] + ids[N_KEPT + N_DROPPED :]
    options = native.ContextOptions(
        128, 64, 64, 1, 1, "off", cache_type_k="f32", cache_type_v="f32", n_sequences=2, n_outputs=2
    )
    context = native.Context(model, options)
    try:
        assert context.can_shift
        context.decode([native.Row(0, 0, ids[:-1], 0)])
        context.forget(0, N_KEPT, N_KEPT + N_DROPPED)
        context.shift(0, N_KEPT + N_DROPPED, N_DROPPED)
        context.decode([native.Row(0, len(rest) - 1, rest[-1:], 1)])
        shifted = context.logits().copy()
        context.decode([native.Row(1, 0, rest, 1)])
        expected = context.logits()
        assert np.abs(shifted - expected).max() < 1e-4 * expected.std()
    finally:
        context.close()
        model.close()
