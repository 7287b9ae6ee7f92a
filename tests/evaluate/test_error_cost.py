"""Measured costs of errors against llama.cpp and torch with the same weights; interruptions; noise."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import llama_oracle, torch_deepseek
from support.checkpoints import TINY
from support.imatrices import random_imatrix
from support.models import tiny_model

from dsmoe_local.base.errors import InterruptedRunError, LockedError, UsageError
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.base.progress import Event, Listener, Note, Started, ignore
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import ModelOptions, ObserverOptions
from dsmoe_local.evaluate.error_cost import CostOptions, ErrorCosts, measure_costs
from dsmoe_local.evaluate.error_cost_groups import Trial, cost_of
from dsmoe_local.evaluate.measure import options_for
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_local.evaluate.windows import cut_windows
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.layout import tensor_specs
from dsmoe_quantize.budget.cost_model import CostModel
from dsmoe_quantize.budget.error_weights import WEIGHTS
from dsmoe_quantize.budget.sensitivity import Probe, Probes
from dsmoe_quantize.budget.sensitivity_file import read_sensitivity
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Overrides, TensorChoice
from dsmoe_quantize.policy.recipes import group_of
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

N_CONTEXT = 48
TEXT = Text("test", built_in().content[1000:1600])
Q4_0, Q5_0 = GgmlType.Q4_0, GgmlType.Q5_0
SHARED = ("embedding", "output")
"""Groups that do not belong to a layer."""

Weights = Mapping[str, NDArray[np.float32]]
Window = tuple[int, ...]


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model()


def weights_of(path: Path) -> Weights:
    """Return the weights, decoded by the gguf package."""
    raw = np.fromfile(path, np.uint8)
    found = {}
    for name, tensor in read_gguf(path).tensors.items():
        data = raw[tensor.offset : tensor.offset + tensor.n_bytes]
        rows = data.reshape(*tensor.shape[:-1], -1)
        found[name] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.type))
    return found


@dataclass
class Loading:
    """Loads models to compute as the oracles do, and keeps the weights of each, and llama.cpp's predictions
    for `windows` with them. Stops after `stop_after` models.
    """

    stop_after: int = 10**9
    windows: Sequence[Window] = ()
    models: list[Weights] = field(default_factory=list)
    predictions: list[torch.Tensor] = field(default_factory=list)

    def __call__(
        self, path: Path, n_context: int, observers: tuple[ObserverOptions, ...], listen: Any, stop: Any
    ) -> Engine:
        if len(self.models) == self.stop_after:
            stop.set()
        self.models.append(weights_of(path))
        if self.windows:
            logits = [torch.from_numpy(llama_oracle.logits(path, window)) for window in self.windows]
            self.predictions.append(scored(logits))
        exact = ModelOptions(
            path,
            n_threads=1,
            cache_type_k="f32",
            cache_type_v="f32",
            flash_attention="off",
            n_ubatch=n_context,
        )
        return Engine.load(options_for(exact, n_context, *observers), listen)


def scored(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the log-probabilities of all scored tokens."""
    return torch.cat([each[N_CONTEXT // 2 : -1].double().log_softmax(-1) for each in logits])


def by_torch(tensors: Weights, windows: Sequence[Window]) -> torch.Tensor:
    weights: dict[str, torch.Tensor] = {}
    for spec in tensor_specs(TINY):
        found = torch.from_numpy(tensors[spec.name])
        parts = [found] if len(spec.sources) == 1 else list(found)
        weights |= dict(zip(spec.sources, parts, strict=True))
    return scored([torch_deepseek.logits(weights, TINY, list(window)) for window in windows])


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def costs(
    model: Path,
    kept_in: Path,
    loading: Loading | None = None,
    imatrix: Imatrix | None = None,
    listen: Listener = ignore,
    **more: Any,
) -> tuple[ErrorCosts, Loading]:
    file, hp = read_model(model)
    loading = loading or Loading()
    request = replace(CostOptions(kept_in, TEXT, N_CONTEXT, None, (Q4_0,), threads=1), **more)
    found = measure_costs(file, hp, request, loading, imatrix, listen=listen, stop=threading.Event())
    return found, loading


def windows_of(model: Path) -> Sequence[Window]:
    with Engine.load(options_for(ModelOptions(model), N_CONTEXT)) as engine:
        return cut_windows(engine, TEXT, N_CONTEXT).tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """All kinds measured, then all layers in the same file. `kinds_file` is its content after the kinds."""

    path: Path
    kinds_file: str
    kinds: ErrorCosts
    of_kinds: Loading
    layers: ErrorCosts
    of_layers: Loading


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("measured")
    path, windows = folder / "costs.json", windows_of(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        kinds, of_kinds = costs(model, path, Loading(windows=windows))
        content = path.read_text()
        layers, of_layers = costs(model, path, Loading(windows=windows), by_layer=True)
    return Measured(path, content, kinds, of_kinds, layers, of_layers)


@pytest.mark.parametrize("by_layer", [False, True], ids=["by kind", "by layer"])
def test_costs_are_the_oracles(model: Path, measured: Measured, by_layer: bool) -> None:
    """Guards: another group quantized too, or in part; another divergence; errors of other tensors; a weight
    that the solver takes for another's, or divides by another number of layers.
    """
    found = measured.layers if by_layer else measured.kinds
    loading = measured.of_layers if by_layer else measured.of_kinds
    reference = loading.predictions[0]
    source, *probes = loading.models
    predictions = loading.predictions[1:]
    by_name = {each.group: each for each in found.groups}
    if by_layer:
        # Known from the kinds.
        for shared in SHARED:
            assert by_name.pop(shared) in measured.kinds.groups
    else:
        again, *probes = probes
        predictions = predictions[1:]
        assert all(np.array_equal(source[name], again[name]) for name in source)
    assert len(by_name) == len(probes)
    tried: set[str] = set()
    for after, predicted in zip(probes, predictions, strict=True):
        changed = {name for name in source if not np.array_equal(source[name], after[name])}
        groups = {group_of(name, TINY) for name in changed}
        (group,) = {str(group) if by_layer else group and group.kind for group in groups}
        assert group
        each = by_name.pop(group)
        assert not changed & tried
        tried |= changed
        probe = each.probes[Q4_0]
        assert probe.kl == pytest.approx(divergence(reference, predicted), rel=0.02), each.group
        layers: dict[object, list[str]] = {}
        for name in changed:
            layers.setdefault(group_of(name, TINY), []).append(name)
        errors = [
            sum(((source[name] - after[name]) ** 2).sum() for name in names)
            / sum((source[name] ** 2).sum() for name in names)
            for names in layers.values()
        ]
        assert probe.error == pytest.approx(np.mean(errors), rel=1e-3)
        assert each.cost == pytest.approx(probe.kl / probe.error)
        assert not each.is_at_most
    assert not by_name
    of_shared = {name for name in source if str(group_of(name, TINY)) in SHARED} if by_layer else set()
    assert tried | of_shared == {name for name in source if group_of(name, TINY) and "gate_inp" not in name}
    if by_layer:
        check_predictions(model, measured.path, found)
        weights = read_sensitivity(measured.path).weights
        assert weights.keys() == {each.group for each in (*measured.kinds.groups, *found.groups)}
    else:
        # llama.cpp rounds what it multiplies quantized weights with, which torch does not: so this is coarse,
        # and two windows are enough.
        windows = loading.windows[:2]
        before = by_torch(source, windows)
        kl = [divergence(before, by_torch(after, windows)) for after in probes]
        few = [each[: len(before)] for each in predictions]
        assert [divergence(reference[: len(before)], each) for each in few] == pytest.approx(kl, rel=0.4)


def check_predictions(model: Path, kept_in: Path, found: ErrorCosts) -> None:
    """Check that the predicted costs are the measured ones."""
    file, hp = read_model(model)
    kept = read_sensitivity(kept_in)
    costs = CostModel(file, hp, kept)
    assert str(costs.error_weights) == "measured"
    built_in_costs: dict[str, float] = {}
    for each in found.groups:
        names = [name for name in kept.tensors if belongs(name, each.group)]
        predicted = costs.figures(TensorChoice.of(file.tensors[name], Q4_0) for name in names).error
        assert predicted == pytest.approx(each.probes[Q4_0].kl)
        kind = each.group.partition(".")[0]
        built_in_costs[kind] = built_in_costs.get(kind, 0.0) + each.built_in
    assert built_in_costs == pytest.approx({kind: WEIGHTS[kind] for kind in built_in_costs})


def belongs(name: str, group: str) -> bool:
    found = group_of(name, TINY)
    return found is not None and group in (str(found), found.kind)


def test_importance_counts(model: Path, tmp_path: Path) -> None:
    """Guards: groups encoded without the matrix that dsmoe-quantize will use, beside errors that count it."""
    imatrix = random_imatrix(TINY, output=True)
    _, loading = costs(model, tmp_path / "costs.json", imatrix=imatrix)
    expected = {}
    for name, matrix in (("with", imatrix), ("without", None)):
        plan = plan_quantization(model, resolve("Q4_0"), Overrides(pure=True), imatrix=matrix)
        quantize_file(plan, tmp_path / name)
        expected[name] = weights_of(tmp_path / name)
    source, _, *probes = loading.models
    changed = {
        name: weights
        for after in probes
        for name, weights in after.items()
        if not np.array_equal(source[name], weights)
    }
    assert {"token_embd.weight", "output.weight", "blk.0.attn_q.weight"} <= changed.keys()
    for name, weights in changed.items():
        assert np.array_equal(weights, expected["with"][name])
        # The matrix has nothing about the embedding.
        assert np.array_equal(weights, expected["without"][name]) == (name == "token_embd.weight")


def test_interrupted_and_continued(model: Path, measured: Measured, tmp_path: Path) -> None:
    """Guards: results lost or measured twice, a model left behind, figures that depend on interruptions."""
    kept_in = tmp_path / "costs.json"
    with pytest.raises(InterruptedRunError, match="3 of 11 measurements done"):
        costs(model, kept_in, Loading(stop_after=5))
    probes = read_sensitivity(kept_in).probes
    assert probes is not None
    assert len(probes.groups) == len(read_sensitivity(kept_in).weights) == 3
    assert list((cache_folder() / "eval").iterdir()) == []
    with pytest.raises(InterruptedRunError, match="5 of 11 measurements done"):
        costs(model, kept_in, Loading(stop_after=3))
    rest, loading = costs(model, kept_in)
    # The reference is recorded again; its noise is known.
    assert len(loading.models) == 1 + 6
    assert json.loads(kept_in.read_text()) == json.loads(measured.kinds_file)
    assert rest.groups == measured.kinds.groups
    _, loading = costs(model, kept_in)
    assert not loading.models
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_what_is_told_meanwhile(model: Path, tmp_path: Path) -> None:
    """Guards: a type that was not tried, without a word, or with the same words at each of 200 steps; steps
    that cannot be told apart.
    """
    events: list[Event] = []
    costs(
        model,
        tmp_path / "costs.json",
        types=(GgmlType.Q4_K,),
        by_layer=True,
        n_windows=1,
        listen=events.append,
    )
    misfit = "64 columns are not a multiple of 256, which Q4_K needs"
    notes = [event.text for event in events if isinstance(event, Note) and misfit in event.text]
    assert notes == [
        f"{misfit}; 1 tensor in Q5_0 instead",
        f"{misfit}; 2 tensors in Q5_0 instead",
    ]
    stages = {event.stage for event in events if isinstance(event, Started)}
    labels = [stage.split(" ") for stage in stages if stage.endswith(" Q4_K")]
    names = {str(group_of(spec.name, TINY)) for spec in tensor_specs(TINY)} - {"None"}
    assert {group for _, group, _ in labels} == names
    assert {number for number, *_ in labels} == {f"{at + 1}/{len(names)}" for at in range(len(names))}


def test_other_circumstances_are_refused(model: Path, tmp_path: Path) -> None:
    """Guards: figures beside each other that were measured on different texts or in different types."""
    kept_in = tmp_path / "costs.json"
    with pytest.raises(InterruptedRunError):
        costs(model, kept_in, Loading(stop_after=3))
    before = kept_in.read_bytes()
    for more, words in (
        ({"text": replace(TEXT, content="other " * 200)}, "another text, test"),
        ({"n_context": 32}, "windows of 48 tokens"),
        ({"types": (Q5_0,)}, "other types, Q4_0"),
        ({"types": (Q4_0, Q5_0)}, "other types, Q4_0"),
        ({"n_windows": 1}, r"\d+ windows, not 1"),
    ):
        with pytest.raises(UsageError, match=f"measured with {words}"):
            costs(model, kept_in, **more)
    assert kept_in.read_bytes() == before
    with pytest.raises(InterruptedRunError):
        # More windows than there are mean all of them.
        costs(model, kept_in, Loading(stop_after=0), n_windows=1000)
    found = json.loads(before)
    found["probes"] |= {"n_windows": 2, "n_windows_of_text": 0}
    kept_in.write_text(json.dumps(found))
    with pytest.raises(UsageError, match="measured with 2 windows, not"):
        # The file does not say how many windows the text has: known only once the text is read as tokens.
        costs(model, kept_in)


def test_other_windows_of_a_complete_file_are_refused(model: Path, tmp_path: Path) -> None:
    """Guards: --chunks without effect, since nothing is left to measure; a second type that is left out."""
    kept_in = tmp_path / "costs.json"
    types = (Q4_0, GgmlType.Q8_0)
    for each in costs(model, kept_in, n_windows=2, types=types)[0].groups:
        coarse, fine = (each.probes[kind] for kind in types)
        assert fine.kl < coarse.kl
        clear = [probe.kl / probe.error for probe in (coarse, fine) if probe.kl > 2 * probe.kl_error]
        assert each.cost is not None
        assert each.is_at_most or min(clear) <= each.cost <= max(clear)
    found = json.loads(kept_in.read_text())
    n_windows = len(windows_of(model))
    assert n_windows > 3
    assert (found["probes"]["n_windows"], found["probes"]["n_windows_of_text"]) == (2, n_windows)
    for wanted in (1, 3, None):
        with pytest.raises(UsageError, match=f"measured with 2 windows, not {wanted or n_windows}"):
            costs(model, kept_in, n_windows=wanted, types=types)
    assert not costs(model, kept_in, n_windows=2, types=types)[1].models
    del found["probes"]["n_windows_of_text"]
    kept_in.write_text(json.dumps(found))
    with pytest.raises(UsageError, match="measured with 2 windows, not 3"):
        costs(model, kept_in, n_windows=3, types=types)


def test_two_runs(model: Path, tmp_path: Path) -> None:
    """Guards: two runs that write over each other's results."""
    kept_in = tmp_path / "costs.json"

    def load(*arguments: Any) -> Engine:
        costs(model, kept_in)
        raise AssertionError

    file, hp = read_model(model)
    with pytest.raises(LockedError, match="another run"):
        measure_costs(file, hp, CostOptions(kept_in, TEXT, N_CONTEXT, None, (Q4_0,)), load)


PROBES = Probes("t", "d", 16, 1, (Q4_0, Q5_0), floor=1e-5)
TRIAL = Trial("output", {}, {}, {}, fits=True, built_in=9.0)


@pytest.mark.parametrize(
    ("probes", "cost", "is_at_most"),
    [
        ({Q4_0: Probe(0.01, 0.02, 0.001)}, 2.0, False),
        ({Q4_0: Probe(0.01, 0.02, 0.001), Q5_0: Probe(0.001, 0.0005, 0.0001)}, 1.0, False),
        ({Q4_0: Probe(0.01, 0.02, 0.001), Q5_0: Probe(0.001, 0.0005, 0.0004)}, 2.0, False),
        ({Q4_0: Probe(0.01, 0.02, 0.001), Q5_0: Probe(1e-9, 0.0005, 0.0001)}, 2.0, False),
        ({Q4_0: Probe(0.01, 0.001, 0.001)}, 0.3, True),
        ({Q4_0: Probe(0.01, 5e-6, 1e-6)}, 1.5e-3, True),
        ({Q4_0: Probe(0.01, 0.0, 0.0)}, 1e-3, True),
        ({Q4_0: Probe(0.0, 1e-4, 1e-6)}, None, False),
        ({}, None, False),
    ],
)
def test_noise_is_no_cost(probes: dict[GgmlType, Probe], cost: float | None, is_at_most: bool) -> None:
    """Guards: costs of zero, of infinity, or of whatever the noise was."""
    found = cost_of(TRIAL, replace(PROBES, groups={"output": probes}))
    assert found.cost == (None if cost is None else pytest.approx(cost))
    assert found.is_at_most == is_at_most
