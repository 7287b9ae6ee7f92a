"""The header we lay out, read by the `gguf` package's reader and by our own."""

from __future__ import annotations

import os
import random
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGUFValueType

from dsmoe_local.model.ggml import GgmlType, Tensor
from dsmoe_local.model.gguf_file import Field, read_gguf
from dsmoe_local.model.gguf_model import hyperparameters_of, metadata_of
from dsmoe_local.model.gguf_writer import GgufPlan, plan_gguf, write_at
from dsmoe_local.model.hyperparameters import RopeScaling
from dsmoe_local.model.presets import PRESETS

METADATA = {
    "general.architecture": Field("deepseek", GGUFValueType.STRING),
    "a.uint8": Field(7, GGUFValueType.UINT8),
    "a.int64": Field(-5, GGUFValueType.INT64),
    "a.float": Field(0.5, GGUFValueType.FLOAT32),
    "a.bool": Field(True, GGUFValueType.BOOL),
    "a.text": Field("汉字 😀", GGUFValueType.STRING),
    "a.words": Field(["x", "", "ÿ"], GGUFValueType.ARRAY, GGUFValueType.STRING),
    "a.numbers": Field([1, -2], GGUFValueType.ARRAY, GGUFValueType.INT16),
    "a.empty": Field([], GGUFValueType.ARRAY, GGUFValueType.STRING),
}
TENSORS = [
    Tensor("matrix", (3, 64), GgmlType.F32),
    Tensor("experts", (4, 5, 96), GgmlType.Q8_0),
    Tensor("norm", (7,), GgmlType.F32),
]


def write(path: Path, plan: GgufPlan, data: dict[str, bytes]) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    os.truncate(descriptor, plan.size)
    for name in random.Random(1).sample(list(data), len(data)):
        write_at(descriptor, data[name], plan.offsets[name])
    write_at(descriptor, plan.header, 0)
    os.close(descriptor)


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    """Guards header, order of dimensions, padding and offsets against an independent reader."""
    path = tmp_path / "a.gguf"
    plan = plan_gguf(METADATA, TENSORS)
    data = {tensor.name: os.urandom(tensor.n_bytes) for tensor in TENSORS}
    write(path, plan, data)
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == [tensor.name for tensor in TENSORS]
    for planned, tensor in zip(TENSORS, reader.tensors, strict=True):
        assert tuple(reversed(tensor.shape.tolist())) == planned.shape
        assert tensor.tensor_type == planned.type
        assert np.asarray(tensor.data).tobytes() == data[planned.name]
    assert reader.fields["a.words"].contents() == ["x", "", "ÿ"]
    assert reader.fields["a.int64"].contents() == -5


def test_our_reader_gets_the_same_back(tmp_path: Path) -> None:
    """Guards copying: types of metadata survive, not only values."""
    path = tmp_path / "a.gguf"
    write(path, plan_gguf(METADATA, TENSORS), {tensor.name: bytes(tensor.n_bytes) for tensor in TENSORS})
    file = read_gguf(path)
    assert dict(file.metadata) == {key: field for key, field in METADATA.items() if key != "a.empty"}
    assert file.size == path.stat().st_size
    assert [(info.name, info.shape, info.type) for info in file.tensors.values()] == [
        (tensor.name, tensor.shape, tensor.type) for tensor in TENSORS
    ]


def test_metadata_of_a_model_is_read_back(tmp_path: Path) -> None:
    """Guards the two directions of the hyper-parameter keys against each other."""
    from dataclasses import replace

    base = PRESETS["deepseekmoe-16b"].hp
    for hp in (
        base,
        replace(base, n_kv_heads=4, routed_scaling_factor=2.5, rms_norm_eps=1e-5),
        replace(base, rope_scaling=RopeScaling("yarn", 4.0, 1024, 0.5)),
    ):
        metadata = {"general.architecture": METADATA["general.architecture"], **metadata_of(hp)}
        path = tmp_path / "a.gguf"
        path.unlink(missing_ok=True)
        output = Tensor("output.weight", (1, 32), GgmlType.F32)
        write(path, plan_gguf(metadata, [output]), {})
        assert replace(hyperparameters_of(read_gguf(path)), n_vocab=hp.n_vocab, name=hp.name) == hp


def test_a_large_vocabulary_reads_fast_enough_to_be_linear(tmp_path: Path) -> None:
    """Guards against quadratic work on 102,400 tokens and as many merges: a second window must be joined."""
    words = [f"token-{number}-{'x' * 400}" for number in range(102_400)]
    metadata = {
        "general.architecture": METADATA["general.architecture"],
        "tokenizer.ggml.tokens": Field(words, GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.ggml.merges": Field(words, GGUFValueType.ARRAY, GGUFValueType.STRING),
    }
    path = tmp_path / "big.gguf"
    plan = plan_gguf(metadata, [])
    assert len(plan.header) > 64 << 20
    write(path, plan, {})
    assert read_gguf(path).get("tokenizer.ggml.merges") == words
