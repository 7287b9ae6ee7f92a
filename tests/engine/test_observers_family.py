"""Routing of every architecture: the observers against the routers of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import torch_bailing
from support.checkpoints import random_weights
from support.family import MEMBERS, Routing, routing, tiny_model, write_member
from support.models import family_hyperparameters, family_model
from support.observed import observed

from dsmoe_convert.convert import convert_folder
from dsmoe_local.engine.native import Row
from dsmoe_local.engine.observe.arrays import unpack
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.evaluate.reference import observer_options
from dsmoe_local.evaluate.reference_files import RoutingReader, logarithms_of

IDS = [0, *range(20, 48), 5, 5, 300]
LING = "bailingmoe2"
NAMES = [name for name in MEMBERS if "YaRN" not in name and "tied" not in name]


@cache
def member(name: str, folder: Path) -> tuple[Path, Mapping[int, Routing]]:
    """The converted model of a class of transformers, and what its routers compute."""
    model = tiny_model(MEMBERS[name])
    checkpoint = write_member(folder / name, MEMBERS[name], model)
    return convert_folder(checkpoint, folder / f"{name}.gguf").path, routing(model, IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("family")


@pytest.mark.parametrize("name", NAMES)
def test_experts_of_every_token_are_those_of_transformers(name: str, folder: Path) -> None:
    """A bias that changes probabilities, not only the choice; groups; layers or tokens mixed up."""
    path, expected = member(name, folder)
    with observed(path, ObserverOptions("routing", (("trace", len(IDS)),))) as model:
        for position, token in enumerate(IDS):
            model.step(Row(0, position, [token], 1))
        summary = model.summary("routing")
    assert [layer["layer"] for layer in summary["layers"]] == list(expected)
    experts, probabilities = (unpack(summary["trace"][key]) for key in ("experts", "probabilities"))
    for index, layer in enumerate(expected.values()):
        for token, chosen in enumerate(layer.chosen.tolist()):
            assert set(experts[token, index].tolist()) == set(chosen)
        found = layer.probabilities.gather(1, torch.from_numpy(experts[:, index].astype(np.int64)))
        np.testing.assert_allclose(probabilities[:, index], found, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_every_layer_are_those_of_transformers(name: str, folder: Path) -> None:
    """Norms without weights, scale or shared gate; an entropy of sigmoids that do not sum up to 1."""
    path, expected = member(name, folder)
    with observed(path, ObserverOptions("routing")) as model:
        model.step(Row(0, 0, IDS, len(IDS)))
        layers = model.summary("routing")["layers"]
    for found, layer in zip(layers, expected.values(), strict=True):
        mass = layer.probabilities.gather(1, layer.chosen).sum(1)
        p = layer.probabilities / layer.probabilities.sum(1, keepdim=True)
        assert found["captured_mass"] == pytest.approx(mass.mean().item(), rel=1e-3)
        assert found["router_entropy"] == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-3)
        assert found["routed_norm"] == pytest.approx(mean_norm(layer.routed), rel=2e-3)
        assert found["shared_norm"] == pytest.approx(mean_norm(layer.shared), rel=2e-3)
        gate = None if layer.gate is None else pytest.approx(layer.gate.mean().item(), rel=1e-3)
        assert found.get("shared_gate") == gate


def mean_norm(output: torch.Tensor | None) -> float:
    return 0.0 if output is None else output.norm(dim=1).mean().item()


@pytest.mark.parametrize("name", NAMES)
def test_recorded_choices_are_those_of_transformers(name: str, folder: Path, tmp_path: Path) -> None:
    """The record that `dsmoe eval` compares with: biased probabilities, or masked ones."""
    path, expected = member(name, folder)
    with observed(path, observer_options("routing_reference", tmp_path / "ref")) as model:
        model.score(IDS, chunk=9)
        model.summary("routing_reference")
    reader = RoutingReader(tmp_path / "ref")
    for token in range(len(IDS) - 1):
        found = reader.find("r", token)
        assert found is not None
        for index, layer in enumerate(expected.values()):
            assert set(found.experts[index].tolist()) == set(layer.chosen[token].tolist())
            p = layer.probabilities[token] / layer.probabilities[token].sum()
            np.testing.assert_allclose(logarithms_of(found.costs[index]), p.log(), atol=2e-3)
    reader.close()


def test_experts_of_ling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the architecture that transformers does not have: against plain torch."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    choose = torch_bailing.choice

    def spy(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(choose(*arguments))
        return seen[-1]

    monkeypatch.setattr(torch_bailing, "choice", spy)
    hp = family_hyperparameters(LING)
    torch_bailing.logits(random_weights(hp), hp, IDS)
    with observed(family_model(LING), ObserverOptions("routing")) as model:
        model.step(Row(0, 0, IDS, len(IDS)))
        layers = model.summary("routing")["layers"]
    for found, (p, chosen) in zip(layers, seen, strict=True):
        assert found["counts"] == torch.bincount(chosen.flatten(), minlength=hp.n_routed_experts).tolist()
        assert found["captured_mass"] == pytest.approx(p.gather(1, chosen).sum(1).mean().item(), rel=1e-3)
