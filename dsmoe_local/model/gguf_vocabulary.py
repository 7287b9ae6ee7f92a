"""Check the vocabulary in a GGUF file's metadata against what llama.cpp requires (src/llama-vocab.cpp).

Files are refused on which llama.cpp aborts the process, when it loads them or later when it tokenizes a text.
Where it reports an error instead, as for an unknown pre-tokenizer, nothing is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NoReturn, cast

from gguf.constants import GGUFValueType, TokenType

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.gguf_file import GgufFile

_PREFIX = "tokenizer.ggml."
_FLAGS = (
    "add_bos_token",
    "add_eos_token",
    "add_sep_token",
    "add_space_prefix",
    "remove_extra_whitespaces",
    "normalizer.lowercase",
    "normalizer.strip_accents",
)
_SPECIAL_TOKENS = (
    "bos",
    "eos",
    "eot",
    "eom",
    "unknown",
    "seperator",  # as llama.cpp spells it
    "padding",
    "mask",
    "fim_pre",
    "fim_suf",
    "fim_mid",
    "fim_pad",
    "fim_rep",
    "fim_sep",
    "prefix",
    "suffix",
    "middle",
)
# llama.cpp refuses values of other types, and so does all code here that reads them.
_TYPES = {
    f"{_PREFIX}pre": GGUFValueType.STRING,
    f"{_PREFIX}token_type_count": GGUFValueType.UINT32,
    **{f"{_PREFIX}{name}": GGUFValueType.BOOL for name in _FLAGS},
    **{f"{_PREFIX}{name}_token_id": GGUFValueType.UINT32 for name in _SPECIAL_TOKENS},
}
_ITEM_TYPES = {
    f"{_PREFIX}token_type": (GGUFValueType.INT32,),
    f"{_PREFIX}scores": (GGUFValueType.FLOAT32, GGUFValueType.INT32),
    f"{_PREFIX}suppress_tokens": (GGUFValueType.INT32,),
}
_PER_TOKEN = ("token_type", "scores")
_NO_VOCABULARY = ("none", "no_vocab")
# If a model's name contains one of these words, llama.cpp assumes that the vocabulary has these tokens.
_PHI3_NAMES = ("phi-3", "phi3")
_PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")
_RWKV_ESCAPE = re.compile(rb"\\(?:x([0-9a-f]{2})|(.))", re.DOTALL)
_RWKV_CHARACTERS = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def clashes_with_phi3(name: str) -> bool:
    """True if llama.cpp would assume the vocabulary of Phi-3 because of a model's name."""
    return any(word in name.lower() for word in _PHI3_NAMES)


def check_vocabulary(file: GgufFile) -> None:
    """Raise FormatError if llama.cpp would abort on the vocabulary, or on a text."""
    _check_types(file)
    model = file.get(f"{_PREFIX}model")
    if not isinstance(model, str):
        _refuse(file, "the tokenizer model is not text", "model")
    if model in _NO_VOCABULARY:
        _refuse(file, "the file has no vocabulary", "model", remedy="use a file that contains a tokenizer")
    tokens = _strings(file, "tokens")
    _check_tokens(file, tokens)
    for name in _PER_TOKEN:
        values = file.get(f"{_PREFIX}{name}")
        if values is not None and len(values) < len(tokens):
            _refuse(file, f"there must be one entry for each of the {len(tokens)} tokens", name)
    if model in _CHECKS:
        _CHECKS[model](file, tokens)
    name = file.get("general.name", "")
    if clashes_with_phi3(name) and not set(tokens).issuperset(_PHI3_TOKENS):
        _refuse(file, f"llama.cpp treats a model called {safe_line(name, 40)} as a Phi-3", "tokens")


def _refuse(file: GgufFile, what: str, key: str, remedy: str = "convert the model again") -> NoReturn:
    raise FormatError(
        f"the vocabulary cannot be used: {what}",
        where=f"{file.path}: {key if '.' in key else _PREFIX + key}",
        remedy=remedy,
    )


def _check_types(file: GgufFile) -> None:
    for key, kind in ({"general.name": GGUFValueType.STRING} | _TYPES).items():
        field = file.metadata.get(key)
        if field is not None and field.type is not kind:
            _refuse(file, f"the value has the type {field.type.name}, not {kind.name}", key)
    for key, kinds in _ITEM_TYPES.items():
        field = file.metadata.get(key)
        if field is not None and field.item_type not in kinds:
            _refuse(file, f"it is not a list of {kinds[0].name}", key)


def _strings(file: GgufFile, name: str) -> list[str]:
    field = file.metadata.get(f"{_PREFIX}{name}")
    if field is None or field.item_type is not GGUFValueType.STRING:
        _refuse(file, "a list of strings is missing", name)
    return cast(list[str], field.value)


def _check_tokens(file: GgufFile, tokens: list[str]) -> None:
    """Refuse tokens that llama.cpp cannot tell apart. It cuts them at a NUL, and renames an empty one."""
    read = [token.partition("\0")[0] or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
    if len(set(read)) != len(read):
        _refuse(file, "a token occurs twice", "tokens")


def _check_bpe(file: GgufFile, tokens: list[str]) -> None:
    pre = file.get(f"{_PREFIX}pre")
    may_lack_merges = pre == "kimi-k2" and f"{_PREFIX}merges" not in file.metadata
    if not may_lack_merges and any(" " not in merge[1:] for merge in _strings(file, "merges")):
        _refuse(file, "a merge is not a pair", "merges")
    # These rules keep spaces in words, on which merging aborts.
    if pre == "whitespace" and file.get(f"{_PREFIX}model") != "whitespace":
        _refuse(file, "the pre-tokenizer whitespace needs the tokenizer model whitespace", "pre")


def _check_spm(file: GgufFile, tokens: list[str]) -> None:
    """Refuse a vocabulary that lacks a byte: llama.cpp throws where nothing catches it, on unknown text."""
    known = set(tokens)
    for byte in range(256):
        if f"<0x{byte:02X}>" not in known and not (byte < 128 and chr(byte) in known):
            _refuse(file, f"there is no token for the byte {byte}", "tokens")


def _check_wpm(file: GgufFile, tokens: list[str]) -> None:
    if TokenType.BYTE in file.get(f"{_PREFIX}token_type", ())[: len(tokens)]:
        _refuse(file, "a WordPiece vocabulary has no tokens for bytes", "token_type")


def _check_rwkv(file: GgufFile, tokens: list[str]) -> None:
    """Refuse tokens whose first byte is not a token: llama.cpp would start the text again, without end."""
    known = {_rwkv_bytes(token) for token in filter(None, tokens)}
    missing = next((token[0] for token in known if token[:1] not in known), None)
    if missing is not None:
        _refuse(file, f"there is no token for the byte {missing}", "tokens")


def _rwkv_bytes(token: str) -> bytes:
    """Return the bytes of a token with the escapes of RWKV."""

    def unescaped(found: re.Match[bytes]) -> bytes:
        code, character = found.groups()
        return bytes([int(code, 16)]) if code else _RWKV_CHARACTERS.get(character, character)

    return _RWKV_ESCAPE.sub(unescaped, token.encode())


_CHECKS: Mapping[str, Callable[[GgufFile, list[str]], None]] = {
    "gpt2": _check_bpe,
    "gemma4": _check_bpe,
    "hybriddna": _check_bpe,
    "whitespace": _check_bpe,
    "llama": _check_spm,
    "bert": _check_wpm,
    "rwkv": _check_rwkv,
}
"""What llama.cpp needs of each tokenizer model. Of others, such as t5 and plamo2, it needs nothing more."""
