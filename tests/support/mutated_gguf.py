"""Model files with damaged headers: bytes at random, or values and shapes that are well-formed and wrong."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from support.mutations import damaged_bytes
from support.raw_gguf import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    KeyValue,
    RawGguf,
    Tensor,
    tiny_model,
)

_NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    16,
    31,
    32,
    63,
    64,
    65,
    96,
    511,
    512,
    513,
    1 << 20,
    1 << 28,
    (1 << 32) - 1,
)
_FLOATS = (0.0, -1.0, 1e-40, 1e-6, 0.5, 1.0, 2.0, 1e6, 3e38, float("inf"), float("nan"))
_TEXTS = (
    "",
    "x",
    "none",
    "linear",
    "yarn",
    "gpt2",
    "llama",
    "deepseek",
    "deepseek-llm",
    "default",
    "bert",
    "t5",
    "rwkv",
    "plamo2",
    "gemma4",
    "whitespace",
    "kimi-k2",
    "glm4",
    "\x00",
    "phi-3",
)
_TOKENS = (
    "",
    "a",
    "a b",
    "t0\x00",
    "[EMPTY_3]",
    "<0x0A>",
    "\n",
    " ",
    "\u0120",
    "<|im_end|>",
    "</s>",
    "ab" * 300,
)
_TYPES = (-1, 0, 1, 2, 3, 4, 5, 6, 7, 99)
_MORE_KEYS = (
    "general.alignment",
    "general.type",
    "split.count",
    "deepseek.attention.key_length",
    "deepseek.attention.value_length",
    "deepseek.expert_gating_func",
    "deepseek.expert_weights_norm",
    "deepseek.expert_weights_scale",
    "deepseek.rope.dimension_count",
    "deepseek.rope.freq_base",
    "deepseek.rope.scaling.type",
    "deepseek.rope.scaling.factor",
    "deepseek.rope.scaling.original_context_length",
    "deepseek.rope.scaling.attn_factor",
    "deepseek.vocab_size",
    "deepseek.attention.causal",
    "deepseek.attention.key_length_swa",
    "deepseek.classifier.output_labels",
    "deepseek.embedding_length_out",
    "deepseek.expert_group_count",
    "deepseek.expert_group_used_count",
    "deepseek.nextn_predict_layers",
    "deepseek.pooling_type",
    "deepseek.rope.dimension_count_swa",
    "deepseek.rope.scale_linear",
    "deepseek.rope.scaling.alpha",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.suppress_tokens",
    "tokenizer.ggml.token_type_count",
    "tokenizer.ggml.precompiled_charsmap",
    "tokenizer.ggml.normalizer.lowercase",
    "tokenizer.chat_template",
)


@cache
def seed_model() -> RawGguf:
    """A correct model, as small as one can be."""
    return tiny_model()


@cache
def seed_of_bytes() -> RawGguf:
    """The same with llama.cpp's other kind of vocabulary, which has a token for each byte."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
    types = [2, 3, 3, *[6] * 256, 1, 1, 1]
    model = tiny_model(n_vocab=len(tokens)).without("tokenizer.ggml.merges")
    for value in (
        KeyValue("tokenizer.ggml.model", STRING, "llama"),
        KeyValue("tokenizer.ggml.tokens", ARRAY, tokens, STRING),
        KeyValue("tokenizer.ggml.token_type", ARRAY, types, INT32),
        KeyValue("tokenizer.ggml.scores", ARRAY, [0.0] * len(tokens), FLOAT32),
    ):
        model = model.with_value(value)
    return model


@cache
def seed_bytes() -> tuple[bytes, int]:
    """Its header, and the bytes of the whole file."""
    content = seed_model().encode()
    n_data = sum(-(-tensor.n_bytes // 32) * 32 for tensor in seed_model().tensors)
    return content[: len(content) - n_data], len(content)


def write_damaged(path: Path, rng: random.Random) -> None:
    """Write a model whose header's bytes are damaged; its weights are zeros."""
    header, size = seed_bytes()
    damaged = damaged_bytes(header, rng)
    path.write_bytes(damaged)
    if rng.random() < 0.9:
        os.truncate(path, max(len(damaged), size + (len(damaged) - len(header)) // 32 * 32))


def write_senseless(path: Path, rng: random.Random) -> None:
    """Write a well-formed file with one to three values or tensors that are not what they should be."""
    model = seed_model() if rng.random() < 0.7 else seed_of_bytes()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        model = _senseless_tensor(model, rng) if rng.random() < 0.2 else _senseless_value(model, rng)
    content = replace(model, data=b"").encode()
    path.write_bytes(content)
    end = sum(-(-tensor.n_bytes // 32) * 32 for tensor in model.tensors)
    os.truncate(path, len(content) + min(end, 1 << 24))


def _senseless_value(model: RawGguf, rng: random.Random) -> RawGguf:
    keys = [str(value.key) for value in model.values]
    key = rng.choice(keys if rng.random() < 0.6 else _MORE_KEYS)
    if rng.random() < 0.1:
        return model.without(key)
    now = next((value for value in model.values if value.key == key), None)
    if now is not None and now.kind == ARRAY and rng.random() < 0.8:
        return model.with_value(replace(now, value=_senseless_items(list(now.value), now.item, rng)))
    kind = (
        now.kind
        if now is not None and rng.random() < 0.6
        else rng.choice((UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY))
    )
    if kind == ARRAY:
        item = rng.choice((UINT32, INT32, FLOAT32, STRING))
        return model.with_value(
            KeyValue(key, ARRAY, [_scalar(item, rng) for _ in range(rng.choice((0, 1, 8)))], item)
        )
    return model.with_value(KeyValue(key, kind, _scalar(kind, rng)))


def _scalar(kind: int, rng: random.Random) -> Any:
    if kind == STRING:
        return rng.choice(_TEXTS)
    if kind == FLOAT32:
        return rng.choice(_FLOATS)
    if kind == BOOL:
        return rng.randrange(2)
    return rng.choice(_NUMBERS) if kind == UINT32 else rng.choice((-1, 0, 1, 7, 8, 1 << 30))


def _senseless_items(items: list[Any], item: int | None, rng: random.Random) -> list[Any]:
    at = rng.randrange(len(items) + 1)
    odd = rng.choice(_TOKENS) if item == STRING else rng.choice(_TYPES)
    changes: tuple[list[Any], ...] = (
        [*items[:at], odd, *items[at + 1 :]],
        [*items[:at], odd, *items[at + 1 :]],
        [*items[:at], odd, *items[at:]],
        items[:at] + items[at + 1 :],
        [],
    )
    return rng.choice(changes)


def _senseless_tensor(model: RawGguf, rng: random.Random) -> RawGguf:
    tensor = rng.choice(list(model.tensors))
    sizes = list(tensor.ne)
    at = rng.randrange(len(sizes))
    sizes[at] = rng.choice((0, 1, 2, 32, 33, 64, 96, 128, sizes[at] * 2))
    return rng.choice(
        (
            model.with_tensor(replace(tensor, ne=tuple(sizes))),
            model.with_tensor(replace(tensor, ne=(*tensor.ne, 1))),
            model.with_tensor(replace(tensor, ne=tuple(reversed(tensor.ne)))),
            model.with_tensor(replace(tensor, kind=rng.choice((1, 2, 8, 16, 24, 26, 30, 34)))),
            model.without_tensor(str(tensor.name)),
            model.with_tensor(Tensor(str(tensor.name) + "s", tensor.ne)),
            model.with_tensor(Tensor(str(tensor.name) + "\x00", tensor.ne)),
        )
    )
