"""Results of a Vulkan device against those of the CPU: divergence, greedy text, settings of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import llama_oracle
from support.models import MIXTURES, family_model, smollm2, tiny_model
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.engine import native
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import NO_TEMPLATE, ModelOptions, Request, SamplingParameters
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

pytestmark = pytest.mark.gpu

IDS = [0, *range(20, 58), 5, 5, 40]
TEXT = "The capital of France is Paris. It lies on the river Seine. Its best known tower was built in 1889."
TYPES = ("q4", "q4-fast", "q8", "q4_k_m", "iq4_xs", "f16")
MOST_DIVERGENCE = 1e-3  # nats per token
MOST_ERROR = 0.05  # root mean square, in standard deviations of the logits
CACHES: dict[str, dict[str, Any]] = {
    "default": {},
    "no flash attention": {"flash_attention": "off"},
    "q8_0 cache": {"flash_attention": "on", "cache_type_k": "q8_0", "cache_type_v": "q8_0"},
    "cache on the CPU": {"offload_cache": False},
}


def logits(path: Path, ids: Sequence[int], device: str | None, **more: Any) -> NDArray[np.float32]:
    """Return the logits of all positions, computed on one device; None: the CPU."""
    model = native.Model(path, n_gpu_layers=99 if device else 0, devices=[device] if device else ())
    try:
        context = native.Context(model, native.ContextOptions(256, 256, 32, 1, 1, n_outputs=256, **more))
        try:
            assert context.decode([native.Row(0, 0, ids, len(ids))]) == native.DECODED
            return context.logits().copy()
        finally:
            context.close()
    finally:
        model.close()


def divergence(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the mean KL divergence."""
    log_p, log_q = llama_oracle.log_softmax(expected), llama_oracle.log_softmax(found)
    return float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())


def check_results(path: Path, ids: Sequence[int], device: str, **more: Any) -> None:
    """Compare the device's predictions with those of the CPU."""
    expected, found = logits(path, ids, None, **more), logits(path, ids, device, **more)
    assert 0 < divergence(expected, found) < MOST_DIVERGENCE
    # The predictions of random weights are so even that their divergence is small in any case.
    assert np.sqrt(np.square(expected - found).mean()) < MOST_ERROR * expected.std()


@pytest.mark.parametrize("name", MIXTURES)
def test_architectures(name: str, vulkan: str) -> None:
    """Guards: operations of an architecture that the device computes otherwise, such as its routing."""
    check_results(family_model(name), IDS, vulkan)


@pytest.mark.parametrize("word", TYPES)
def test_types(word: str, vulkan: str, tmp_path: Path) -> None:
    """Guards: blocks of a type that the device reads otherwise, or that it cannot read."""
    source = write_tiny(tmp_path / "source.gguf", MOE, "f32")
    path = tmp_path / "typed.gguf"
    quantize_file(plan_quantization(source, resolve(word)), path)
    check_results(path, IDS, vulkan)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("architecture", ["deepseek", "deepseek2"])
def test_caches(architecture: str, name: str, vulkan: str) -> None:
    """Guards: types and layouts of the KV cache that the device does not support."""
    check_results(family_model(architecture), IDS, vulkan, **CACHES[name])


def test_trained_weights(vulkan: str) -> None:
    """Guards: errors that only show in activations as large as those of a trained model.

    The bound is wider: a CPU quantizes activations to 8 bits, llama.cpp's Vulkan backend computes in F16.
    """
    with llama_oracle.vocabulary(smollm2()) as vocabulary:
        ids = vocabulary.encode(TEXT)
    expected, found = logits(smollm2(), ids, None), logits(smollm2(), ids, vulkan)
    assert divergence(expected, found) < 0.02


def test_greedy_text(vulkan: str) -> None:
    """Guards: a reply that a CPU would not give, apart from tokens that are about as likely."""
    options = ModelOptions(tiny_model(), n_context=256, n_threads=1, chat_template=NO_TEMPLATE)
    with Engine.load(options) as engine:
        assert f"{vulkan}: " in engine.info.placement
        prompt = engine.encode(TEXT)
        request = Request("r", prompt, SamplingParameters(temperature=0), max_tokens=24)
        found = [event.token_id for event in engine.submit(request) if event.token_id is not None]
    rows = logits(tiny_model(), [*prompt, *found], None)[len(prompt) - 1 :]
    for token_id, row in zip(found, rows, strict=False):
        assert row[token_id] >= row.max() - 0.02 * row.std()
