"""The reference that benchmarks are made with: its model against the oracle, its text, its checkpoint."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import torch_deepseek
from support.checkpoints import TINY

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
    """Guards: a measurement on what the model knows by heart, if only between other quotes, line breaks, or
    as a string's literal; a text that differs from run to run.
    """
    corpus = read_corpus()
    assert read_corpus() == corpus
    learned = "\n".join(corpus.training)
    paragraphs = [part for part in corpus.held_out.split("\n\n") if len(part) > 200]
    assert len(paragraphs) > 300
    runs = [runs_of_letters(part) for part in paragraphs]
    known = np.isin(np.concatenate(runs), runs_of_letters(learned))
    ends = np.cumsum([len(each) for each in runs])
    n_known = sum(bool(part.any()) for part in np.split(known, ends[:-1]))
    # Modules copy from each other: wave is documented like aifc.
    assert n_known < 0.05 * len(paragraphs)
    literal = "\n".join(repr(f"{line}\n") for line in paragraphs[0].splitlines())
    assert np.isin(runs_of_letters(paragraphs[0]), runs_of_letters(literal)).all()
    calibration = corpus.calibration(50_000)
    assert 50_000 < len(calibration) < 60_000
    assert all(part in learned for part in calibration.split("\n\n")[:50])


RUN = 60
KEYS = np.random.default_rng(0).integers(1 << 63, size=RUN, dtype=np.uint64)


def runs_of_letters(text: str) -> NDArray[np.uint64]:
    """A hash of each so many letters in a row, whatever stands between them; escapes are no letters."""
    letters = re.sub(r"\\[nt]|[^A-Za-z]", "", text).encode()
    codes = np.frombuffer(letters, np.uint8).astype(np.uint64)
    hashes = np.zeros(max(0, len(codes) - RUN + 1), np.uint64)
    for at, key in enumerate(KEYS):
        hashes += codes[at : at + len(hashes)] * key
    return hashes


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
    # A second for each step, however busy the machine is.
    seconds = count()
    monkeypatch.setattr(train_reference, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    trained = train_reference.make_reference(folder, 1, 0)
    assert json.loads((folder / TRAINING).read_text())["n_steps"] == trained.n_steps == 59
    assert trained.held_out_loss < math.log(512) - 0.5
    convert_folder(folder, tmp_path / "reference.gguf", ConvertOptions("f32"))
    options = options_for(ModelOptions(tmp_path / "reference.gguf"), 64)
    with EngineClient.load(options) as engine:
        windows = cut_windows(engine, Text("held out", corpus.held_out), 64)
        found = measure(engine, windows)
    # llama.cpp scores second halves alone, with weights in bf16.
    assert found.perplexity.nll == pytest.approx(trained.held_out_loss, rel=0.1)
