"""Targets and the file that keeps what was measured for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.imatrices import random_imatrix
from support.tiny_gguf import MOE, MOE_KINDS, write_tiny

from dsmoe_local.base.durable import locked
from dsmoe_local.base.errors import FileError, LockedError, UsageError
from dsmoe_local.base.progress import Event, Listener, Note, ignore
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.budget.cost_model import Budget
from dsmoe_quantize.budget.sensitivity_file import read_sensitivity, write_sensitivity
from dsmoe_quantize.budget.target import Request, Target, solve_target
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Overrides


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny-BF16.gguf", replace(MOE, n_layers=2))


def solved(
    source: Path, kept: Path | None, imatrix: Imatrix | None = None, listen: Listener = ignore
) -> Target:
    file, hp = read_model(source)
    request = Request(Budget(bits_per_weight=6), "x", kept, 4096)
    return solve_target(file, hp, request, Overrides(), imatrix, listen=listen)


def test_the_file_is_locked_while_something_is_missing(source: Path, tmp_path: Path) -> None:
    """Guards: hours of `dsmoe eval --sensitivity` written over with what was read before; a target that has
    to wait for them though it only reads.
    """
    kept = tmp_path / "kept.json"
    with locked(kept), pytest.raises(LockedError, match="--sensitivity"):
        solved(source, kept)
    assert not kept.exists()
    first = solved(source, kept)
    with locked(kept):
        assert solved(source, kept).solved.picks == first.solved.picks
    whole = read_sensitivity(kept)
    write_sensitivity(replace(whole, tensors=dict(list(whole.tensors.items())[3:])), kept)
    with locked(kept), pytest.raises(LockedError):
        solved(source, kept)
    assert solved(source, kept).sensitivity == whole
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    with pytest.raises(FileError, match="cannot lock the sensitivity file"):
        solved(source, tmp_path / "no" / "kept.json")


def test_the_recipe_says_which_costs_were_measured(source: Path, tmp_path: Path) -> None:
    """Guards: "measured" said of costs that are another model's for the most part."""
    kept = tmp_path / "kept.json"
    assert solved(source, kept).solved.recipe.about["error_weights"] == "built in"
    found = json.loads(kept.read_text())
    for weights, words in (
        ({"output": 1.0, "embedding": 0.5}, "measured for 2 of 11 kinds"),
        (dict.fromkeys(MOE_KINDS, 1.0), "measured"),
    ):
        kept.write_text(json.dumps({**found, "weights": weights}))
        assert solved(source, kept).solved.recipe.about["error_weights"] == words


def test_costs_hold_for_another_matrix(source: Path, tmp_path: Path) -> None:
    """Guards: hours of `dsmoe eval --sensitivity` refused since there is a matrix now; errors without a
    matrix taken for those with one; a file that is written over; costs that stay in the cache for all.
    """
    kept = tmp_path / "kept.json"
    without = solved(source, kept)
    weights = dict.fromkeys(MOE_KINDS, 1.0) | {"routed-down": 100.0}
    write_sensitivity(replace(without.sensitivity, weights=weights), kept)
    before = kept.read_bytes()
    matrix = random_imatrix(read_model(source)[1])
    notes: list[Event] = []
    found = solved(source, kept, matrix, notes.append)
    assert kept.read_bytes() == before
    assert found.sensitivity.weights == weights
    assert found.solved.recipe.about["error_weights"] == "measured"
    plain = solved(source, None, matrix)
    assert found.sensitivity.tensors == plain.sensitivity.tensors != without.sensitivity.tensors
    assert plain.sensitivity.weights == {}
    told = [event.text for event in notes if isinstance(event, Note)]
    assert told == [
        f"only the costs of errors are taken from {kept}: it was measured without an importance matrix"
    ]
    # Without costs there is nothing to take.
    write_sensitivity(without.sensitivity, kept)
    with pytest.raises(UsageError, match="no importance matrix"):
        solved(source, kept, matrix)
    write_sensitivity(replace(without.sensitivity, weights=weights, source="another"), kept)
    with pytest.raises(UsageError, match="another model"):
        solved(source, kept, matrix)
