"""The strict reader: correct files pass, each kind of damage is refused with a short message."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.raw_gguf import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    Q8_0,
    STRING,
    UINT16,
    UINT32,
    KeyValue,
    RawGguf,
    Tensor,
    tiny_model,
)

from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import RopeScaling

GOOD = tiny_model()
NAME = KeyValue("general.name", STRING, "x")
ONE = Tensor("a", (32,))

STRUCTURE = {
    "empty file": RawGguf(magic=b"", cut=20),
    "other magic": replace(GOOD, magic=b"GGML"),
    "version 1": replace(GOOD, version=1),
    "big-endian": replace(GOOD, version=3 << 24),
    "2^40 tensors": replace(GOOD, n_tensors=1 << 40),
    "2^63 fields": replace(GOOD, n_values=1 << 63),
    "one tensor too many": replace(RawGguf([NAME], [ONE], n_tensors=2), data=b""),
    "truncated data": replace(GOOD, cut=100),
    "last byte missing": RawGguf([], [ONE], data=bytes(127)),
    "truncated header": RawGguf([NAME], cut=40),
    "duplicate key": RawGguf([NAME, NAME]),
    "empty key": RawGguf([KeyValue("", STRING, "x")]),
    "unknown type": RawGguf([KeyValue("a", 0, 1), replace(NAME, kind=STRING)], version=3).with_value(
        KeyValue("b", ARRAY, [], 77)
    ),
    "boolean 2": RawGguf([KeyValue("a", BOOL, 2)]),
    "boolean 2 in an array": RawGguf([KeyValue("a", ARRAY, [0, 2], BOOL)]),
    "nested array": RawGguf([KeyValue("a", ARRAY, [], ARRAY)]),
    "array of 2^40 numbers": RawGguf([KeyValue("a", ARRAY, [1], UINT32, count=1 << 40)]),
    "array of 2^40 strings": RawGguf([KeyValue("a", ARRAY, ["x"], STRING, count=1 << 40)]),
    "array one string short": RawGguf([KeyValue("a", ARRAY, ["x", "y"], STRING, count=12)]),
    "not UTF-8": RawGguf([KeyValue("a", STRING, b"\xff\xfe")]),
    "not UTF-8 in an array": RawGguf([KeyValue("a", ARRAY, [b"ok", b"\xff"], STRING)]),
    "alignment 3": RawGguf([KeyValue("general.alignment", UINT32, 3)], [ONE]),
    "alignment 0": RawGguf([KeyValue("general.alignment", UINT32, 0)], [ONE]),
    "alignment as text": RawGguf([KeyValue("general.alignment", STRING, "32")], [ONE]),
    "duplicate tensor": RawGguf([], [ONE, ONE]),
    "overlapping tensors": RawGguf([], [Tensor("a", (32,)), Tensor("b", (32,), offset=64)]),
    "tensor past the end": RawGguf([], [Tensor("a", (32,), offset=1 << 50)], data=bytes(128)),
    "a hole between tensors": RawGguf([], [ONE, Tensor("b", (32,), offset=256)]),
    "tensors in another order": RawGguf([], [Tensor("a", (32,), offset=128), Tensor("b", (32,), offset=0)]),
    "unaligned tensor": RawGguf([], [Tensor("a", (32,), offset=4)], data=bytes(256)),
    "no dimensions": RawGguf([], [Tensor("a", ())]),
    "five dimensions": RawGguf([], [Tensor("a", (1, 1, 1, 1, 1))]),
    "zero columns": RawGguf([], [Tensor("a", (0, 4))]),
    "2^62 rows": RawGguf([], [Tensor("a", (32, 1 << 62), n_dimensions=2)], data=bytes(128)),
    "overflowing shape": RawGguf([], [Tensor("a", (1 << 33, 1 << 33))], data=bytes(128)),
    "unknown tensor type": RawGguf([], [Tensor("a", (32,), kind=99)], data=bytes(128)),
    "columns no block divides": RawGguf([], [Tensor("a", (33,), kind=Q8_0)], data=bytes(128)),
    "long tensor name": RawGguf([], [Tensor("a" * 64, (32,))]),
}


def check_refused(path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read_model(path)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert str(path) in message


@pytest.mark.parametrize("name", STRUCTURE)
def test_structural_damage_is_refused(tmp_path: Path, name: str) -> None:
    """Guards llama.cpp against files that it aborts on or silently accepts."""
    path = STRUCTURE[name].write(tmp_path / "bad.gguf")
    with pytest.raises(FormatError) as caught:
        read_gguf(path)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_good_file_passes(tmp_path: Path) -> None:
    """Guards against strictness that refuses correct files, and against swapped dimensions."""
    file, hp = read_model(GOOD.write(tmp_path / "good.gguf"))
    assert (hp.n_layers, hp.n_routed_experts, hp.n_experts_per_token, hp.n_vocab) == (2, 4, 2, 8)
    assert hp.rms_norm_eps == 1e-6
    assert file.tensors["blk.1.ffn_down_exps.weight"].shape == (4, 64, 32)
    assert list(file.tensors) == [tensor.name for tensor in GOOD.tensors]


def number(key: str, value: float, kind: int = UINT32) -> RawGguf:
    return GOOD.with_value(KeyValue(f"deepseek.{key}", kind, value))


def token_id(name: str, value: int, kind: int = UINT32) -> RawGguf:
    return GOOD.with_value(KeyValue(f"tokenizer.ggml.{name}_token_id", kind, value))


def with_tokens(*first: str) -> RawGguf:
    tokens = [*first, *(f"t{n}" for n in range(len(first), 8))]
    return GOOD.with_value(KeyValue("tokenizer.ggml.tokens", ARRAY, tokens, STRING))


MEANING = {
    "no architecture": GOOD.without("general.architecture"),
    "other architecture": GOOD.with_value(KeyValue("general.architecture", STRING, "qwen2")),
    "0 layers": number("block_count", 0),
    "513 layers": number("block_count", 513),
    "layers as int32": number("block_count", 2, INT32),
    "0 experts used": number("expert_used_count", 0),
    "more used than there are": number("expert_used_count", 5),
    "no shared experts": GOOD.without("deepseek.expert_shared_count"),
    "all layers dense": number("leading_dense_block_count", 2),
    "eps NaN": number("attention.layer_norm_rms_epsilon", float("nan"), FLOAT32),
    "eps 0": number("attention.layer_norm_rms_epsilon", 0.0, FLOAT32),
    "attention to what comes": number("attention.causal", 0, BOOL),
    "groups of experts": number("expert_group_count", 4),
    "groups that are used": number("expert_group_used_count", 2),
    "layers for the next token": number("nextn_predict_layers", 3),
    "pooled outputs": number("pooling_type", 1),
    "outputs of another width": number("embedding_length_out", 8),
    "rotary scaling of old": number("rope.scale_linear", 4.0, FLOAT32),
    "a magnitude without YaRN": number("rope.scaling.attn_factor", 2.0, FLOAT32),
    "a magnitude that is none": number("rope.scaling.attn_factor", float("nan"), FLOAT32),
    "a factor that is text": GOOD.with_value(KeyValue("deepseek.rope.scaling.factor", STRING, "2")),
    "a context before scaling that is a float": number("rope.scaling.original_context_length", 8.0, FLOAT32),
    "linear scaling by nothing": GOOD.with_value(KeyValue("deepseek.rope.scaling.type", STRING, "linear")),
    "eps negative": number("attention.layer_norm_rms_epsilon", -1.0, FLOAT32),
    "eps infinite": number("attention.layer_norm_rms_epsilon", float("inf"), FLOAT32),
    "context 0": number("context_length", 0),
    "heads 0": number("attention.head_count", 0),
    "heads 5": number("attention.head_count", 5),
    "kv heads 3": number("attention.head_count_kv", 3),
    "sigmoid gating": number("expert_gating_func", 2),
    "normalised weights": number("expert_weights_norm", 1, BOOL),
    "unknown rotary scaling": GOOD.with_value(KeyValue("deepseek.rope.scaling.type", STRING, "dynamic")),
    "missing tensor": GOOD.without_tensor("blk.1.ffn_gate_inp.weight"),
    "extra tensor": GOOD.with_tensor(Tensor("blk.1.attn_output.bias", (64,))),
    "wrong shape": GOOD.with_tensor(Tensor("blk.1.ffn_gate_inp.weight", (64, 8))),
    "wrong rank": GOOD.with_tensor(Tensor("blk.1.ffn_gate_exps.weight", (64, 128))),
    "a norm of 16 bits": GOOD.with_tensor(Tensor("output_norm.weight", (64,), kind=1)),
    "a norm in blocks": GOOD.with_tensor(Tensor("blk.1.ffn_norm.weight", (64,), kind=Q8_0)),
    "factors of rotation in blocks": GOOD.with_tensor(Tensor("rope_freqs.weight", (32,), kind=Q8_0)),
    "integer weights": GOOD.with_tensor(Tensor("blk.0.attn_q.weight", (64, 64), kind=26)),
    "eot as int32": token_id("eot", 1, INT32),
    "a flag that is a number": GOOD.with_value(KeyValue("tokenizer.ggml.add_bos_token", UINT32, 1)),
    "a pre-tokenizer that is a number": GOOD.with_value(KeyValue("tokenizer.ggml.pre", UINT32, 1)),
    "a name that is a number": GOOD.with_value(KeyValue("general.name", UINT32, 1)),
    "a name of another family": GOOD.with_value(KeyValue("general.name", STRING, "my Phi-3 MoE")),
    "a token with a NUL": with_tokens("t0", "t0\0", "t2"),
    "a token with the name of an empty one": with_tokens("", "[EMPTY_0]"),
    "types that are floats": GOOD.with_value(
        KeyValue("tokenizer.ggml.token_type", ARRAY, [1.0] * 8, FLOAT32)
    ),
    "scores that are text": GOOD.with_value(KeyValue("tokenizer.ggml.scores", ARRAY, ["1"] * 8, STRING)),
    "suppressed tokens that are none": GOOD.with_value(KeyValue("tokenizer.ggml.suppress_tokens", UINT32, 1)),
    "bytes without tokens": GOOD.with_value(KeyValue("tokenizer.ggml.model", STRING, "llama")),
    "a tokenizer that is a list": GOOD.with_value(KeyValue("tokenizer.ggml.model", ARRAY, ["x"], STRING)),
    "eos negative": token_id("eos", -1, INT32),
    "no tokens": GOOD.without("tokenizer.ggml.tokens"),
    "no merges": GOOD.without("tokenizer.ggml.merges"),
    "tokens are one flag": GOOD.with_value(KeyValue("tokenizer.ggml.tokens", BOOL, 1)),
    "tokens are numbers": GOOD.with_value(KeyValue("tokenizer.ggml.tokens", ARRAY, [1] * 8, INT32)),
    "a token twice": GOOD.with_value(KeyValue("tokenizer.ggml.tokens", ARRAY, ["a"] * 8, STRING)),
    "too few token types": GOOD.with_value(KeyValue("tokenizer.ggml.token_type", ARRAY, [1], INT32)),
    "a merge without a space": GOOD.with_value(KeyValue("tokenizer.ggml.merges", ARRAY, ["ab"], STRING)),
}


@pytest.mark.parametrize("name", MEANING)
def test_senseless_values_are_refused(tmp_path: Path, name: str) -> None:
    """Guards llama.cpp against values that it aborts on or computes nonsense with."""
    check_refused(MEANING[name].write(tmp_path / "bad.gguf"))


def test_the_least_epsilon(tmp_path: Path) -> None:
    """A value that a configuration may have, refused in the file because 32 bits make it a little less."""
    file = number("attention.layer_norm_rms_epsilon", 1e-12, FLOAT32).write(tmp_path / "model.gguf")
    assert read_model(file)[1].rms_norm_eps == 1e-12


def test_scaling_without_a_type(tmp_path: Path) -> None:
    """A factor that llama.cpp scales by, taken for none because nothing says how."""
    file = number("rope.scaling.factor", 4.0, FLOAT32).write(tmp_path / "model.gguf")
    assert read_model(file)[1].rope_scaling == RopeScaling("linear", 4.0)


def test_metadata_cannot_forge_a_message(tmp_path: Path) -> None:
    """Guards the terminal against escape sequences and newlines in a file's own names."""
    evil = KeyValue("general.architecture", STRING, "x\x1b[2J\nerror: all is well")
    with pytest.raises(FormatError) as caught:
        read_model(GOOD.with_value(evil).write(tmp_path / "evil.gguf"))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_absent_file_and_folder(tmp_path: Path) -> None:
    """Guards the message for a path that is wrong."""
    with pytest.raises(FileError, match="No such file"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(FileError, match="this is a folder"):
        read_gguf(tmp_path)


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes that Python objects took at most meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_small_header_takes_little(tmp_path: Path) -> None:
    """64 MiB of weights that are read for each model in a list."""
    path = GOOD.write(tmp_path / "model.gguf")
    os.truncate(path, 1 << 30)
    with path.open("rb") as file, pytest.MonkeyPatch.context() as patch:
        read: list[int] = []
        patch.setattr(Path, "open", lambda self, mode: Counted(file, read))
        assert peak_memory(lambda: read_model(path)) < 1 << 20
    assert sum(read) <= 64 << 10


class Counted:
    """A file that notes how much is read of it."""

    def __init__(self, file: BinaryIO, read: list[int]) -> None:
        self._file, self._read = file, read
        self.fileno = file.fileno

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._read.append(len(content))
        return content


def test_a_large_header_is_read_once(tmp_path: Path) -> None:
    """A header that is larger than what is read at first: bytes that are lost, or read again each time."""
    tokens = [f"token {number}" for number in range(40_000)]
    path = RawGguf([KeyValue("a", ARRAY, tokens, STRING), NAME], [ONE]).write(tmp_path / "model.gguf")
    with path.open("rb") as file, pytest.MonkeyPatch.context() as patch:
        read: list[int] = []
        patch.setattr(Path, "open", lambda self, mode: Counted(file, read))
        found = read_gguf(path)
    assert found.get("a") == tokens
    assert found.get("general.name") == "x"
    assert sum(read) <= path.stat().st_size


def hollow(path: Path, head: RawGguf) -> Path:
    """A file of a gigabyte that takes up no room, whose header says what `head` does."""
    head.write(path)
    os.truncate(path, 1 << 30)
    return path


HOLLOW = {
    "a string of half a gigabyte": RawGguf([KeyValue("a", STRING, "x")]),
    "a hundred million numbers": RawGguf([KeyValue("a", ARRAY, [], 0, count=100_000_000)], n_tensors=1),
    "a hundred million strings": RawGguf([KeyValue("a", ARRAY, [], STRING, count=100_000_000)], n_tensors=1),
    "many times three million": RawGguf(
        [KeyValue(name, ARRAY, [0] * 3_000_000, 0) for name in "ab"], n_tensors=1
    ),
}


@pytest.mark.parametrize("case", HOLLOW)
def test_a_hollow_file(case: str, tmp_path: Path) -> None:
    """A file that claims, within its size, more than memory holds: the machine swaps for minutes."""
    path = hollow(tmp_path / "model.gguf", HOLLOW[case])
    if case.startswith("a string"):
        with path.open("r+b") as file:
            file.seek(24 + 8 + 1 + 4)
            file.write((1 << 29).to_bytes(8, "little"))

    def read() -> None:
        with pytest.raises(FormatError, match=r"header exceeds|more than 4194304 items"):
            read_gguf(path)

    assert peak_memory(read) < 256 << 20


BYTES = GOOD.encode()


@settings(max_examples=300)
@given(position=st.integers(0, 3000), value=st.integers(0, 255), cut=st.just(0) | st.integers(1, 3000))
def test_any_damage_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    """Guards against crashes of the reader itself on arbitrary bytes, in whole files (which are read to their
    end) and in cut ones.
    """
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    damaged = bytearray(BYTES[: len(BYTES) - cut])
    damaged[position] = value
    path.write_bytes(damaged)
    with suppress(FormatError):
        read_model(path)


@pytest.mark.parametrize("n_files", [0, 1])
def test_files_that_were_joined(n_files: int, tmp_path: Path) -> None:
    """A model refused for its past."""
    file, _ = read_model(GOOD.with_value(KeyValue("split.count", UINT16, n_files)).write(tmp_path / "x.gguf"))
    assert "split.count" not in file.metadata


def test_a_count_of_files_of_another_type(tmp_path: Path) -> None:
    """llama.cpp refuses it, in whatever words."""
    path = GOOD.with_value(KeyValue("split.count", UINT32, 1)).write(tmp_path / "x.gguf")
    with pytest.raises(FormatError, match="has the type UINT32"):
        read_model(path)
