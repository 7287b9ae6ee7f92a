"""The form of weights on the CPU: what may be repacked, what is chosen, and that results stay the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import llama_oracle
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.engine import native
from dsmoe_local.engine.load.kernels import PLAIN, REPACK_ALL, Kernels, choose_kernels
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import TensorInfo
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.policy.choice import Overrides
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

IDS = [0, *range(2, 60)]
_BUFFER = re.compile(r"CPU_REPACK model buffer size = +([\d.]+) MiB")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("kernels") / "source.gguf", MOE)


def quantized(source: Path, word: str, *, pure: bool = False) -> Path:
    path = source.with_name(f"{word}-{pure}.gguf")
    if not path.exists():
        quantize_file(plan_quantization(source, resolve(word), Overrides(pure=pure)), path)
    return path


def repacked_mebibytes(path: Path, **options: Any) -> float:
    """What llama.cpp says that it has repacked."""
    model = native.Model(path, **options)
    try:
        return sum(float(size) for line in native.log_lines() for size in _BUFFER.findall(line))
    finally:
        model.close()


@pytest.mark.parametrize("word", ["q4_k_s", "q5_k_s", "q6_k", "iq4_nl", "iq4_xs", "q4_0", "q8_0", "q5_1"])
def test_what_llama_cpp_repacks(word: str, source: Path) -> None:
    """A weight that is taken for repackable and is not: llama.cpp crashes. Against its own loader."""
    path = quantized(source, word, pure=True)
    tensors = read_model(path)[0].tensors.values()
    ours = sum(tensor.n_bytes for tensor in tensors if _may_be_repacked(tensor))
    assert ours / 2**20 == pytest.approx(repacked_mebibytes(path), abs=0.01)


def _may_be_repacked(tensor: TensorInfo) -> bool:
    experts = tensor.name.endswith("_exps.weight")
    if tensor.name == "token_embd.weight" or len(tensor.shape) != (3 if experts else 2):
        return False
    n_rows, n_columns = tensor.shape[-2:]
    return native.can_repack(tensor.type, n_columns, n_rows, experts=experts)


@pytest.mark.parametrize("word", ["q4_k_m", "q4", "q4-fast", "iq4_nl"])
def test_results_do_not_depend_on_the_form(word: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight in the wrong buffer, or a choice that computes something else."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    path = quantized(source, word)
    file, _ = read_model(path)
    choice = choose_kernels(Kernels.AUTO, file.tensors.values(), offloaded=False)
    expected = llama_oracle.logprobs(path, IDS)
    model = native.Model(path, repack=choice.repack_all, repacked=choice.repacked)
    found = llama_oracle.log_softmax(llama_oracle.logits(path, IDS, handle=model.handle))[:-1]
    model.close()
    divergence = (np.exp(expected) * (expected - found)).sum(1)
    assert divergence.mean() < 1e-4


def test_types_without_tiled_products_are_repacked(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that no pattern matches, or one that matches too much."""
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    tensors = read_model(quantized(source, "q4"))[0].tensors.values()
    choice = choose_kernels(Kernels.AUTO, tensors, offloaded=False)
    found = {
        tensor.name for tensor in tensors for pattern in choice.repacked if re.search(pattern, tensor.name)
    }
    if native.repack_buffer() is None:
        assert choice is REPACK_ALL
        return
    wanted = {tensor.name for tensor in tensors if _may_be_repacked(tensor)}
    assert found == {name for name in wanted if read_type(tensors, name) in (GgmlType.IQ4_NL, GgmlType.Q4_0)}
    assert found
    assert str(len(found)) in choice.about


def read_type(tensors: Any, name: str) -> GgmlType:
    return GgmlType(next(tensor.type for tensor in tensors if tensor.name == name))


def test_where_llama_cpps_own_choice_stays(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processors, GPUs and unknown weights, for which nothing was measured."""
    tensors = list(read_model(quantized(source, "iq4_nl"))[0].tensors.values())
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert choose_kernels(Kernels.AUTO, tensors, offloaded=False) is REPACK_ALL
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert choose_kernels(Kernels.AUTO, tensors, offloaded=True) is REPACK_ALL
    assert choose_kernels(Kernels.REPACK, tensors, offloaded=False) is REPACK_ALL
    assert choose_kernels(Kernels.PLAIN, tensors, offloaded=True) is PLAIN
    unknown = TensorInfo("blk.0.new_kind.weight", (256, 256), GgmlType.IQ4_NL, 0)
    assert choose_kernels(Kernels.AUTO, [*tensors, unknown], offloaded=False) is REPACK_ALL
