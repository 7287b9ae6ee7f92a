"""The reference that benchmarks are made with: its model against the oracle, its text, its checkpoint."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support import llama_oracle, torch_deepseek
from support.checkpoints import TINY, write_checkpoint

from benchmarks import train_reference
from benchmarks.support.reference_model import Mixture, ReferenceModel
from benchmarks.support.reference_shape import HP, TRAINING
from benchmarks.support.reference_text import Corpus, read_corpus
from dsmoe_convert.convert import ConvertOptions, convert_folder
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.measure import measure, options_for
from dsmoe_local.evaluate.text import Text
from dsmoe_local.evaluate.windows import cut_windows

IDS = torch.randint(0, TINY.n_vocab, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> ReferenceModel:
    """With weights large enough for attention and experts to matter."""
    torch.manual_seed(0)
    model = ReferenceModel(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.dim() == 1 else 0, 0.15)
    return model


def test_logits_are_the_oracles(model: ReferenceModel) -> None:
    """Guards: a model that is trained to be something else than what llama.cpp computes."""
    expected = torch.stack([torch_deepseek.logits(model.state_dict(), TINY, ids.tolist()) for ids in IDS])
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model(IDS)
    assert float(((rounded - expected).std() / expected.std()).detach()) < 0.1


def test_latent_attention_is_that_of_llama_cpp(tmp_path: Path) -> None:
    """A model with MLA that is trained to be something else than what llama.cpp computes."""
    hp = replace(
        TINY, architecture="deepseek2", head_dim=24, value_dim=12, rotary_dim=8, query_rank=24, kv_rank=32
    )
    torch.manual_seed(0)
    model = ReferenceModel(hp)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.dim() == 1 else 0, 0.15)
    folder = write_checkpoint(tmp_path / "model", hp, weights=model.state_dict())
    found = llama_oracle.logits(convert_folder(folder, tmp_path / "out.gguf").path, IDS[0].tolist())
    expected = model(IDS[:1])[0].detach().numpy()
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


def test_balance_is_the_papers(model: ReferenceModel) -> None:
    """Guards: experts that are not kept in balance: equations 12 to 14, token by token."""
    mixture = Mixture(TINY)
    tokens = torch.randn(1, 30, TINY.hidden_size)
    mixture(tokens)
    scores = (tokens[0] @ mixture.gate.weight.T).softmax(-1).detach()
    n, k = TINY.n_routed_experts, TINY.n_experts_per_token
    expected = 0.0
    for expert in range(n):
        chosen = sum(expert in scores[token].topk(k).indices for token in range(30))
        expected += n / (k * 30) * chosen * float(scores[:, expert].mean())
    assert float(mixture.balance.detach()) == pytest.approx(expected, rel=1e-5)
    model(IDS)
    torch.autograd.backward(model.balance())
    gates = [part.gate.weight.grad for part in model.modules() if isinstance(part, Mixture)]
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in gates)


def test_what_is_held_out_is_not_learned() -> None:
    """Guards: a measurement on what the model knows by heart."""
    corpus = read_corpus()
    learned = letters("\n".join(corpus.training))
    paragraphs = [part for part in corpus.held_out.split("\n\n") if len(part) > 200]
    assert len(paragraphs) > 300
    known = [part for part in paragraphs[::3] if letters(part)[40:100] in learned]
    # Modules copy from each other: wave is documented like aifc.
    assert len(known) < 0.05 * len(paragraphs[::3])
    assert 50_000 < len(corpus.calibration(50_000)) < 60_000


def letters(text: str) -> str:
    """A text without what quotes, line breaks or escapes change."""
    return re.sub(r"\\[nt]|[^A-Za-z]", "", text)


def test_batches_are_all_of_the_text_in_another_order() -> None:
    """Guards: an epoch that repeats or misses windows, labels that are not the next tokens."""
    length = HP.n_context
    ids = np.arange(40 * length, dtype=np.int64)
    one, two = (torch.cat(list(islice(train_reference.batches(ids, seed), 9))) for seed in (3, 3))
    assert torch.equal(one, two)
    assert one.shape[1] == length + 1
    assert torch.equal(one[:, 1:], one[:, :-1] + 1)
    starts = one[:36, 0].tolist()
    assert len(set(starts)) == 36
    assert starts != sorted(starts)
    other = torch.cat(list(islice(train_reference.batches(ids, 4), 9)))
    assert not torch.equal(one, other)


def test_trained_converted_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: training that does not learn, a checkpoint that is not what was trained, another tokenizer."""
    text = Path(torch_deepseek.__file__).read_text(encoding="utf-8")
    corpus = Corpus((text * 12,), text * 2)
    monkeypatch.setattr(train_reference, "read_corpus", lambda: corpus)
    monkeypatch.setattr(train_reference, "HP", replace(TINY, n_vocab=512, n_context=64))
    folder = tmp_path / "reference"
    trained = train_reference.make_reference(folder, 59, 0)
    assert json.loads((folder / TRAINING).read_text())["n_steps"] == trained.n_steps == 59
    assert trained.held_out_loss < math.log(512) - 0.5
    convert_folder(folder, tmp_path / "reference.gguf", ConvertOptions("f32"))
    options = options_for(ModelOptions(tmp_path / "reference.gguf"), 64)
    with EngineClient.load(options) as engine:
        windows = cut_windows(engine, Text("held out", corpus.held_out), 64)
        found = measure(engine, windows)
    # llama.cpp scores second halves alone, with weights in bf16.
    assert found.perplexity.nll == pytest.approx(trained.held_out_loss, rel=0.1)
