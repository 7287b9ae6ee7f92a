"""Errors of types against files that were really quantized, as the `gguf` package reads them; their file."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray
from support.imatrices import random_imatrix
from support.tiny_gguf import MOE, NARROW, ODD, patch_weight, write_tiny

from dsmoe_local.base.errors import FormatError, InterruptedRunError, UsageError
from dsmoe_local.base.progress import Event, Started
from dsmoe_local.model.ggml import FLOATS, GgmlType, block_size
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.budget.sensitivity import (
    Probe,
    Probes,
    Sensitivity,
    TensorErrors,
    candidates,
    measure,
    sampled_rows,
)
from dsmoe_quantize.budget.sensitivity_file import (
    Keeper,
    default_path,
    read_sensitivity,
    resume,
    start,
    write_sensitivity,
)
from dsmoe_quantize.errors import WeightError
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Overrides, may_change
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

SMALL = replace(MOE, n_layers=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny-BF16.gguf", SMALL)


PROBES = Probes(
    "t", "d", 512, 2, (GgmlType.Q4_0,), 1e-7, {"output": {GgmlType.Q4_0: Probe(0.01, 0.002, 0.0001)}}, 7
)


def sensitivity(path: Path, imatrix: Imatrix | None = None, sample: int = 0, **options: Any) -> Sensitivity:
    file, _ = read_model(path)
    return measure(file, start(file, imatrix, sample), imatrix, **options)


def weights_of(path: Path) -> Mapping[str, NDArray[np.float64]]:
    """All tensors as (matrices, rows, columns), read by the gguf package."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        columns = int(tensor.shape[0])
        rows = int(tensor.shape[1]) if len(tensor.shape) > 1 else 1
        found[tensor.name] = values.reshape(-1, rows, columns)
    return found


@cache
def measured_once(source: Path, with_imatrix: bool) -> tuple[Imatrix | None, Mapping[str, TensorErrors]]:
    imatrix = random_imatrix(SMALL, least=5000) if with_imatrix else None
    return imatrix, sensitivity(source, imatrix).tensors


@pytest.mark.parametrize("word", ["Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
@pytest.mark.parametrize("with_imatrix", [False, True])
def test_errors_of_files(source: Path, tmp_path: Path, word: str, with_imatrix: bool) -> None:
    """Guards: rows of another expert, a kernel called otherwise than the quantizer calls it, importance of
    another expert, or experts that count as if all were chosen alike.
    """
    imatrix, measured = measured_once(source, with_imatrix)
    kind = GgmlType.__members__[word]
    plan = plan_quantization(source, resolve(word), Overrides(pure=True), imatrix=imatrix)
    quantize_file(plan, tmp_path / "out.gguf")
    before, after = weights_of(source), weights_of(tmp_path / "out.gguf")
    checked = 0
    for name, errors in measured.items():
        tensor = plan.file.tensors[name]
        if tensor.shape[-1] % block_size(kind):
            assert kind not in errors.errors
            continue
        counts = np.ones((len(before[name]), 1, 1))
        entry = imatrix.entries.get(name) if imatrix else None
        if entry is not None and len(entry.counts) > 1:
            counts = (entry.counts + 1.0)[:, None, None] / (entry.counts + 1.0).mean()
        importance = imatrix.importance(name, tensor.shape) if imatrix else None
        factor = counts * (1.0 if importance is None else importance[:, None, :].astype(np.float64))
        assert errors.energy == pytest.approx((factor * before[name] ** 2).sum(), rel=1e-4)
        assert errors.errors[kind] == pytest.approx(
            (factor * (before[name] - after[name]) ** 2).sum(), rel=1e-4
        )
        assert errors.n_tried == errors.n_weights == before[name].size
        checked += 1
    assert checked > 5


def test_every_matrix_and_nothing_else(source: Path) -> None:
    """Guards: a router or norm that may become something else; a matrix that is forgotten."""
    file, _ = read_model(source)
    assert list(sensitivity(source).tensors) == [
        name for name, tensor in file.tensors.items() if may_change(tensor)
    ]


def test_candidates(tmp_path: Path) -> None:
    """Guards: a type that its width does not allow aborts the process in ggml; floats beside block types."""
    for number, (hp, dtype) in enumerate([(MOE, "bf16"), (NARROW, "f32"), (ODD, "bf16"), (ODD, "f32")]):
        file, _ = read_model(write_tiny(tmp_path / f"{number}.gguf", replace(hp, n_layers=2), dtype))
        for tensor in filter(may_change, file.tensors.values()):
            found = candidates(tensor)
            assert all(tensor.shape[-1] % block_size(kind) == 0 for kind in found)
            assert FLOATS.isdisjoint(found) == (tensor.shape[-1] % 32 == 0)
            assert found


def test_a_quantized_source(source: Path, tmp_path: Path) -> None:
    """Guards: a Q8_0 file whose tensors cannot stay as they are, without any new error."""
    small = tmp_path / "q8.gguf"
    quantize_file(plan_quantization(source, resolve("Q8_0")), small)
    for errors in sensitivity(small).tensors.values():
        assert errors.errors[GgmlType.Q8_0] == 0
        assert errors.errors[GgmlType.Q4_0] > 0


def test_samples_come_close(source: Path) -> None:
    """Guards: rows that are not what they seem, or a sum that is not scaled with the sample."""
    full, part = sensitivity(source).tensors, sensitivity(source, sample=8192).tensors
    assert 0 < sum(each.n_tried for each in part.values()) < sum(each.n_tried for each in full.values()) / 2
    for name, each in part.items():
        if each.n_tried < 4096:
            continue
        for kind, error in each.errors.items():
            relative = full[name].errors[kind] / full[name].energy
            assert error / each.energy == pytest.approx(relative, rel=0.1), (name, kind)


@pytest.mark.parametrize(
    ("shape", "sample"),
    [((64, 1408, 2048), 1 << 18), ((1, 102400, 2048), 1 << 18), ((3, 7, 32), 1), ((2, 5, 32), 0)],
)
def test_sampled_rows(shape: tuple[int, int, int], sample: int) -> None:
    """Guards: an expert without a row, rows beyond the matrix or twice, rows bunched at its beginning."""
    matrices, rows, columns = shape
    picked = sampled_rows(matrices, rows, columns, sample)
    assert len(picked) == matrices
    for each in picked:
        assert each == sorted(set(each))
        assert 0 <= each[0] <= each[-1] < rows
    if sample > 1:
        n_picked = sum(map(len, picked))
        assert n_picked * columns == pytest.approx(sample, rel=0.6)
        assert np.mean([row for each in picked for row in each]) == pytest.approx(rows / 2, rel=0.05)
    if not sample:
        assert picked == [list(range(rows))] * matrices


def test_threads_change_nothing(source: Path) -> None:
    """Guards: sums whose last bits, and so a recipe, depend on timing."""
    assert sensitivity(source, sample=20000, threads=1) == sensitivity(source, sample=20000, threads=5)


def test_bad_weights(tmp_path: Path) -> None:
    """Guards: a NaN that makes every type look the same."""
    path = write_tiny(tmp_path / "bad.gguf", SMALL)
    name, index = "blk.1.ffn_up_exps.weight", (2, 57, 255)
    patch_weight(path, name, int(np.ravel_multi_index(index, (3, 96, 256))), np.nan)
    with pytest.raises(WeightError, match="NaN") as caught:
        sensitivity(path)
    assert (caught.value.tensor, caught.value.index) == (name, index)


def test_interrupted_and_continued(source: Path, tmp_path: Path) -> None:
    """Guards: what was measured is lost, measured twice, or makes another result."""
    path = tmp_path / "kept.json"
    file, _ = read_model(source)
    wanted = start(file, None, 4096)
    stop, keeper = threading.Event(), Keeper(path)

    def keep(found: Sensitivity) -> None:
        keeper.keep(found)
        if len(found.tensors) == 6:
            stop.set()

    with pytest.raises(InterruptedRunError, match="of 19 tensors measured"):
        measure(file, wanted, threads=1, keep=keep, stop=stop)
    keeper.close()
    n_kept = len(read_sensitivity(path).tensors)
    assert n_kept >= 6
    events: list[Event] = []
    found = measure(file, resume(path, wanted), listen=events.append)
    begun = next(event for event in events if isinstance(event, Started))
    assert (begun.done, begun.total) == (n_kept, 19)
    assert found == measure(file, wanted)
    write_sensitivity(found, path)
    assert read_sensitivity(path) == found


def test_costs_are_kept_while_errors_are_measured(source: Path, tmp_path: Path) -> None:
    """Guards: hours of `dsmoe eval --sensitivity` lost to a target; older files refused."""
    path = tmp_path / "kept.json"
    file, _ = read_model(source)
    wanted = replace(start(file, None, 4096), weights={"output": 0.2}, probes=PROBES)
    write_sensitivity(wanted, path)
    assert read_sensitivity(path) == wanted
    found = measure(file, resume(path, start(file, None, 4096)))
    assert (found.weights, found.probes) == (wanted.weights, PROBES)
    write_sensitivity(found, path)
    assert read_sensitivity(path) == found
    old = json.loads(path.read_text())
    del old["probes"]["n_windows_of_text"]
    path.write_text(json.dumps(old))
    assert read_sensitivity(path) == replace(found, probes=replace(PROBES, n_windows_of_text=0))
    del old["probes"]
    path.write_text(json.dumps(old))
    assert read_sensitivity(path) == replace(found, probes=None)


def test_kept_of_something_else(source: Path, tmp_path: Path) -> None:
    """Guards: another model's errors, taken for this one's."""
    file, _ = read_model(source)
    wanted = start(file, None, None)
    path = tmp_path / "kept.json"
    assert resume(path, wanted) == wanted, "no file yet"
    for other, what in (
        (replace(wanted, source="other"), "another model"),
        (replace(wanted, imatrix="other"), "with an importance matrix"),
        (replace(wanted, kernels="0.0.1"), "another version of llama-cpp-python"),
        (replace(wanted, sample=5), "another sample"),
    ):
        write_sensitivity(other, path)
        with pytest.raises(UsageError, match=what):
            resume(path, wanted)
        assert default_path(other) != default_path(wanted)
    ours = replace(wanted, imatrix="ours")
    write_sensitivity(replace(wanted, imatrix="other"), path)
    with pytest.raises(UsageError, match="with another importance matrix"):
        resume(path, ours)
    write_sensitivity(wanted, path)
    with pytest.raises(UsageError, match="with no importance matrix"):
        resume(path, ours)
    write_sensitivity(replace(wanted, sample=5), path)
    assert resume(path, wanted, any_sample=True).sample == 5
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(source.read_bytes())
    assert start(read_model(copy)[0], None, None) == wanted, "a copy of a model is the same model"


DAMAGE: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda found: found.update(format="x"),
    "a later version": lambda found: found.update(version=2),
    "no source": lambda found: found.pop("source"),
    "a negative sample": lambda found: found.update(sample=-1),
    "no tensors": lambda found: found.update(tensors=[]),
    "a tensor that is a number": lambda found: found["tensors"].update(x=1),
    "more tried than there are": lambda found: found["tensors"]["output.weight"].update(n_tried=10**9),
    "an unknown type": lambda found: found["tensors"]["output.weight"]["errors"].update(Q99=1),
    "a negative error": lambda found: found["tensors"]["output.weight"]["errors"].update(Q4_0=-1),
    "an error that is no number": lambda found: found["tensors"]["output.weight"]["errors"].update(Q4_0=None),
    "an infinite energy": lambda found: found["tensors"]["output.weight"].update(energy=float("inf")),
    "a weight of no group": lambda found: found.update(weights={"routed-dwn": 1.0}),
    "a weight of no layer": lambda found: found.update(weights={"routed-down.x": 1.0}),
    "weights that are words": lambda found: found.update(weights={"routed-down": "much"}),
    "probes that are a list": lambda found: found.update(probes=[]),
    "probes of no text": lambda found: found["probes"].pop("text_digest"),
    "probes of more than the text": lambda found: found["probes"].update(n_windows_of_text=1),
    "probes of no windows": lambda found: found["probes"].update(n_windows=0),
    "probes of a half window": lambda found: found["probes"].update(n_windows=0.5),
    "a probe of an unknown type": lambda found: found["probes"].update(types=["Q99"]),
    "a type that is a list": lambda found: found["probes"].update(types=[["Q4_0"]]),
    "noise that is a word": lambda found: found["probes"].update(floor="low"),
    "a probed group that is a number": lambda found: found["probes"]["groups"].update(output=1),
    "a probe that is a number": lambda found: found["probes"]["groups"].update(output={"Q4_0": 1}),
    "a probe without a divergence": lambda found: found["probes"]["groups"]["output"]["Q4_0"].pop("kl"),
}


# A model may have been taken for the file, and words written by hand can be corrected.
REMEDIES = {
    "another format": "name another file",
    "a weight of no group": "correct it",
    "a weight of no layer": "correct it",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files(source: Path, tmp_path: Path, what: str) -> None:
    """Guards: a traceback, or a recipe from nonsense."""
    path = tmp_path / "kept.json"
    write_sensitivity(replace(sensitivity(source, sample=32), probes=PROBES), path)
    found = json.loads(path.read_text())
    DAMAGE[what](found)
    path.write_text(json.dumps(found))
    with pytest.raises(FormatError, match="not a usable sensitivity file") as caught:
        read_sensitivity(path)
    assert caught.value.remedy.startswith(REMEDIES.get(what, "remove it"))


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("a tensor that is a number", "x"),
        ("an unknown type", "output.weight: Q99 "),
        ("a negative error", "output.weight: Q4_0: "),
        ("an infinite energy", "output.weight: "),
        ("weights that are words", "weights: routed-down: "),
        ("a probe of an unknown type", "probes: types: Q99 "),
        ("a probe without a divergence", "probes: output: Q4_0: "),
    ],
)
def test_errors_name_what_is_damaged(source: Path, tmp_path: Path, what: str, names: str) -> None:
    """Guards: a file of hundreds of tensors in which a mistake must be searched for."""
    path = tmp_path / "kept.json"
    write_sensitivity(replace(sensitivity(source, sample=32), probes=PROBES), path)
    found = json.loads(path.read_text())
    DAMAGE[what](found)
    path.write_text(json.dumps(found))
    with pytest.raises(FormatError, match=f"sensitivity file: {re.escape(names)}"):
        read_sensitivity(path)


def test_a_tensor_with_the_name_of_a_type(tmp_path: Path) -> None:
    """Guards: names of tensors taken for types."""
    path = tmp_path / "kept.json"
    errors = TensorErrors(32, 32, 1.0, {GgmlType.Q4_0: 0.5})
    wanted = Sensitivity("model", "", "1", 32, {"Q4_K": errors})
    write_sensitivity(wanted, path)
    assert read_sensitivity(path) == wanted


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_no_json(tmp_path: Path, content: bytes) -> None:
    """Guards: a traceback of the JSON reader."""
    path = tmp_path / "kept.json"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_sensitivity(path)
    assert caught.value.remedy == "name another file"
