"""Recording and comparing router choices, against plain torch on both models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.block_files import resealed
from support.checkpoints import TINY, random_weights, write_checkpoint
from support.models import tiny_model
from support.observed import Observed, observed, torch_inputs
from support.tiny_gguf import DENSE, write_tiny

from dsmoe_convert.convert import convert_folder
from dsmoe_local.base.errors import FileError, FormatError, UsageError
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.native import Row
from dsmoe_local.engine.observe.observer import Scored
from dsmoe_local.evaluate.reference import observer_options
from dsmoe_local.evaluate.reference_files import COST_STEP, RoutingReader, costs_of, logarithms_of

IDS = [0, *range(20, 58), 5, 5, 300]
OTHER = [0, 5, *range(100, 130)]
Weights = dict[str, torch.Tensor]


def changed_weights() -> Weights:
    generator = torch.Generator().manual_seed(9)
    return {
        name: values + 0.05 * torch.randn(values.shape, generator=generator) * values.std()
        for name, values in random_weights(TINY).items()
    }


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with noise on all weights."""
    folder = tmp_path_factory.mktemp("changed")
    checkpoint = write_checkpoint(folder / "checkpoint", form="single", weights=changed_weights())
    convert_folder(checkpoint, folder / "changed.gguf")
    return folder / "changed.gguf"


def write_reference(path: Path, model: Path | None = None, **more: Any) -> None:
    with observed(model or tiny_model(), observer_options("routing_reference", path), **more) as m:
        m.score(IDS, "first", chunk=9)
        m.score(OTHER, "ünï/2", chunk=64)
        assert m.summary("routing_reference")["tokens"] == len(IDS) + len(OTHER) - 2


def compare(path: Path, model: Path | None = None, **more: Any) -> dict[str, Any]:
    options = observer_options("routing_divergence", path)
    with observed(model or tiny_model(), options, **more) as m:
        # In another order, in other chunks and ubatches.
        m.score(OTHER, "ünï/2", chunk=7)
        m.score(IDS, "first", chunk=17)
        return m.summary("routing_divergence")


def gates(weights: Weights, n_used: int = TINY.n_experts_per_token) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities of scored tokens, shape (layers, tokens, experts), and the chosen experts."""
    layers = []
    for layer in range(TINY.n_dense_layers, TINY.n_layers):
        name = f"model.layers.{layer}.mlp.gate.weight"
        parts = [torch_inputs(weights, TINY, ids)[name][:-1] for ids in (IDS, OTHER)]
        layers.append((torch.cat(parts) @ weights[name].T).double().softmax(-1))
    p = torch.stack(layers)
    return p, torch.zeros_like(p).scatter(-1, p.topk(n_used, -1).indices, 1.0).bool()


def test_divergence_equals_torch(changed: Path, tmp_path: Path) -> None:
    """Guards: choices of other tokens or layers compared, a divergence the wrong way round, a bound that is
    none.
    """
    write_reference(tmp_path / "ref")
    found = compare(tmp_path / "ref", changed, n_ubatch=5)
    assert json.loads(json.dumps(found)) == found
    (p, chosen), (q, others) = gates(random_weights(TINY)), gates(changed_weights())
    both = (chosen & others).sum(-1)
    same = both == TINY.n_experts_per_token
    assert 0 < same.sum() < same.numel()
    assert found["tokens"] == p.shape[1]
    assert found["unmatched"] == 0
    routing = found["routing"]
    assert routing["same_everywhere"] == pytest.approx(same.all(0).double().mean().item())
    exact = (p * (p / q).log()).sum(-1)
    for index, layer in enumerate(routing["layers"]):
        assert layer["layer"] == TINY.n_dense_layers + index
        assert layer["same"] == pytest.approx(same[index].double().mean().item())
        overlap = both[index].double() / TINY.n_experts_per_token
        assert layer["overlap"]["value"] == pytest.approx(overlap.mean().item())
        assert layer["overlap"]["error"] == pytest.approx(overlap.std().item() / len(overlap) ** 0.5)
        assert layer["gate_kl"]["value"] == pytest.approx(exact[index].mean().item(), rel=5e-3)
        error = exact[index].std().item() / len(overlap) ** 0.5
        assert layer["gate_kl"]["error"] == pytest.approx(error, rel=2e-2)


@given(
    *[arrays(np.float32, (4, 64), elements=st.floats(np.float32(-12).item(), 12, width=32)) for _ in range(2)]
)
def test_rounding_stays_within_its_bound(first: Any, second: Any) -> None:
    """Guards: a stated error that is smaller than the real one."""
    p, q = (np.exp(x.astype(np.float64)) for x in (first, second))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    exact = (p * np.log(p / q)).sum(-1)
    log_p, log_q = (logarithms_of(costs_of(x.astype(np.float32))) for x in (p, q))
    np.testing.assert_allclose(log_p, np.log(p), atol=1.01 * COST_STEP)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    weight = (np.exp(log_p) * np.abs(log_p - log_q)).sum(-1) + np.abs(np.exp(log_p) - np.exp(log_q)).sum(-1)
    # Logarithms of float32 are not exact either.
    assert (np.abs(kl - exact) <= np.expm1(COST_STEP) * weight + 4 * COST_STEP**2 + 1e-6).all()


def test_the_model_itself_does_not_diverge(tmp_path: Path) -> None:
    """Guards: rounding that makes a model differ from itself."""
    write_reference(tmp_path / "ref")
    with observed(tiny_model(), observer_options("routing_divergence", tmp_path / "ref")) as m:
        m.score(IDS, "first", chunk=9)
        found = m.summary("routing_divergence")
    assert (found["tokens"], found["routing"]["same_everywhere"]) == (len(IDS) - 1, 1)
    for layer in found["routing"]["layers"]:
        assert layer["overlap"] == {"value": 1, "error": 0}
        assert layer["gate_kl"]["value"] == 0
        assert layer["gate_kl_bound"] < 2e-6


def test_fewer_experts_are_a_subset(tmp_path: Path) -> None:
    """Guards: sets of different sizes taken for the same, or their overlap measured by the smaller one."""
    write_reference(tmp_path / "ref")
    found = compare(tmp_path / "ref", n_experts_per_token=1)
    first = found["routing"]["layers"][0]
    assert first["same"] == 0
    assert first["overlap"]["value"] == pytest.approx(1 / TINY.n_experts_per_token)


def test_other_text_is_unmatched(tmp_path: Path) -> None:
    """Guards: choices of one text compared with those of another."""
    write_reference(tmp_path / "ref")
    with observed(tiny_model(), observer_options("routing_divergence", tmp_path / "ref")) as m:
        m.score(OTHER[1:], "first")
        m.score(IDS, "unknown")
        found = m.summary("routing_divergence")
    assert (found["tokens"], found["unmatched"]) == (0, len(IDS) + len(OTHER) - 3)
    assert found["routing"]["layers"][0]["gate_kl"]["value"] == 0


def rows_together(m: Observed) -> None:
    rows = [Row(0, 0, IDS, len(IDS)), Row(1, 0, OTHER, 3), Row(2, 0, IDS[:7], 1)]
    scored = [Scored("first", 1, IDS[1:]), Scored("second", len(OTHER) - 2, OTHER[-2:]), None]
    m.step(*rows, scored=scored)


def test_rows_of_a_step_are_told_apart(tmp_path: Path) -> None:
    """Guards: the last layer, which sees outputs only, read as if it saw every token; other rows' choices."""
    path = tmp_path / "ref"
    with observed(tiny_model(), observer_options("routing_reference", path), n_ubatch=16) as m:
        rows_together(m)
        assert m.summary("routing_reference")["tokens"] == len(IDS) + 1
    with observed(tiny_model(), observer_options("routing_divergence", path)) as m:
        m.score(IDS, "first")
        m.score(OTHER, "second", chunk=5)
        found = m.summary("routing_divergence")
    assert (found["tokens"], found["routing"]["same_everywhere"]) == (len(IDS) - 1 + 2, 1)
    assert found["unmatched"] == len(OTHER) - 3


def test_streams_are_refused(tmp_path: Path) -> None:
    """Guards: streams, whose tokens llama.cpp computes in another order, mixed up without a word."""
    options = observer_options("routing_reference", tmp_path / "ref")
    with (
        observed(tiny_model(), options, unified=False, n_ubatch=16) as m,
        pytest.raises(NativeError, match="another order"),
    ):
        rows_together(m)


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Guards: layers of one model compared with others of another; a dense model without experts."""
    write_reference(tmp_path / "ref")
    content = (tmp_path / "ref").read_bytes()
    changed = content.replace(b'"first_layer": 1', b'"first_layer": 0')
    (tmp_path / "other").write_bytes(resealed(changed))
    option = observer_options("routing_divergence", tmp_path / "other")
    with pytest.raises(UsageError, match="layers 0 to 1"), observed(tiny_model(), option):
        pass
    dense = write_tiny(tmp_path / "dense.gguf", DENSE)
    for name in ("routing_divergence", "routing_reference"):
        option = observer_options(name, tmp_path / "new")
        with pytest.raises(UsageError, match="dense"), observed(dense, option):
            pass
    assert not (tmp_path / ".new.part").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Guards: half a file compared with, and a file of predictions taken for one of choices."""
    path = tmp_path / "ref"
    write_reference(path)
    content = path.read_bytes()
    for damaged in (content[:-3], b"DSMOEREF" + content[8:], content[:200] + b"\x00" + content[201:], b""):
        path.write_bytes(damaged)
        with pytest.raises((FileError, FormatError)):
            RoutingReader(path)
