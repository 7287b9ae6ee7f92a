"""Check the vocabulary in a GGUF file's metadata against what llama.cpp requires (src/llama-vocab.cpp).

llama.cpp aborts the process on some vocabularies, throws on others, and misreads a few.
"""

from __future__ import annotations

from typing import NoReturn, cast

from gguf.constants import GGUFValueType, TokenType

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.gguf_file import GgufFile

_PREFIX = "tokenizer.ggml."
_TOKENIZERS = {"gpt2": 11, "llama": 2}
"""Tokenizer models, each with the largest id that llama.cpp uses as BOS or EOS if the file names none."""
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
    "separator",
    "padding",
    "mask",
    "cls",
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
# If a model's name contains one of these words, llama.cpp assumes that the vocabulary has these tokens.
_PHI3_NAMES = ("phi-3", "phi3")
_PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")


def clashes_with_phi3(name: str) -> bool:
    """True if llama.cpp would assume the vocabulary of Phi-3 because of a model's name."""
    return any(word in name.lower() for word in _PHI3_NAMES)


def check_vocabulary(file: GgufFile) -> None:
    """Raise FormatError unless llama.cpp can load the vocabulary and tokenize any text with it."""
    _check_types(file)
    model = file.get(f"{_PREFIX}model")
    if not isinstance(model, str) or model not in _TOKENIZERS:
        _refuse(file, f"the tokenizer model is {safe_line(str(model), 40)!r}", "model")
    tokens = _strings(file, "tokens")
    _check_tokens(file, tokens)
    for name in _PER_TOKEN:
        values = file.get(f"{_PREFIX}{name}")
        if values is not None and len(values) != len(tokens):
            _refuse(file, f"there must be one entry for each of the {len(tokens)} tokens", name)
    if model == "gpt2":
        if any(" " not in merge[1:] for merge in _strings(file, "merges")):
            _refuse(file, "a merge is not a pair", "merges")
    else:
        _check_bytes(file, set(tokens))
    for name in _SPECIAL_TOKENS:
        value = file.get(f"{_PREFIX}{name}_token_id")
        if value is not None and not value < len(tokens):
            _refuse(file, f"token id {value} is out of range", f"{name}_token_id")
        if value is None and name in ("bos", "eos") and len(tokens) <= _TOKENIZERS[model]:
            _refuse(file, "it is missing, and llama.cpp's default is not a token", f"{name}_token_id")
    name = file.get("general.name", "")
    if clashes_with_phi3(name) and not set(tokens).issuperset(_PHI3_TOKENS):
        _refuse(file, f"llama.cpp treats a model called {safe_line(name, 40)} as a Phi-3", "tokens")


def _refuse(file: GgufFile, what: str, key: str) -> NoReturn:
    raise FormatError(
        f"the vocabulary is damaged: {what}",
        where=f"{file.path}: {key if '.' in key else _PREFIX + key}",
        remedy="convert the model again",
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
    """Refuse tokens that llama.cpp cannot tell apart, and byte tokens without a byte.

    llama.cpp cuts a token at a NUL, and renames an empty one to [EMPTY_n].
    """
    if any("\0" in token for token in tokens):
        _refuse(file, "a token contains a NUL", "tokens")
    if len({token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)}) != len(tokens):
        _refuse(file, "a token occurs twice", "tokens")
    types = file.get(f"{_PREFIX}token_type", ())
    for token, kind in zip(tokens, types, strict=False):
        if kind == TokenType.BYTE and not (len(token) == 6 and token.startswith("<0x")):
            _refuse(file, f"the token {safe_line(repr(token), 30)} is not a byte", "token_type")


def _check_bytes(file: GgufFile, tokens: set[str]) -> None:
    """Refuse a vocabulary that lacks a byte token: llama.cpp uses them for unknown text without a check."""
    for byte in range(256):
        if f"<0x{byte:02X}>" not in tokens and not (byte < 128 and chr(byte) in tokens):
            _refuse(file, f"there is no token for the byte {byte}", "tokens")
