"""Vocabularies that are refused are those on which llama.cpp dies; all others that it loads are accepted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.llama_child import LlamaChild
from support.raw_gguf import ARRAY, FLOAT32, INT32, STRING, UINT32, KeyValue, RawGguf, tiny_model

from dsmoe_local.base.errors import FormatError
from dsmoe_local.model.gguf_model import read_model

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
RWKV_BYTES = [f"\\x{byte:02x}" for byte in range(256)]
WORDS = ["<unk>", "<s>", "</s>", "t0", "t1", "\u2581", "\u2581hello", "\u4eba", "a"]


def with_vocabulary(
    model: str, tokens: Sequence[str], types: Sequence[int] = (), pre: str | None = None, **special: int
) -> RawGguf:
    """A tiny model with a vocabulary of the kind `model`."""
    raw = tiny_model(n_vocab=len(tokens))
    for key in ("merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        raw = raw.without(f"tokenizer.ggml.{key}")
    values = [
        KeyValue("tokenizer.ggml.model", STRING, model),
        KeyValue("tokenizer.ggml.tokens", ARRAY, list(tokens), STRING),
        KeyValue("tokenizer.ggml.token_type", ARRAY, list(types or [NORMAL] * len(tokens)), INT32),
        KeyValue("tokenizer.ggml.scores", ARRAY, [-float(n) for n in range(len(tokens))], FLOAT32),
        *(KeyValue(f"tokenizer.ggml.{name}_token_id", UINT32, value) for name, value in special.items()),
    ]
    if pre is not None:
        values.append(KeyValue("tokenizer.ggml.pre", STRING, pre))
    for value in values:
        raw = raw.with_value(value)
    return raw


def with_merges(raw: RawGguf, *merges: str) -> RawGguf:
    return raw.with_value(KeyValue("tokenizer.ggml.merges", ARRAY, list(merges), STRING))


def bpe(
    pre: str | None = None, model: str = "gpt2", tokens: Sequence[str] = WORDS, **special: int
) -> RawGguf:
    return with_merges(with_vocabulary(model, tokens, (), pre, **special), "t 0", "\u2581 hello")


SPM = with_vocabulary("llama", [*WORDS, *BYTES], [NORMAL] * len(WORDS) + [BYTE] * 256)
GOOD: dict[str, RawGguf] = {
    "SPM": SPM,
    "SPM of bytes only": with_vocabulary("llama", BYTES, [BYTE] * 256),
    "WordPiece": with_vocabulary("bert", WORDS, [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 6], unknown=0),
    "unigram": with_vocabulary("t5", WORDS, [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 6], unknown=0),
    "RWKV": with_vocabulary("rwkv", ["<s>", *RWKV_BYTES[1:], "\\n\\n", "hello", "\\\\n"]),
    "PLaMo-2": with_vocabulary("plamo2", ["<unk>", *BYTES, *WORDS[1:]], [2, *[BYTE] * 256, *[NORMAL] * 8]),
    "Gemma 4": bpe(model="gemma4"),
    "DNA": bpe(model="hybriddna", pre="qwen2"),
    "whitespace": bpe(model="whitespace", pre="whitespace"),
    "Kimi without merges": with_vocabulary("gpt2", WORDS, pre="kimi-k2"),
    "no pre-tokenizer": bpe(),
    # llama.cpp ignores an id that is no token.
    "padding of -1": bpe(padding=(1 << 32) - 1),
    "BOS out of range": bpe(bos=len(WORDS), eos=1),
    "a NUL in a token": bpe(tokens=["a\0b", *WORDS[1:8]]),
    "more types than tokens": with_merges(with_vocabulary("gpt2", WORDS, [NORMAL] * 12), "t 0"),
}
FATAL: dict[str, RawGguf] = {
    "no vocabulary": with_vocabulary("none", WORDS),
    "a token twice": bpe(tokens=["a", "a", "b"]),
    "a token twice before a NUL": bpe(tokens=["a\0b", "a\0c", "b"]),
    "a token with the name of an empty one": bpe(tokens=["", "[EMPTY_0]", "b"]),
    "SPM without bytes": with_vocabulary("llama", WORDS),
    "WordPiece with bytes": with_vocabulary("bert", [*WORDS, *BYTES], [NORMAL] * 9 + [BYTE] * 256),
    "spaces in words": bpe(pre="whitespace"),
}
REPORTED: dict[str, RawGguf] = {
    "an unknown pre-tokenizer": bpe(pre="nobody's"),
    "an unknown tokenizer": with_vocabulary("nobody's", WORDS),
    "bytes without a code": with_merges(with_vocabulary("gpt2", WORDS, [BYTE] * 9), "t 0"),
    "PLaMo-2 without bytes": with_vocabulary("plamo2", WORDS),
}


@pytest.fixture(scope="module")
def child() -> Iterator[LlamaChild]:
    with LlamaChild() as child:
        yield child


@pytest.mark.parametrize("name", GOOD)
def test_what_llama_cpp_runs_is_accepted(name: str, tmp_path: Path, child: LlamaChild) -> None:
    """Guards: a model that llama.cpp runs, refused for its vocabulary."""
    path = GOOD[name].write(tmp_path / "model.gguf")
    read_model(path)
    assert child.outcome(path) == "run"


@pytest.mark.parametrize("name", FATAL)
def test_what_llama_cpp_dies_of_is_refused(name: str, tmp_path: Path, child: LlamaChild) -> None:
    """Guards: a vocabulary that ends the process, and a refusal for which there is no reason."""
    path = FATAL[name].write(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="the vocabulary cannot be used"):
        read_model(path)
    assert child.outcome(path) == "died"


@pytest.mark.parametrize("name", REPORTED)
def test_what_llama_cpp_reports_is_left_to_it(name: str, tmp_path: Path, child: LlamaChild) -> None:
    """Guards: a second list of what llama.cpp knows, which its next version makes wrong."""
    path = REPORTED[name].write(tmp_path / "model.gguf")
    read_model(path)
    assert child.outcome(path) == "refused"


def test_an_endless_loop_is_refused(tmp_path: Path) -> None:
    """Guards: RWKV's tokenizer, which starts the text again where no token fits."""
    model = with_vocabulary("rwkv", ["<s>", "\\n\\n", *(text for text in RWKV_BYTES if text != "\\x0a")])
    with pytest.raises(FormatError, match="no token for the byte 10"):
        read_model(model.write(tmp_path / "model.gguf"))


def test_values_of_wrong_types(tmp_path: Path) -> None:
    """Guards: Python code that fails on a value which is not what it should be."""
    wrong: tuple[tuple[str, int, Any], ...] = (
        ("pre", UINT32, 1),
        ("eot_token_id", INT32, 1),
        ("model", UINT32, 1),
    )
    for key, kind, value in wrong:
        raw = SPM.with_value(KeyValue(f"tokenizer.ggml.{key}", kind, value))
        with pytest.raises(FormatError, match=key):
            read_model(raw.write(tmp_path / "model.gguf"))
