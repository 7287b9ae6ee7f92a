"""The form of weights on the CPU: what may be repacked, what is chosen, and that results stay the same."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import llama_oracle
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine import native
from dsmoe_local.engine.load import kernels
from dsmoe_local.engine.load.kernel_speeds import read_speeds, save_speeds
from dsmoe_local.engine.load.kernels import FORMS, FormSpeed, Kernels, check_deterministic, choose_kernels
from dsmoe_local.engine.native.library import backend_function
from dsmoe_local.engine.types import CHAT_RATIO, PROMPTS_ONLY
from dsmoe_local.model.ggml import GgmlType, row_bytes
from dsmoe_local.model.gguf_file import TensorInfo
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.policy.choice import Overrides
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file
from dsmoe_quantize.write.kernels import encoder

IDS = [0, *range(2, 60)]
_BUFFER = re.compile(r"CPU_REPACK model buffer size = +([\d.]+) MiB")
WIDE = replace(
    MOE, n_layers=2, hidden_size=512, n_heads=8, n_kv_heads=8, expert_size=256, shared_expert_size=256
)
"""Experts with rows of several blocks, so that the order of sums matters."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("kernels") / "source.gguf", MOE)


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "AMD64")


def quantized(source: Path, word: str, *, pure: bool = False) -> Path:
    path = source.with_name(f"{word}-{pure}.gguf")
    if not path.exists():
        quantize_file(plan_quantization(source, resolve(word), Overrides(pure=pure)), path)
    return path


def tensors_of(path: Path) -> list[TensorInfo]:
    return list(read_model(path)[0].tensors.values())


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
    ours = sum(tensor.n_bytes for tensor in tensors_of(path) if _may_be_repacked(tensor))
    assert ours / 2**20 == pytest.approx(repacked_mebibytes(path), abs=0.01)


def _may_be_repacked(tensor: TensorInfo) -> bool:
    experts = tensor.name.endswith("_exps.weight")
    if tensor.name == "token_embd.weight" or len(tensor.shape) != (3 if experts else 2):
        return False
    n_rows, n_columns = tensor.shape[-2:]
    return native.can_repack(tensor.type, n_columns, n_rows, experts=experts)


@pytest.mark.parametrize("form", [Kernels.TILED, Kernels.PLAIN])
@pytest.mark.parametrize("word", ["q4_k_m", "q4", "q4-fast", "iq4_nl"])
@pytest.mark.usefixtures("x86")
def test_results_do_not_depend_on_the_form(word: str, form: Kernels, source: Path) -> None:
    """A weight in the wrong buffer, or a choice that computes something else."""
    path = quantized(source, word)
    choice = choose_kernels(form, tensors_of(path), offloaded=False)
    expected = llama_oracle.logprobs(path, IDS)
    model = native.Model(path, repack=choice.repack_all, repacked=choice.repacked)
    found = llama_oracle.log_softmax(llama_oracle.logits(path, IDS, handle=model.handle))[:-1]
    model.close()
    divergence = (np.exp(expected) * (expected - found)).sum(1)
    assert divergence.mean() < 1e-4
    # The same greedy tokens, up to ties.
    gaps = np.sort(expected, axis=1)
    ties = gaps[:, -1] - gaps[:, -2] < 1e-3
    assert ((expected.argmax(1) == found.argmax(1)) | ties).all()


@pytest.mark.usefixtures("x86")
def test_types_without_tiled_products_are_repacked(source: Path) -> None:
    """A name that no pattern matches, or one that matches too much."""
    tensors = tensors_of(quantized(source, "q4"))
    choice = choose_kernels(Kernels.TILED, tensors, offloaded=False)
    found = {
        tensor.name for tensor in tensors for pattern in choice.repacked if re.search(pattern, tensor.name)
    }
    if native.repack_buffer() is None:
        assert choice.repack_all
        return
    types = {tensor.name: tensor.type for tensor in tensors if _may_be_repacked(tensor)}
    assert found == {name for name, kind in types.items() if kind in (GgmlType.IQ4_NL, GgmlType.Q4_0)}
    assert found
    assert str(len(found)) in choice.about


SPEEDS = {
    Kernels.REPACK: FormSpeed(100.0, 20.0),
    Kernels.TILED: FormSpeed(150, 18),
    Kernels.PLAIN: FormSpeed(151, 10),
}


@pytest.mark.parametrize(
    ("ratio", "measured", "repacks", "reason"),
    [
        (PROMPTS_ONLY, {}, False, "faster for prompts"),
        (CHAT_RATIO, {}, False, "faster for prompts"),
        (0.5, {}, True, "faster for replies"),
        (0.5, SPEEDS, True, "measured on this machine"),
        (5, SPEEDS, False, "measured on this machine"),
        (CHAT_RATIO, {**SPEEDS, Kernels.TILED: FormSpeed(101, 10)}, True, "measured on this machine"),
    ],
)
@pytest.mark.usefixtures("x86")
def test_the_choice_depends_on_the_job(
    ratio: float, measured: dict[Kernels, FormSpeed], repacks: bool, reason: str, source: Path
) -> None:
    """A long reply that is decoded slowly, a prompt that is; measurements that are ignored."""
    if native.repack_buffer() is None:
        pytest.skip("this build has no tiled products, or other kernels")
    tensors = tensors_of(quantized(source, "q4_k_s"))
    choice = choose_kernels(Kernels.AUTO, tensors, offloaded=False, prompt_ratio=ratio, measured=measured)
    assert choice.repack_all is repacks
    assert reason in choice.reason


def test_where_llama_cpps_own_choice_stays(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processors, GPUs and unknown weights, for which nothing was measured."""
    tensors = tensors_of(quantized(source, "iq4_nl"))

    def repacks(wanted: Kernels, tensors: list[TensorInfo] = tensors, *, offloaded: bool = False) -> bool:
        return choose_kernels(wanted, tensors, offloaded=offloaded, prompt_ratio=PROMPTS_ONLY).repack_all

    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert repacks(Kernels.AUTO)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert repacks(Kernels.AUTO, offloaded=True)
    assert repacks(Kernels.REPACK)
    assert not repacks(Kernels.PLAIN, offloaded=True)
    unknown = TensorInfo("blk.0.new_kind.weight", (256, 256), GgmlType.IQ4_NL, 0)
    assert repacks(Kernels.TILED, [*tensors, unknown])


class _InitParameters(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def product(kind: GgmlType, weight: NDArray[np.uint8], x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The product of a weight with rows of x, by ggml on two threads."""
    pointer, (n, n_columns) = ctypes.c_void_p, x.shape
    n_rows = weight.nbytes // row_bytes(kind, n_columns)
    new = backend_function(
        "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
    )
    data = backend_function("ggml_get_data", pointer, pointer)
    context = backend_function("ggml_init", pointer, _InitParameters)(_InitParameters(16 << 20, None, False))
    try:
        tensors = [new(context, kind, n_columns, n_rows), new(context, GgmlType.F32, n_columns, n)]
        ctypes.memmove(data(tensors[0]), weight.ctypes.data, weight.nbytes)
        ctypes.memmove(data(tensors[1]), x.ctypes.data, x.nbytes)
        result = backend_function("ggml_mul_mat", pointer, *[pointer] * 3)(context, *tensors)
        graph = backend_function("ggml_new_graph", pointer, pointer)(context)
        backend_function("ggml_build_forward_expand", None, pointer, pointer)(graph, result)
        compute = backend_function(
            "ggml_graph_compute_with_ctx", ctypes.c_int, pointer, pointer, ctypes.c_int
        )
        assert compute(context, graph, 2) == 0
        values = ctypes.cast(data(result), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(values, (n, n_rows)).copy()
    finally:
        backend_function("ggml_free", None, pointer)(context)


def differs(kind: GgmlType) -> bool:
    """Whether seven rows have other last digits beside an eighth."""
    random = np.random.default_rng(0)
    weights = random.standard_normal((64, 1024)).astype(np.float32)
    encoded = np.empty(64 * row_bytes(kind, 1024), np.uint8)
    importance = np.ones(1024, np.float32)
    encoder(kind)(weights.ctypes.data, encoded.ctypes.data, 64, 1024, importance.ctypes.data)
    x = random.standard_normal((8, 1024)).astype(np.float32)
    return not np.array_equal(product(kind, encoded, x[:7]), product(kind, encoded, x)[:7])


def test_the_types_with_tiled_products() -> None:
    """A table that no longer fits llama.cpp. Tiled products sum in another order, from eight rows on."""
    if not differs(GgmlType.Q4_K):
        pytest.skip("this processor has no tiled products")
    kinds = [kind for kind in GgmlType if re.match(r"I?Q\d", kind.name) and kind.name not in _NOT_ENCODED]
    assert {kind for kind in kinds if differs(kind)} == kernels._TILED & set(kinds)


_NOT_ENCODED = frozenset({"Q8_1", "Q8_K"})


@pytest.mark.parametrize(
    ("word", "form", "n_parallel", "words"),
    [
        ("q4_k_s", Kernels.REPACK, 4, ""),
        ("q4_k_s", Kernels.REPACK, 6, "multiple of 4"),
        ("q4_k_s", Kernels.REPACK, 8, ""),
        ("q4_k_s", Kernels.PLAIN, 7, ""),
        ("q4_k_s", Kernels.PLAIN, 8, "use --parallel 4"),
        ("q6_k", Kernels.REPACK, 4, ""),
        ("q6_k", Kernels.REPACK, 8, "use --parallel 4"),
        ("q8_0", Kernels.REPACK, 7, ""),
    ],
)
@pytest.mark.usefixtures("x86")
def test_what_a_deterministic_engine_refuses(
    word: str, form: Kernels, n_parallel: int, words: str, tmp_path: Path
) -> None:
    """Replies with the last digits of their neighbors, in an output that promises equal texts."""
    if native.repack_buffer() is None:
        pytest.skip("this build has other kernels")
    source = write_tiny(tmp_path / "source.gguf", WIDE)
    tensors = tensors_of(quantized(source, word))
    choice = choose_kernels(form, tensors, offloaded=False)
    try:
        check_deterministic(choice, tensors, n_parallel)
        found = ""
    except UsageError as error:
        found = error.remedy
    assert (words in found) if words else not found


def damage(path: Path) -> Iterable[bytes]:
    """Contents that are not those of a saved file of this model on this machine."""
    content = path.read_bytes()
    yield b""
    yield content[:-9]
    yield b"\xff" + content
    yield b"[" * 50_000
    yield content.replace(b"tiled", b"other")
    yield content.replace(b"100.0", b"-1.0")
    yield content.replace(b'"cpu": "', b'"cpu": "Another ')


def test_saved_speeds(source: Path) -> None:
    """Speeds of another model, machine or version that decide; a crash by a damaged file."""
    path = quantized(source, "q4")
    assert read_speeds(path) == ({}, "")
    saved = save_speeds(path, SPEEDS)
    assert set(SPEEDS) == set(FORMS)
    assert read_speeds(path) == (SPEEDS, "")
    assert read_speeds(quantized(source, "q4_k_s")) == ({}, "")
    for content in damage(saved):
        saved.write_bytes(content)
        speeds, note = read_speeds(path)
        assert not speeds
        assert "is ignored" in note
