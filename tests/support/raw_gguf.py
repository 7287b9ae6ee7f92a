"""GGUF files written byte by byte with struct, so that they can be wrong in any way a test wants.

Independent of the project's writer and of the `gguf` package, which refuse to write what tests need.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9
_PACK = {0: "<B", UINT16: "<H", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<B", 10: "<Q", 12: "<d"}
F32, F16, Q8_0 = 0, 1, 8


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack(_PACK[kind], value)


@dataclass(frozen=True)
class KeyValue:
    key: str | bytes
    kind: int
    value: Any
    item: int | None = None
    count: int | None = None

    def encode(self) -> bytes:
        head = text(self.key) + struct.pack("<I", self.kind)
        if self.kind != ARRAY:
            return head + scalar(self.kind, self.value)
        assert self.item is not None
        count = len(self.value) if self.count is None else self.count
        items = b"".join(scalar(self.item, value) for value in self.value)
        return head + struct.pack("<IQ", self.item, count) + items


@dataclass(frozen=True)
class Tensor:
    """`ne` in GGUF order: columns first. `offset` None: placed after the one before."""

    name: str | bytes
    ne: tuple[int, ...]
    kind: int = F32
    offset: int | None = None
    n_dimensions: int | None = None

    @property
    def n_bytes(self) -> int:
        count = 1
        for size in self.ne:
            count *= size
        return count * {F32: 4, F16: 2}.get(self.kind, 0) or count // 32 * 34


@dataclass(frozen=True)
class RawGguf:
    values: Sequence[KeyValue] = ()
    tensors: Sequence[Tensor] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_values: int | None = None
    cut: int = 0
    alignment: int = 32
    data: bytes | None = field(default=None, repr=False)

    def with_value(self, changed: KeyValue) -> RawGguf:
        rest = [value for value in self.values if value.key != changed.key]
        return replace(self, values=[*rest, changed])

    def without(self, key: str) -> RawGguf:
        return replace(self, values=[value for value in self.values if value.key != key])

    def with_tensor(self, changed: Tensor) -> RawGguf:
        known = [tensor.name for tensor in self.tensors]
        if changed.name not in known:
            return replace(self, tensors=[*self.tensors, changed])
        return replace(self, tensors=[changed if t.name == changed.name else t for t in self.tensors])

    def without_tensor(self, name: str) -> RawGguf:
        return replace(self, tensors=[tensor for tensor in self.tensors if tensor.name != name])

    def encode(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_values = len(self.values) if self.n_values is None else self.n_values
        out = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_values)
        out += b"".join(value.encode() for value in self.values)
        end = 0
        for tensor in self.tensors:
            offset = end if tensor.offset is None else tensor.offset
            n_dimensions = len(tensor.ne) if tensor.n_dimensions is None else tensor.n_dimensions
            out += text(tensor.name) + struct.pack("<I", n_dimensions)
            out += b"".join(struct.pack("<Q", size) for size in tensor.ne)
            out += struct.pack("<IQ", tensor.kind, offset)
            end = max(end, offset + -(-tensor.n_bytes // 32) * 32)
        out += bytes(-len(out) % self.alignment)
        out += bytes(end) if self.data is None else self.data
        return out[: len(out) - self.cut]

    def write(self, path: Path) -> Path:
        path.write_bytes(self.encode())
        return path


def tiny_model(n_layers: int = 2, n_vocab: int = 8) -> RawGguf:
    """A correct `deepseek` file of zeros: 64 wide, 4 routed experts of 32, one shared, layer 0 dense."""
    width, expert, ffn = 64, 32, 96
    values = [
        KeyValue("general.architecture", STRING, "deepseek"),
        KeyValue("general.name", STRING, "tiny"),
        KeyValue("deepseek.block_count", UINT32, n_layers),
        KeyValue("deepseek.context_length", UINT32, 64),
        KeyValue("deepseek.embedding_length", UINT32, width),
        KeyValue("deepseek.feed_forward_length", UINT32, ffn),
        KeyValue("deepseek.attention.head_count", UINT32, 4),
        KeyValue("deepseek.attention.head_count_kv", UINT32, 4),
        KeyValue("deepseek.attention.layer_norm_rms_epsilon", FLOAT32, 1e-6),
        KeyValue("deepseek.leading_dense_block_count", UINT32, 1),
        KeyValue("deepseek.expert_count", UINT32, 4),
        KeyValue("deepseek.expert_used_count", UINT32, 2),
        KeyValue("deepseek.expert_shared_count", UINT32, 1),
        KeyValue("deepseek.expert_feed_forward_length", UINT32, expert),
        KeyValue("tokenizer.ggml.model", STRING, "gpt2"),
        KeyValue("tokenizer.ggml.tokens", ARRAY, [f"t{n}" for n in range(n_vocab)], STRING),
        KeyValue("tokenizer.ggml.token_type", ARRAY, [1] * n_vocab, INT32),
        KeyValue("tokenizer.ggml.merges", ARRAY, ["t 0", "t 1"], STRING),
        KeyValue("tokenizer.ggml.bos_token_id", UINT32, 0),
        KeyValue("tokenizer.ggml.eos_token_id", UINT32, 1),
        KeyValue("tokenizer.ggml.add_bos_token", BOOL, 1),
    ]
    tensors = [
        Tensor("token_embd.weight", (width, n_vocab)),
        Tensor("output_norm.weight", (width,)),
        Tensor("output.weight", (width, n_vocab)),
    ]
    for layer in range(n_layers):
        block = f"blk.{layer}."
        tensors += [
            Tensor(f"{block}attn_norm.weight", (width,)),
            *(Tensor(f"{block}attn_{name}.weight", (width, width)) for name in ("q", "k", "v", "output")),
            Tensor(f"{block}ffn_norm.weight", (width,)),
        ]
        if layer == 0:
            tensors += [
                Tensor(f"{block}ffn_gate.weight", (width, ffn)),
                Tensor(f"{block}ffn_up.weight", (width, ffn)),
                Tensor(f"{block}ffn_down.weight", (ffn, width)),
            ]
            continue
        tensors += [
            Tensor(f"{block}ffn_gate_inp.weight", (width, 4)),
            Tensor(f"{block}ffn_gate_exps.weight", (width, expert, 4)),
            Tensor(f"{block}ffn_up_exps.weight", (width, expert, 4)),
            Tensor(f"{block}ffn_down_exps.weight", (expert, width, 4)),
            Tensor(f"{block}ffn_gate_shexp.weight", (width, expert)),
            Tensor(f"{block}ffn_up_shexp.weight", (width, expert)),
            Tensor(f"{block}ffn_down_shexp.weight", (expert, width)),
        ]
    return RawGguf(values, tensors)
