"""Observers of the graph against plain torch: chosen experts, their probabilities, activations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import torch_deepseek
from support.checkpoints import TINY, random_weights, write_checkpoint
from support.models import tiny_model
from support.observed import Observed, observed, stacked_squares, torch_inputs
from support.tiny_gguf import DENSE, write_tiny

from dsmoe_convert.convert import convert_folder
from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.native import ABORTED, DECODED, Model, Row, tensors
from dsmoe_local.engine.observe.arrays import unpack
from dsmoe_local.engine.observe.observer import Observer
from dsmoe_local.engine.observe.registry import OBSERVERS, Entry
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import tensor_specs

IDS = [0, *range(20, 58), 5, 5, 300]
VARIANTS = {
    "tiny": TINY,
    "tied": replace(TINY, tied_embeddings=True, n_vocab=700),
    "one expert": replace(TINY, n_experts_per_token=1, n_dense_layers=0),
    "all experts, scaled": replace(TINY, n_experts_per_token=8, routed_scaling_factor=2.5),
}
TRACE = ObserverOptions("routing", (("trace", 64),))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Hyperparameters]:
    hp = VARIANTS[request.param]
    if hp is TINY:
        return tiny_model(), hp
    folder = tmp_path_factory.mktemp("observed")
    out = folder / "model.gguf"
    convert_folder(write_checkpoint(folder / "checkpoint", hp, form="single"), out)
    return out, hp


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_model()


def routers(
    hp: Hyperparameters, n_used: int | None = None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the layers with their router probabilities and choices, computed by torch."""
    inputs = torch_inputs(random_weights(hp), hp, IDS)
    for layer in range(hp.n_dense_layers, hp.n_layers):
        name = f"model.layers.{layer}.mlp.gate.weight"
        p = (inputs[name] @ random_weights(hp)[name].T).softmax(-1)
        yield layer, p, p.topk(n_used or hp.n_experts_per_token, dim=-1).indices


def read_all(model: Observed) -> None:
    """Read the prompt in one step. Every token is an output, so the last layer computes all of them."""
    model.step(Row(0, 0, IDS, len(IDS)))


def test_routing_equals_torch(variant: tuple[Path, Hyperparameters]) -> None:
    """Guards: choices read with a wrong stride (a view of the whole order), layers or experts mixed up."""
    path, hp = variant
    with observed(path, ObserverOptions("routing")) as model:
        read_all(model)
        summary = model.summary("routing")
    assert json.loads(json.dumps(summary)) == summary
    assert [layer["layer"] for layer in summary["layers"]] == list(range(hp.n_dense_layers, hp.n_layers))
    for found, (layer, p, chosen) in zip(summary["layers"], routers(hp), strict=True):
        assert found["tokens"] == len(IDS)
        assert found["experts_per_token"] == hp.n_experts_per_token
        assert found["counts"] == torch.bincount(chosen.flatten(), minlength=hp.n_routed_experts).tolist(), (
            layer
        )
        mass = torch.zeros_like(p).scatter(1, chosen, p.gather(1, chosen))
        np.testing.assert_allclose(found["expert_mass"], mass.sum(0), rtol=1e-3)
        captured = mass.sum(1)
        assert found["captured_mass"] == pytest.approx(captured.mean().item(), rel=1e-3)
        assert found["captured_mass_deviation"] == pytest.approx(captured.std(correction=0).item(), abs=1e-3)
        assert found["sampled"] == len(IDS)
        entropy = -(p * p.log()).sum(1).mean().item()
        assert found["router_entropy"] == pytest.approx(entropy, rel=1e-3)


def test_contributions_equal_torch(
    variant: tuple[Path, Hyperparameters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: the norm of the sum, or of memory that the next node has overwritten."""
    path, hp = variant
    expected: list[tuple[float, float]] = []
    mixture = torch_deepseek.mixture

    def spy(x: torch.Tensor, w: torch_deepseek.Weights, prefix: str, hp: Hyperparameters) -> torch.Tensor:
        output = mixture(x, w, prefix, hp)
        shared = torch_deepseek.swiglu(x, w, f"{prefix}shared_experts.")
        expected.append(((output - shared).norm(dim=1).mean().item(), shared.norm(dim=1).mean().item()))
        return output

    monkeypatch.setattr(torch_deepseek, "mixture", spy)
    torch_deepseek.logits(random_weights(hp), hp, IDS)
    with observed(path, ObserverOptions("routing")) as model:
        read_all(model)
        layers = model.summary("routing")["layers"]
    for found, (routed, shared) in zip(layers, expected, strict=True):
        assert found["routed_norm"] == pytest.approx(routed, rel=2e-3)
        assert found["shared_norm"] == pytest.approx(shared, rel=2e-3)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("n_ubatch", [5, 64])
def test_counts_do_not_depend_on_the_steps(tiny: Path, n_ubatch: int, unified: bool) -> None:
    """Guards: tokens lost or counted twice between ubatches, chunks, single tokens and sequences."""
    with observed(tiny, TRACE, n_ubatch=n_ubatch, unified=unified) as model:
        # Outputs everywhere, since the last layer computes nothing else.
        for start, end in ((0, 3), (3, 20), *((position, position + 1) for position in range(20, len(IDS)))):
            part = IDS[start:end]
            model.step(*(Row(sequence, start, part, len(part)) for sequence in range(4)))
        layers = model.summary("routing")["layers"]
    for found, (layer, _, chosen) in zip(layers, routers(TINY), strict=True):
        expected = 4 * torch.bincount(chosen.flatten(), minlength=TINY.n_routed_experts)
        assert found["counts"] == expected.tolist(), layer


def test_last_layer_sees_outputs_only(tiny: Path) -> None:
    """Guards: a summary that pretends to know the last layer's choices for every prompt token."""
    with observed(tiny, ObserverOptions("routing"), ObserverOptions("activations")) as model:
        model.step(Row(0, 0, IDS[:5], 0))
        assert [layer["tokens"] for layer in model.summary("routing")["layers"]] == [5, 0]
        model.step(Row(0, 5, IDS[5:], 1))
        layers = model.summary("routing")["layers"]
    assert [layer["tokens"] for layer in layers] == [len(IDS), 1]


@pytest.mark.parametrize("n_used", [1, 5, 8])
def test_active_experts_are_seen(tiny: Path, n_used: int) -> None:
    """Guards: the file's number of experts taken for the one that the model was loaded with."""
    with observed(tiny, TRACE, n_experts_per_token=n_used) as model:
        read_all(model)
        model.step(Row(0, len(IDS), [7], 1))
        summary = model.summary("routing")
    assert [layer["experts_per_token"] for layer in summary["layers"]] == [n_used, n_used]
    assert unpack(summary["trace"]["experts"]).shape == (1, TINY.n_moe_layers, n_used)
    assert sum(summary["layers"][0]["counts"]) == (len(IDS) + 1) * n_used


def test_trace_holds_the_last_reply(tiny: Path) -> None:
    """Guards: choices shown beside another token, or a reply that is mixed with the one before it."""
    with observed(tiny, ObserverOptions("routing", (("trace", 8),))) as model:
        model.step(Row(0, 0, IDS[:9], 9))
        assert model.summary("routing")["trace"] is None
        for position in range(9, 12):
            model.step(Row(0, position, [5], 1))
        model.context.forget(0, 0)
        model.step(Row(0, 0, IDS[:30], 30))
        for position in range(30, len(IDS)):
            model.step(Row(0, position, [IDS[position]], 1))
        trace = model.summary("routing")["trace"]
    last = list(range(len(IDS) - 8, len(IDS)))
    assert (trace["sequence"], trace["positions"]) == (0, last)
    assert trace["token_ids"] == [IDS[position] for position in last]
    experts, probabilities = unpack(trace["experts"]), unpack(trace["probabilities"])
    for index, (_, p, chosen) in enumerate(routers(TINY)):
        assert experts[:, index].tolist() == chosen[last].tolist()
        np.testing.assert_allclose(probabilities[:, index], p.gather(1, chosen)[last], rtol=1e-3)


def test_activations_equal_torch(variant: tuple[Path, Hyperparameters]) -> None:
    """Guards: sums under the wrong weight's name or expert, and matrices that are not observed."""
    path, hp = variant
    expected = stacked_squares(torch_inputs(random_weights(hp), hp, IDS), hp)
    with observed(path, ObserverOptions("activations"), n_ubatch=16) as model:
        read_all(model)
        summary = model.summary("activations")
    assert json.loads(json.dumps(summary)) == summary
    found = {
        name: (unpack(entry["sums"]), unpack(entry["counts"]))
        for entry in summary["inputs"]
        for name in entry["weights"]
    }
    matrices = {spec.name for spec in tensor_specs(hp) if len(spec.shape) > 1} - {"token_embd.weight"}
    assert set(found) == set(expected) == matrices | ({"token_embd.weight"} if hp.tied_embeddings else set())
    for name, (sums, counts) in expected.items():
        assert found[name][1].tolist() == counts, name
        np.testing.assert_allclose(found[name][0], sums, rtol=5e-3, atol=1e-3 * sums.max(), err_msg=name)


def test_observers_together_see_what_each_sees_alone(tiny: Path) -> None:
    """Guards: a node observed by name that hides it from an observer of its weight."""
    names = ("routing", "activations")
    alone = {}
    for name in names:
        with observed(tiny, ObserverOptions(name)) as model:
            read_all(model)
            alone[name] = model.summary(name)
    with observed(tiny, *map(ObserverOptions, names)) as model:
        read_all(model)
        assert {name: model.summary(name) for name in names} == alone


class Counting(Observer):
    """Counts the tokens of some nodes."""

    reads_graph = True
    names: tuple[bytes, ...] = (b"ffn_moe_weights-1",)

    def __init__(self, model: Model, hp: Hyperparameters) -> None:
        super().__init__()
        self.seen = dict.fromkeys(self.names, 0)
        self.nodes = {name: partial(self.count, name) for name in self.names}

    def count(self, name: bytes, tensor: int) -> None:
        self.seen[name] += tensors.size_of(tensor, 2)

    def summary(self) -> dict[str, Any]:
        return {name.decode(): count for name, count in self.seen.items()}


class CountingBoth(Counting):
    names = (b"ffn_moe_weights-1", b"ffn_moe_weights-2")


def test_observers_of_one_node_both_see_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an observer that takes a node away from another."""
    monkeypatch.setitem(OBSERVERS, "one", Entry(Counting))
    monkeypatch.setitem(OBSERVERS, "both", Entry(CountingBoth))
    with observed(tiny, ObserverOptions("one"), ObserverOptions("both"), ObserverOptions("routing")) as model:
        read_all(model)
        found = [model.summary(name) for name in ("one", "both")]
        assert model.summary("routing")["layers"][0]["tokens"] == len(IDS)
    n = len(IDS)
    assert found == [{"ffn_moe_weights-1": n}, {"ffn_moe_weights-1": n, "ffn_moe_weights-2": n}]


def test_an_aborted_step_is_not_counted(tiny: Path) -> None:
    """Guards: tokens that are computed again after an interruption counting twice."""
    with observed(tiny, ObserverOptions("routing")) as model:
        rows = [Row(0, 0, IDS, 1)]
        model.dispatcher.before_step(rows)
        model.context.abort()
        assert model.context.decode(rows) == ABORTED
        model.context.clear_abort()
        model.context.forget(0, 0)
        model.dispatcher.before_step(rows)
        model.context.decode(rows)
        # Complete, but said to have failed.
        model.context.forget(0, 0)
        read_all(model)
        assert model.summary("routing")["layers"][0]["tokens"] == len(IDS)


class Failing(Counting):
    """Fails at its node in every second step."""

    steps = 0

    def before_step(self, rows: Sequence[Row]) -> None:
        self.steps += 1

    def count(self, name: bytes, tensor: int) -> None:
        if self.steps % 2 == 0:
            raise ValueError(name.decode())


def test_a_failing_observer_fails_the_step(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an exception that ctypes prints and forgets, and a graph that stops in the middle."""
    monkeypatch.setitem(OBSERVERS, "failing", Entry(Failing))
    with observed(tiny, ObserverOptions("failing")) as model:
        other, rows = [Row(1, 0, IDS[::-1], 1)], [Row(0, 0, IDS, 1)]
        expected = model.step(*rows)
        model.dispatcher.before_step(other)
        model.context.decode(other)
        with pytest.raises(ValueError, match="ffn_moe_weights-1"):
            model.dispatcher.after_step(other, model.context.logits())
        assert not np.array_equal(model.context.logits(), expected)
        model.context.forget(1, 0)
        model.step(*other)
        model.dispatcher.before_step(rows)
        model.context.forget(0, 0)
        model.context.decode(rows)
        np.testing.assert_array_equal(model.context.logits(), expected)
        with pytest.raises(ValueError, match="ffn_moe_weights-1"):
            model.dispatcher.after_step(rows, model.context.logits())


def test_a_failure_in_an_aborted_step_is_not_the_next_ones(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: requests that fail because of another request's step."""
    monkeypatch.setitem(OBSERVERS, "failing", Entry(Failing))
    with observed(tiny, ObserverOptions("failing")) as model:
        model.step(Row(0, 0, IDS, 1))
        aborted = [Row(1, 0, IDS, 1)]
        model.dispatcher.before_step(aborted)
        # Complete, but taken for one that was aborted behind the observer's node.
        assert model.context.decode(aborted) == DECODED
        assert isinstance(model.dispatcher._failure, ValueError)
        model.context.forget(1, 0)
        model.step(Row(0, len(IDS), [5], 1))


def test_dense_models_have_activations_but_no_routing(tmp_path: Path) -> None:
    """Guards: matrices of the llama architecture that are not observed; routers of a dense model."""
    path = write_tiny(tmp_path / "dense.gguf", DENSE)
    with observed(path, ObserverOptions("activations")) as model:
        model.step(Row(0, 0, IDS[:9], 9))
        inputs = model.summary("activations")["inputs"]
    assert all(unpack(entry["counts"]).tolist() == [9] for entry in inputs)
    assert all((unpack(entry["sums"]) > 0).all() for entry in inputs)
    named = {name for entry in inputs for name in entry["weights"]}
    assert named == {spec.name for spec in tensor_specs(DENSE) if len(spec.shape) > 1}
    with pytest.raises(UsageError, match="dense"), observed(path, ObserverOptions("routing")):
        pass


def test_observing_changes_no_logits(tiny: Path) -> None:
    """Guards: a callback that splits fused nodes."""
    with observed(tiny) as plain:
        assert plain.dispatcher.eval_callback is None
        expected = plain.step(Row(0, 0, IDS, len(IDS)))
    with observed(tiny, ObserverOptions("routing"), ObserverOptions("activations")) as model:
        found = model.step(Row(0, 0, IDS, len(IDS)))
    np.testing.assert_array_equal(found, expected)
