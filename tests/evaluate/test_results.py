"""What comparisons say of each window, and that a small vocabulary leaves nothing to estimate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support import llama_oracle
from support.models import tiny_model

from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.measure import options_for
from dsmoe_local.evaluate.reference import compare, record, recorders
from dsmoe_local.evaluate.results import divergence_of
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_local.evaluate.windows import cut_windows
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

N_CONTEXT = 32
TEXT = Text("test", built_in().content[1000:2600])


def options(path: Path) -> ModelOptions:
    """As the oracle computes: an F32 cache, no flash attention. Several windows fill a step."""
    return ModelOptions(
        path, n_threads=1, n_ubatch=100, cache_type_k="f32", cache_type_v="f32", flash_attention="off"
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    return result


def test_each_window_has_its_own_divergence(tmp_path: Path) -> None:
    """Guards: windows in the order in which they end, whose figures are not theirs or do not add up; a small
    vocabulary of which the least likely tokens are left out.
    """
    path = tmp_path / "q4.gguf"
    quantize_file(plan_quantization(tiny_model(), resolve("Q4_0")), path)
    with Engine.load(
        options_for(options(tiny_model()), N_CONTEXT, *recorders(tmp_path, tiny_model()))
    ) as engine:
        reference, _ = record(engine, cut_windows(engine, TEXT, N_CONTEXT), tmp_path)
    with Engine.load(options_for(options(path), N_CONTEXT, *reference.observers(path))) as engine:
        result = compare(engine, reference)
    assert result.comparison is not None
    found = result.comparison.divergence
    expected = []
    for window in reference.windows.tokens:
        p, q = (
            log_softmax(llama_oracle.logits(each, window))[N_CONTEXT // 2 : -1]
            for each in (tiny_model(), path)
        )
        expected.append((np.exp(p) * (p - q)).sum(1).mean())
    assert len(expected) > 10
    np.testing.assert_allclose(found.windows, expected, rtol=2e-2, atol=1e-5)
    assert np.mean(found.windows) == pytest.approx(found.kl.value, rel=1e-9)
    assert found.kl_upper == pytest.approx(found.kl.value, rel=1e-6)
    assert json.loads(json.dumps(result.as_json()))["comparison"]["divergence"]["windows"] == list(
        found.windows
    )


def test_windows_come_by_number() -> None:
    """Guards: window 10 before window 2."""
    seen = dict.fromkeys(
        ("tokens", "kl", "kl_error", "kl_upper", "kl_max", "same_top", "nll_change", "nll_change_error"), 1
    )
    requests = [{"request": str(number), "tokens": 1, "kl": float(number)} for number in (10, 2, 0)]
    found = divergence_of({**seen, "kl_quantiles": {}, "requests": requests})
    assert found.windows == (0.0, 2.0, 10.0)
