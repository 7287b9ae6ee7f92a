"""Trials of a model's groups: their tensors, types and relative errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.imatrices import random_imatrix
from support.tiny_gguf import MOE, MOE_KINDS, NARROW, ODD, write_tiny

from dsmoe_local.base.progress import Event, Note
from dsmoe_local.evaluate.error_cost_groups import Trial, cost_of, trials_of
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_quantize.budget.sensitivity import Probe, Probes, measure
from dsmoe_quantize.budget.sensitivity_file import start
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

Q4_0, Q4_K, Q5_0, Q8_0 = GgmlType.Q4_0, GgmlType.Q4_K, GgmlType.Q5_0, GgmlType.Q8_0


def trials(path: Path, types: Sequence[GgmlType], *, by_layer: bool = False) -> dict[str, Trial]:
    file, hp = read_model(path)
    known = measure(file, start(file, None, 4096))
    return {each.group: each for each in trials_of(file, hp, known, types, by_layer=by_layer)}


def changed(trial: Trial, kind: GgmlType) -> set[str]:
    return {choice.name for choice in trial.plans[kind].choices if choice.changes}


def test_a_tied_embedding_is_the_output(tmp_path: Path) -> None:
    """Guards: an embedding that is tried twice, or never; a cost whose name no recipe has."""
    found = trials(write_tiny(tmp_path / "m.gguf", NARROW), (Q4_0,))
    assert list(found) == [kind for kind in MOE_KINDS if kind != "embedding"]
    assert changed(found["output"], Q4_0) == {"token_embd.weight"}
    assert found["output"].errors[Q4_0] > 0
    two = trials(write_tiny(tmp_path / "two.gguf", replace(NARROW, tied_embeddings=False)), (Q4_0,))
    assert list(two) == list(MOE_KINDS)
    assert changed(two["output"], Q4_0) == {"output.weight"}


def test_what_stands_in_is_told(tmp_path: Path) -> None:
    """Guards: the cost of Q5_0 under the name of Q4_K, without a word."""
    found = trials(write_tiny(tmp_path / "m.gguf", NARROW), (Q4_K, Q4_0))
    assert all(each.used == {Q4_K: (Q5_0,), Q4_0: (Q4_0,)} for each in found.values())
    assert all(each.errors[Q4_K] < each.errors[Q4_0] / 2 for each in found.values())
    notes: list[Event] = []
    plan = found["shared-down"].plans[Q4_K]
    quantize_file(plan, tmp_path / "out.gguf", listen=notes.append)
    told = [each.text for each in notes if isinstance(each, Note)]
    assert told == ["96 columns are not a multiple of 256, which Q4_K needs; 1 tensor in Q5_0 instead"]
    mixed = trials(write_tiny(tmp_path / "moe.gguf", replace(MOE, n_layers=2)), (Q4_K,))
    assert mixed["attention-value"].used == {Q4_K: (Q4_K,)}
    assert mixed["routed-down"].used == {Q4_K: (Q5_0,)}


@pytest.mark.parametrize("kind", [Q4_0, Q4_K])
def test_a_width_that_takes_no_block(tmp_path: Path, kind: GgmlType) -> None:
    """Guards: a crash; advice to try other types where none can fit."""
    found = trials(write_tiny(tmp_path / "m.gguf", ODD), (kind,))
    down = found.pop("routed-down")
    assert (down.plans, down.used, down.fits) == ({}, {}, False)
    probes = Probes("t", "d", 16, 1, (kind,), 0.0)
    result = cost_of(down, probes)
    assert (result.cost, result.fits) == (None, False)
    assert all(each.fits for name, each in found.items() if not name.endswith("-down"))


def test_a_type_that_the_tensors_have_already(tmp_path: Path) -> None:
    """Guards: "does not fit" said of a type that the file is in; a file that is made for nothing."""
    source = write_tiny(tmp_path / "m.gguf", NARROW)
    quantize_file(plan_quantization(source, resolve("Q8_0")), tmp_path / "q8.gguf")
    found = trials(tmp_path / "q8.gguf", (Q8_0,))
    assert all((each.plans, each.fits) == ({}, True) for each in found.values())


def layers(hp: Hyperparameters, kind: str) -> list[int]:
    if kind.startswith("dense"):
        return list(range(hp.n_dense_layers))
    first = 0 if kind.startswith("attention") else hp.n_dense_layers
    return list(range(first, hp.n_layers))


def test_each_layer_by_itself(tmp_path: Path) -> None:
    """Guards: a layer left out or tried with its neighbours; built-in costs that do not add up."""
    hp = replace(MOE, n_layers=4)
    path = write_tiny(tmp_path / "m.gguf", hp)
    whole, found = trials(path, (Q4_0,)), trials(path, (Q4_0,), by_layer=True)
    expected = [
        f"{kind}.{layer}" if kind not in ("embedding", "output") else kind
        for kind in MOE_KINDS
        for layer in (layers(hp, kind) if kind not in ("embedding", "output") else [0])
    ]
    assert list(found) == expected
    for kind, trial in whole.items():
        parts = [each for name, each in found.items() if name.partition(".")[0] == kind]
        assert set.union(*(changed(each, Q4_0) for each in parts)) == changed(trial, Q4_0)
        assert sum(each.built_in for each in parts) == pytest.approx(trial.built_in)
        errors = [each.errors[Q4_0] for each in parts]
        assert trial.errors[Q4_0] == pytest.approx(sum(errors) / len(errors))


def test_the_matrix_is_the_plans(tmp_path: Path) -> None:
    """Guards: files made without the importance matrix whose errors they are said to have."""
    hp = replace(MOE, n_layers=2)
    file, model = read_model(write_tiny(tmp_path / "m.gguf", hp))
    imatrix = random_imatrix(hp)
    known = measure(file, start(file, imatrix, 4096), imatrix)
    found = trials_of(file, model, known, (Q4_0,), imatrix)
    assert all(each.plans[Q4_0].imatrix is imatrix for each in found)


def test_costs_keep_what_was_used() -> None:
    """Guards: a result that does not say what stood in for a type."""
    trial = Trial("output", {}, {}, {Q4_K: (Q5_0,)}, fits=True, built_in=9.0)
    probes = Probes("t", "d", 16, 1, (Q4_K,), 0.0, {"output": {Q4_K: Probe(0.01, 0.02, 0.001)}})
    assert cost_of(trial, probes).used == {Q4_K: (Q5_0,)}
