"""FP8 checkpoints: weights in E4M3 with a scale per block, against torch; and those that are refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import TINY, random_weights, write_checkpoint
from support.hub_server import Hub, serving
from support.kills import Job

from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_convert.fp8 import Fp8Rows, Scales
from dsmoe_convert.rows import StackedRows
from dsmoe_convert.shards import StoredTensor
from dsmoe_convert.sources import SourceOptions, convert
from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.progress import Event, Note
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_model import read_model

Tensors = dict[str, torch.Tensor]

BLOCK = (24, 40)
"""Divides none of the sizes of the tiny model, so that most matrices have partial blocks on both edges."""
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}
QUERY = "model.layers.1.self_attn.q_proj.weight"
ROUTED = "model.layers.1.mlp.experts.3.up_proj.weight"


def in_blocks(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """One scale per weight."""
    return scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def quantized(weights: Tensors) -> tuple[Tensors, Tensors]:
    """A checkpoint in FP8, as on the hub, and the same in F32 by torch.

    Norms, routers and the embedding stay in BF16. The scales come last, away from their weights.
    """
    stored: Tensors = {}
    scales: Tensors = {}
    plain: Tensors = {}
    for name, weight in weights.items():
        if not name.endswith("proj.weight"):
            stored[name] = weight.bfloat16()
            plain[name] = stored[name].float()
            continue
        rows, columns = (-(-size // length) for size, length in zip(weight.shape, BLOCK, strict=True))
        generator = torch.Generator().manual_seed(len(stored))
        scale = 0.001 + 0.004 * torch.rand((rows, columns), generator=generator)
        spread = in_blocks(scale, BLOCK, weight.shape)
        stored[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales[f"{name}_scale_inv"] = scale
        plain[name] = stored[name].float() * spread
    return {**stored, **scales}, plain


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model in FP8 and in F32."""
    folder = tmp_path_factory.mktemp("fp8")
    stored, plain = quantized(random_weights(TINY))
    return (
        write_checkpoint(folder / "fp8", weights=stored, quantization_config=QUANTIZATION),
        write_checkpoint(folder / "f32" / "fp8", weights=plain),
    )


@pytest.mark.parametrize("word", ["f32", "bf16", "f16", "Q8_0", "Q4_0"])
def test_every_type(word: str, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """A scale of another block, a weight rounded twice, or query rows permuted before they are scaled."""
    found, expected = (
        convert_folder(source, tmp_path / f"{number}.gguf", ConvertOptions(word)).path.read_bytes()
        for number, source in enumerate(checkpoints)
    )
    assert found == expected


def test_own_type(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """A default of F32, four times as large as the checkpoint, or a useless note about mixed types."""
    notes: list[Event] = []
    out = tmp_path / "out.gguf"
    convert_folder(checkpoints[0], out, None, RunOptions(listen=notes.append))
    types = {name: tensor.type for name, tensor in read_model(out)[0].tensors.items()}
    assert types["blk.1.attn_q.weight"] is types["token_embd.weight"] is GgmlType.BF16
    assert types["blk.1.ffn_gate_inp.weight"] is GgmlType.F32
    assert not [note for note in notes if isinstance(note, Note) and "float type" in note.text]
    explicit = convert_folder(checkpoints[0], tmp_path / "explicit.gguf", ConvertOptions("bf16"))
    assert out.read_bytes() == explicit.path.read_bytes()


def test_low_disk(checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for a shard that has only scales, or its deletion while weights of another shard need it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("dsmoe_quantize.write.pipeline.SYNC_SECONDS", 0.01)
    expected = convert(str(checkpoints[0]), tmp_path / "expected.gguf").path.read_bytes()
    with serving(Hub(checkpoints[0], repository="tester/fp8")) as hub:
        options = SourceOptions(endpoint=hub.url, low_disk=True)
        out = convert(hub.repository, tmp_path / "out.gguf", None, options).path
    assert out.read_bytes() == expected


def work(source: str, out: str) -> None:
    convert_folder(Path(source), Path(out), ConvertOptions("Q8_0"), RunOptions(threads=1))


def test_a_killed_conversion_continues(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """A resumed run that reads scales from other places, or starts over."""
    expected = convert_folder(checkpoints[0], tmp_path / "expected.gguf", ConvertOptions("Q8_0")).path
    job = Job(work, [str(checkpoints[0])], tmp_path / "out.gguf")
    assert job.run("output.complete")[0] == -signal.SIGKILL
    summary = convert_folder(checkpoints[0], job.out, ConvertOptions("Q8_0"))
    assert summary.n_resumed > 0
    assert job.out.read_bytes() == expected.read_bytes()


def test_other_blocks_start_over(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """A resumed run that mixes two meanings of the scales: the block is in config.json, not in a shard."""
    source = tmp_path / "fp8"
    source.mkdir()
    for file in checkpoints[0].iterdir():
        os.link(file, source / file.name)
    job = Job(work, [str(source)], tmp_path / "out.gguf")
    assert job.run("output.complete")[0] == -signal.SIGKILL
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [24, 41]
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    assert convert_folder(source, job.out, ConvertOptions("Q8_0")).n_resumed == 0


class Memory:
    """A ShardSource over tensors in memory, which are shards of their own."""

    def __init__(self, tensors: Tensors) -> None:
        self.content = {
            name: tensor.contiguous().view(torch.uint8).numpy() for name, tensor in tensors.items()
        }

    def arrange(self, wanted: object) -> list[str]:
        return []

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        buffer[:] = self.content[tensor.name].reshape(-1)[start : start + len(buffer)].data

    def release(self, names: object) -> None:
        pass

    def close(self) -> None:
        pass


def stored(name: str, tensor: torch.Tensor, dtype: str) -> StoredTensor:
    return StoredTensor(name, dtype, tuple(tensor.shape), name, 0, tensor.nbytes)


@settings(max_examples=200)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    span=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    scale_type=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_rows(
    shape: tuple[int, int],
    block: tuple[int, int],
    span: tuple[float, float],
    scale_type: torch.dtype,
    seed: int,
) -> None:
    """Rows of a slab that starts or ends within a block; each byte that is a number; both types of scales."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([byte for byte in range(256) if byte not in (0x7F, 0xFF)], dtype=torch.uint8)
    picked = torch.randint(len(numbers), (2, *shape), generator=generator)
    weights = numbers[picked].view(torch.float8_e4m3fn)
    n_blocks = tuple(-(-size // length) for size, length in zip(shape, block, strict=True))
    scales = torch.randn((2, *n_blocks), generator=generator).to(scale_type)
    dtype = "F32" if scale_type is torch.float32 else "BF16"
    shards = Memory({"0": weights[0], "1": weights[1], "0s": scales[0], "1s": scales[1]})
    parts = tuple(stored(str(number), weights[number], "F8_E4M3") for number in (0, 1))
    found = Scales(block, {str(number): stored(f"{number}s", scales[number], dtype) for number in (0, 1)})
    rows = Fp8Rows(StackedRows(shards, parts), shards, shape, found, ("0", "1"))
    start = min(shape[0] - 1, int(span[0] * shape[0]))
    n_rows = max(1, round(span[1] * (shape[0] - start)))
    for number in (0, 1):
        raw = rows.read(number * shape[0] + start, n_rows, np.empty(4 * n_rows * shape[1], np.uint8))
        spread = in_blocks(scales[number].float(), block, torch.Size(shape))
        expected = (weights[number].float() * spread)[start : start + n_rows]
        assert raw.tobytes() == expected.contiguous().numpy().tobytes()


Change = Callable[[Tensors], object]

WEIGHTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no scale": (lambda w: w.pop(f"{ROUTED}_scale_inv"), (f"{ROUTED}_scale_inv is missing", "download")),
    "a scale of another shape": (
        lambda w: w.update({f"{QUERY}_scale_inv": torch.ones(3, 3)}),
        (f"{QUERY}_scale_inv", "[3, 3], not [3, 2]", "weight_block_size"),
    ),
    "a flat scale": (lambda w: w.update({f"{QUERY}_scale_inv": torch.ones(6)}), ("[6], not [3, 2]",)),
    "a scale in another type": (
        lambda w: w.update({f"{QUERY}_scale_inv": torch.ones(3, 2).half()}),
        (f"{QUERY}_scale_inv", "F16", "accepted: F32, BF16"),
    ),
    "a scale of a BF16 weight": (
        lambda w: w.update({QUERY: w[QUERY].bfloat16()}),
        (f"{QUERY}_scale_inv has no F8_E4M3 weight",),
    ),
    "a scale of no weight": (
        lambda w: w.update({"model.layers.9.x_scale_inv": torch.ones(3, 2)}),
        ("layers.9.x_scale_inv has no",),
    ),
    "a vector": (
        lambda w: w.update(
            {
                "model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn),
                "model.norm.weight_scale_inv": torch.ones(2),
            }
        ),
        ("model.norm.weight", "not a matrix"),
    ),
    "one expert in BF16": (
        lambda w: w.update({ROUTED: w[ROUTED].bfloat16()}) or w.pop(f"{ROUTED}_scale_inv"),
        (ROUTED, "all experts"),
    ),
    "NaN": (lambda w: w[QUERY].view(torch.uint8)[25, 5].fill_(0x7F), (f"{QUERY}[25, 5]", "NaN")),
    "negative NaN": (lambda w: w[ROUTED].view(torch.uint8)[31, 63].fill_(0xFF), (f"{ROUTED}[31, 63]", "NaN")),
    "a scale that is NaN": (
        lambda w: w[f"{QUERY}_scale_inv"][2, 1].fill_(float("nan")),
        (f"{QUERY}_scale_inv[2, 1]", "a scale is NaN or infinite", "download"),
    ),
    "an infinite scale": (
        lambda w: w[f"{ROUTED}_scale_inv"][1, 0].fill_(float("inf")),
        (f"{ROUTED}_scale_inv[1, 0]", "a scale is NaN or infinite"),
    ),
    "a product that is too large": (
        lambda w: w[f"{QUERY}_scale_inv"].fill_(3e38),
        (QUERY, "infinite"),
    ),
}


def refused(folder: Path, out: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(DsmoeError) as caught:
        convert_folder(folder, out, ConvertOptions("Q8_0"))
    text = str(caught.value)
    assert not [word for word in words if word not in text], text
    assert len(text.splitlines()) <= 3
    assert not list(out.parent.glob(f"*{out.name}*"))


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_refused(case: str, tmp_path: Path) -> None:
    """Weights multiplied by the wrong scale, or by none: llama.cpp would run them with wrong output."""
    change, words = WEIGHTS[case]
    weights, _ = quantized(random_weights(TINY))
    change(weights)
    folder = write_checkpoint(tmp_path / "fp8", weights=weights, quantization_config=QUANTIZATION)
    refused(folder, tmp_path / "out.gguf", words)


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no block": ({"weight_block_size": None}, ("weight_block_size", "[128, 128]")),
    "one length": ({"weight_block_size": [128]}, ("weight_block_size", "[128, 128]")),
    "a number": ({"weight_block_size": 128}, ("weight_block_size = 128",)),
    "a block of nothing": ({"weight_block_size": [0, 128]}, ("weight_block_size",)),
    "a boolean": ({"weight_block_size": [True, 128]}, ("weight_block_size",)),
    "E5M2": ({"fmt": "e5m2"}, ("fmt", "e4m3")),
    "static activations": ({"activation_scheme": "static"}, ("activation_scheme", "dynamic")),
    "another method": ({"quant_method": "fbgemm_fp8"}, ("quantized already (fbgemm_fp8)",)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_are_refused(case: str, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """Another FP8 format, read as if it were this one."""
    change, words = CONFIGS[case]
    folder = tmp_path / "fp8"
    folder.mkdir()
    for file in checkpoints[0].iterdir():
        if file.name != "config.json":
            os.link(file, folder / file.name)
    config = json.loads((checkpoints[0] / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, tmp_path / "out.gguf", (*words, "quantization_config"))


def test_no_quantization_config(tmp_path: Path) -> None:
    """FP8 weights without the key that says how large a block is."""
    weights, _ = quantized(random_weights(TINY))
    folder = write_checkpoint(tmp_path / "fp8", weights=weights)
    refused(folder, tmp_path / "out.gguf", ("F8_E4M3", "without a quantization_config"))
