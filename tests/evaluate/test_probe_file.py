"""The model file of the probes: its content, and how much is written for each probe."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import TINY
from support.models import tiny_model

from dsmoe_local.base.errors import FileError, InterruptedRunError, NoSpaceError
from dsmoe_local.base.progress import ignore
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import ModelOptions, ObserverOptions
from dsmoe_local.evaluate import probe_file
from dsmoe_local.evaluate.error_cost import CostOptions, measure_costs
from dsmoe_local.evaluate.measure import options_for
from dsmoe_local.evaluate.probe_file import ProbeFile, changed_by, size_of
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.policy.choice import TensorChoice
from dsmoe_quantize.policy.mixes import FLOAT_TYPES
from dsmoe_quantize.policy.recipes import group_of
from dsmoe_quantize.quantize import Plan, quantize_file

Q4_0, Q5_0, Q8_0 = GgmlType.Q4_0, GgmlType.Q5_0, GgmlType.Q8_0
TEXT = Text("test", built_in().content[1000:1300])
N_CONTEXT = 48


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model()


def plan_of(file: GgufFile, names: Sequence[str], kind: GgmlType) -> Plan:
    choices = [
        TensorChoice.of(tensor, kind if tensor.name in names else tensor.type)
        for tensor in file.tensors.values()
    ]
    return Plan(TINY, FLOAT_TYPES["BF16"], choices, file=file)


def matrices_of(file: GgufFile) -> list[str]:
    return [
        each.name for each in file.tensors.values() if len(each.shape) > 1 and "gate_inp" not in each.name
    ]


def bytes_of(path: Path) -> dict[str, bytes]:
    content = path.read_bytes()
    tensors = read_model(path)[0].tensors.values()
    return {each.name: content[each.offset : each.offset + each.n_bytes] for each in tensors}


def test_holds_what_the_quantizer_makes(model: Path, tmp_path: Path) -> None:
    """Guards: a tensor left over from the probe before, or overwritten by one that moved: for groups of every
    size, in every order, that share tensors, against whole files.
    """
    file, _ = read_model(model)
    choose = random.Random(0)
    names = matrices_of(file)
    groups = [choose.sample(names, choose.randint(1, 5)) for _ in range(30)]
    plans = [plan_of(file, group, choose.choice((Q4_0, Q5_0, Q8_0))) for group in groups]
    path = tmp_path / "probe.gguf"
    with ProbeFile(path, file, [changed_by(plan) for plan in plans], 1) as probe:
        for number, plan in enumerate(plans):
            probe.write(plan, ignore, threading.Event())
            quantize_file(plan, tmp_path / f"{number}.gguf")
            assert bytes_of(path) == bytes_of(tmp_path / f"{number}.gguf")
    assert not path.exists()


class Counting:
    """Loads models, and counts the bytes written before each one while none is loaded."""

    def __init__(self) -> None:
        self.n_loaded = 0
        self.n_written = 0
        self.for_probes: list[int] = []

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        assert not self.n_loaded, "an engine maps the file"
        n_bytes = PWRITE(descriptor, data, offset)
        self.n_written += n_bytes
        return n_bytes

    def load(
        self, path: Path, n_context: int, observers: tuple[ObserverOptions, ...], listen: Any, stop: Any
    ) -> Any:
        if path.name == "probe.gguf":
            self.for_probes.append(self.n_written)
        self.n_written = 0
        self.n_loaded += 1
        options = ModelOptions(path, n_threads=1, n_ubatch=n_context)
        return self._until_closed(Engine.load(options_for(options, n_context, *observers)))

    def _until_closed(self, engine: Engine) -> Any:
        counting = self

        class Closing:
            def __enter__(self) -> Engine:
                return engine.__enter__()

            def __exit__(self, *arguments: Any) -> None:
                engine.__exit__(*arguments)
                counting.n_loaded -= 1

        return Closing()


PWRITE = os.pwrite


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    found = Counting()
    monkeypatch.setattr(os, "pwrite", found.pwrite)
    return found


@pytest.mark.parametrize("by_layer", [False, True], ids=["by kind", "by layer"])
def test_a_probe_writes_its_group(model: Path, tmp_path: Path, counting: Counting, by_layer: bool) -> None:
    """Guards: the whole model written for each probe, 6 TB for all layers of a 16B; a file that is changed
    under an engine that maps it.
    """
    file, hp = read_model(model)
    request = CostOptions(tmp_path / "costs.json", TEXT, N_CONTEXT, 1, (Q4_0,), by_layer=by_layer, threads=1)
    found = measure_costs(file, hp, request, counting.load)
    first, *others = counting.for_probes
    assert len(counting.for_probes) == len(found.groups)
    header = file.parts[0].data_offset
    weights = file.size - header
    assert first <= file.size
    groups = sorted(
        size_of(file, [name for name in matrices_of(file) if belongs(name, each.group)])
        for each in found.groups
    )
    for (before, group), n_bytes in zip(pairwise(groups), others, strict=True):
        # The group in Q4_0, the one before in F32 again, and one of each smaller size.
        smaller = {size for size in groups if size < group}
        assert n_bytes <= header + group[0] + before[0] + sum(size[0] for size in smaller)
        assert n_bytes <= header + 5 * group[0]
    assert sum(counting.for_probes) <= len(groups) * header + 4 * weights


def belongs(name: str, group: str) -> bool:
    found = group_of(name, TINY)
    return found is not None and group in (str(found), found.kind)


def test_an_interrupted_write_is_not_trusted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a probe with tensors that an interruption, or a full disk, left half written."""
    file, _ = read_model(model)
    first, second = (plan_of(file, [name], Q4_0) for name in matrices_of(file)[:2])
    quantize_file(second, tmp_path / "whole.gguf")
    path = tmp_path / "probe.gguf"
    with ProbeFile(path, file, map(changed_by, (first, second)), 1) as probe:
        probe.write(first, ignore, threading.Event())
        stop = threading.Event()
        stop.set()
        with pytest.raises(InterruptedRunError):
            probe.write(second, ignore, stop)
        probe.write(second, ignore, threading.Event())
        assert bytes_of(path) == bytes_of(tmp_path / "whole.gguf")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(probe_file, "write_at", full)
            with pytest.raises(NoSpaceError, match="No space left"):
                probe.write(first, ignore, threading.Event())
        probe.write(second, ignore, threading.Event())
        assert bytes_of(path) == bytes_of(tmp_path / "whole.gguf")


def test_another_source_is_refused(model: Path, tmp_path: Path) -> None:
    """Guards: a probe made of two models, when the source is replaced meanwhile."""
    copy = tmp_path / "model.gguf"
    copy.write_bytes(model.read_bytes())
    file, _ = read_model(copy)
    plan = plan_of(file, matrices_of(file)[:1], Q4_0)
    with ProbeFile(tmp_path / "probe.gguf", file, [changed_by(plan)], 1) as probe:
        probe.write(plan, ignore, threading.Event())
        os.utime(copy, ns=(1, 1))
        with pytest.raises(FileError, match="changed while it was in use"):
            probe.write(plan, ignore, threading.Event())
