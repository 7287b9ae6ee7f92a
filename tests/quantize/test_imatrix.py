"""Importance matrices: blended, merged, and used, against llama_model_quantize byte for byte."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.imatrices import as_llama_reads, llama_quantize_with, random_imatrix
from support.mix_models import MIX_MODELS
from support.quantize_oracle import assert_same
from support.tiny_gguf import DENSE, EIGHT_EXPERTS, MOE, NARROW, ODD, write_tiny

from dsmoe_local.base.errors import UsageError
from dsmoe_local.model.file_type import FILE_TYPES
from dsmoe_local.model.ggml import FLOATS, GgmlType, tensor_bytes
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.imatrix import MIN_TOKENS, Imatrix, Statistics, merged, metadata_of_use
from dsmoe_quantize.imatrix_file import read_imatrix, write_imatrix
from dsmoe_quantize.policy.choice import Override, Overrides
from dsmoe_quantize.policy.mixes import MIXES
from dsmoe_quantize.policy.plan import UNWEIGHTED
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file
from dsmoe_quantize.write import encoder, kernels

# No rule about layers depends on the matrix, so a few layers are enough.
MODELS = {
    "moe": (replace(MOE, n_layers=3, n_routed_experts=2), "bf16"),
    "eight experts": (replace(EIGHT_EXPERTS, n_layers=2, n_dense_layers=1), "f16"),
    "narrow": (replace(NARROW, ffn_size=96, expert_size=32, shared_expert_size=32), "f32"),
    "odd": (ODD, "bf16"),
    "dense": (replace(DENSE, n_layers=3, n_dense_layers=3), "f16"),
    **{name: (hp, "bf16") for name, hp in MIX_MODELS.items()},
}
# The others show the kernels; these, which matrix of a tensor gets which importance.
CASES = [
    (model, word)
    for model in MODELS
    for word in (("Q4_K_M", "Q4_0", "IQ4_NL") if model in MIX_MODELS else MIXES)
]


def of(sums: list[list[float]], counts: list[int]) -> Imatrix:
    entry = Statistics(np.array(sums, np.float32), np.array(counts, np.int64))
    return Imatrix({"w": entry}, ("text",), 1, 64)


def quantized(
    source: Path, out: Path, word: str, imatrix: Imatrix, overrides: Overrides | None = None
) -> Path:
    quantize_file(plan_quantization(source, resolve(word), overrides, imatrix=imatrix), out, threads=2)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Each model with a matrix of it, as files."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for number, (name, (hp, dtype)) in enumerate(MODELS.items()):
        matrix = folder / f"{number}.imatrix.gguf"
        write_imatrix(random_imatrix(hp, seed=number, output=name == "moe"), matrix)
        found[name] = write_tiny(folder / f"{number}.gguf", hp, dtype), matrix
    return found


@pytest.mark.parametrize(("model", "word"), CASES)
def test_quantizing_equals_llama_cpp(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, model: str, word: str
) -> None:
    """Guards: a file of ours that llama.cpp reads otherwise; an expert that gets another's importance; rules
    that differ with a matrix (Q4_0, Q5_0, IQ4_XS, IQ4_NL); metadata that says something else.
    """
    source, matrix = models[model]
    imatrix = read_imatrix(matrix)
    ours = quantized(source, tmp_path / "ours.gguf", word, imatrix)
    # Its tool says so of any file; ours only of those with blocks that a matrix has a say in.
    weighed = {tensor.type for tensor in read_gguf(ours).tensors.values()} - UNWEIGHTED
    said = {key: field.value for key, field in metadata_of_use(imatrix).items()} if weighed else {}
    theirs = tmp_path / "theirs.gguf"
    llama_quantize_with(as_llama_reads(matrix), source, theirs, FILE_TYPES[resolve(word).name], said)
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", sorted(kernels.WRITABLE), ids=lambda kind: kind.name)
def test_types_without_use_for_a_matrix(kind: GgmlType) -> None:
    """Guards: a file that is said to be made with a matrix that changed none of its bytes, or the reverse."""
    generator = np.random.default_rng(0)
    source = generator.standard_normal((64, 256), np.float32)
    importance = np.exp(generator.normal(0, 2, 256)).astype(np.float32)
    found = []
    for address in (None, importance.ctypes.data):
        out = np.zeros(tensor_bytes(kind, source.shape), np.uint8)
        kernels.encoder(kind)(source.ctypes.data, out.ctypes.data, 64, 256, address)
        found.append(out.tobytes())
    assert (found[0] == found[1]) == (kind in UNWEIGHTED)


def said_of_use(path: Path) -> dict[str, object]:
    metadata = read_gguf(path).metadata
    return {key: field.value for key, field in metadata.items() if key.startswith("quantize.")}


def test_what_a_file_says_of_its_matrix(tmp_path: Path) -> None:
    """Guards: a matrix of the source that is claimed of weights encoded without it; keys of two in one file;
    a matrix that nothing was encoded with.
    """
    source = write_tiny(tmp_path / "source.gguf", NARROW, "f16")
    first = random_imatrix(NARROW)
    second = Imatrix(first.entries, (), 0, 0, "second.dat")
    made = quantized(source, tmp_path / "made.gguf", "Q4_0", first)
    assert said_of_use(made).keys() == metadata_of_use(first).keys()

    def again(word: str, imatrix: Imatrix | None) -> dict[str, object]:
        out = tmp_path / f"{word}-{imatrix is not None}.gguf"
        quantize_file(plan_quantization(made, resolve(word), allow_requantize=True, imatrix=imatrix), out)
        return said_of_use(out)

    assert again("Q4_1", None) == {}
    assert again("Q4_1", second) == {
        "quantize.imatrix.file": "second.dat",
        "quantize.imatrix.entries_count": len(first.entries),
    }
    assert again("Q8_0", first) == {}
    assert again("F16", first) == {}


def test_a_matrix_without_any_tensor_of_the_model(models: dict[str, tuple[Path, Path]]) -> None:
    """Guards: a matrix of a model with other names, which is read and has no effect."""
    imatrix = of([[1.0]], [1])
    with pytest.raises(UsageError, match="none of this one's tensors"):
        plan_quantization(models["moe"][0], resolve("q4"), imatrix=imatrix)


def test_importance_changes_what_is_written(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Guards: a matrix that is read and never used, and weights it says much of that are kept no better."""
    source, matrix = models["moe"]
    name = "blk.2.ffn_gate_exps.weight"
    imatrix = read_imatrix(matrix)
    errors = []
    for given in (None, imatrix):
        out = tmp_path / f"{given is not None}.gguf"
        quantize_file(plan_quantization(source, resolve("Q4_K_S"), imatrix=given), out)
        difference = weights(out, name) - weights(source, name)
        importance = imatrix.importance(name, difference.shape)
        assert importance is not None
        errors.append(float((importance[:, None] * difference**2).sum()))
    assert errors[1] < 0.9 * errors[0]


def weights(path: Path, name: str) -> NDArray[np.float32]:
    info = read_gguf(path).tensors[name]
    raw = np.frombuffer(path.read_bytes(), np.uint8, info.n_bytes, info.offset)
    if info.type is GgmlType.F32:
        return raw.view(np.float32).reshape(info.shape)
    floats = np.empty(info.n_weights, np.float32)
    kernels.decoder(info.type)(raw.ctypes.data, floats.ctypes.data, floats.size)
    return floats.reshape(info.shape)


@pytest.mark.parametrize("word", ["Q4_K_M", "IQ4_NL"])
def test_any_cut_gives_the_same_bytes(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """Guards: the importance of the wrong expert where a slab begins in the middle of one."""
    source, matrix = models["moe"]
    imatrix = read_imatrix(matrix)
    expected = quantized(source, tmp_path / "whole.gguf", word, imatrix)
    monkeypatch.setattr(encoder, "SLAB_BYTES", 12345)
    monkeypatch.setattr(encoder, "PIECE_WEIGHTS", 1000)
    assert quantized(source, tmp_path / "cut.gguf", word, imatrix).read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("kind", sorted(kernels.WRITABLE - FLOATS), ids=lambda kind: kind.name)
def test_what_the_text_never_used_is_kept(tmp_path: Path, kind: GgmlType) -> None:
    """Guards: blocks of no importance, which ggml's kernels encode as zeros: another text needs them."""
    hp = replace(MOE, n_layers=2)
    imatrix = random_imatrix(hp)
    for entry in imatrix.entries.values():
        entry.sums[:, :] = 0
        entry.sums[1:, 32:] = 1
    source = write_tiny(tmp_path / "source.gguf", hp, "f16")
    overrides = Overrides(tensors=(Override(re.compile("blk.*"), kind),))
    out = tmp_path / "out.gguf"
    quantize_file(plan_quantization(source, resolve("Q8_0"), overrides, imatrix=imatrix), out)
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_gate_exps.weight"):
        before, after = weights(source, name), weights(out, name)
        for columns in (slice(0, 32), slice(32, None)):
            error = np.linalg.norm(after[..., columns] - before[..., columns])
            assert error < 0.2 * np.linalg.norm(before[..., columns])


def test_cold_experts_are_filled_up() -> None:
    """Guards: cold experts taken for important everywhere, as in llama.cpp's tool; warm ones changed; a step
    where one becomes the other.
    """
    few = MIN_TOKENS
    warm, cold, none = [8.0 * few, 2.0 * few], [30.0, 0.0], [0.0, 0.0]
    imatrix = of([warm, cold, none], [few, 10, 0])
    found = imatrix.importance("w", (3, 5, 2))
    assert found is not None
    layer = (np.array(warm) + cold) / (few + 10)
    assert found[0].tolist() == [8, 2]
    np.testing.assert_allclose(found[1], (np.array(cold) + (few - 10) * layer) / few, rtol=1e-6)
    np.testing.assert_allclose(found[2], layer, rtol=1e-6)
    just = of([warm, [few - 1.0, 3.0 * few]], [few, few - 1]).importance("w", (2, 5, 2))
    enough = of([warm, [few - 1.0, 3.0 * few]], [few, few]).importance("w", (2, 5, 2))
    assert just is not None
    assert enough is not None
    np.testing.assert_allclose(just, enough, rtol=0.15)


def test_what_is_not_known() -> None:
    """Guards: importance made up for a tensor that was never seen."""
    imatrix = of([[0.0, 0.0]], [0])
    assert imatrix.importance("w", (5, 2)) is None
    assert imatrix.importance("other", (5, 2)) is None


def test_zeros_are_lifted() -> None:
    """Guards: a channel that counts nothing, and a matrix none of whose channels counts."""
    found = of([[0.0, 4.0]], [2]).importance("w", (5, 2))
    assert found is not None
    assert found[0, 1] == 2
    assert 0 < found[0, 0] < 1e-5
    found = of([[0.0, 0.0], [200.0, 200.0]], [100, 100]).importance("w", (2, 5, 2))
    assert found is not None
    assert found[1].tolist() == [2, 2]
    assert 0 < found[0, 0] == found[0, 1] < 1e-5


@pytest.mark.parametrize(
    ("sums", "counts", "shape"),
    [([[1.0, 2.0]], [3], (5, 3)), ([[1.0, 2.0]], [3], (2, 5, 2)), ([[1.0], [2.0]], [3, 4], (5, 2))],
    ids=["columns", "experts", "one for two"],
)
def test_another_model_is_refused(sums: list[list[float]], counts: list[int], shape: tuple[int, ...]) -> None:
    """Guards: importance read beyond its end, or of other channels."""
    with pytest.raises(UsageError, match="of another model"):
        of(sums, counts).importance("w", shape)


def test_a_matrix_of_another_model_plans_nothing(models: dict[str, tuple[Path, Path]]) -> None:
    """Guards: hours of work before the refusal."""
    with pytest.raises(UsageError, match="of another model") as raised:
        plan_quantization(models["narrow"][0], resolve("q4"), imatrix=read_imatrix(models["moe"][1]))
    assert "dsmoe imatrix" in str(raised.value)


def test_merging_adds_up() -> None:
    """Guards: counts that are lost, texts named twice, tensors that one part alone has seen left out."""
    first, second = random_imatrix(NARROW, seed=1), random_imatrix(NARROW, seed=2)
    more = Imatrix(
        {**second.entries, "new": Statistics(np.ones((1, 2), np.float32), np.array([5]))},
        ("b", *first.datasets),
        3,
        1024,
    )
    total = merged([first, more])
    assert total.datasets == (*first.datasets, "b")
    assert (total.n_chunks, total.chunk_size) == (18, 512)
    assert total.entries.keys() == more.entries.keys()
    for name, entry in first.entries.items():
        other = second.entries[name]
        np.testing.assert_allclose(total.entries[name].sums, entry.sums + other.sums, rtol=1e-6)
        assert total.entries[name].counts.tolist() == (entry.counts + other.counts).tolist()
    assert total.entries["new"].counts.tolist() == [5]


def test_only_what_adds_up_is_merged() -> None:
    """Guards: sums of two models in one file, windows counted as tokens."""
    with pytest.raises(UsageError, match="of different models"):
        merged([random_imatrix(NARROW), random_imatrix(MOE)])
    whole = random_imatrix(MOE)
    renamed = {name.replace("blk", "layer"): entry for name, entry in whole.entries.items()}
    with pytest.raises(UsageError, match="no tensor in common"):
        merged([whole, replace(whole, entries=renamed)])
    first, last = (dict([item]) for item in list(whole.entries.items())[:: len(whole.entries) - 1])
    parts = [replace(whole, entries=entries) for entries in (first, whole.entries, last)]
    assert merged(parts).entries.keys() == whole.entries.keys(), "in whatever order"
    old = of([[1.0]], [1])
    with pytest.raises(UsageError, match="in the legacy format"):
        merged([random_imatrix(MOE), Imatrix(old.entries, (), 1, 0, "old.dat")])
