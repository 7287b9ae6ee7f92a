"""Read the tokens, token types and merges of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from gguf.constants import TokenType

from dsmoe_convert import unsupported
from dsmoe_convert.errors import TokenizerError
from dsmoe_local.base.text import is_encodable, safe_line

CONFIG = "tokenizer_config.json"
MAX_TOKEN = 4096
"""Longer tokens, which no published tokenizer has, are not checked."""
NO_RANK = 1 << 32
"""More than the rank of any merge."""

# Tokens that some models do not mark as special. llama.cpp's converter has the same list.
_LOOKS_SPECIAL = (("<|", "|>"), ("<\uff5c", "\uff5c>"))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One entry for each row of the embedding. `types` are gguf's TokenType; `merges` are "left right"."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The parsed files of one tokenizer. `path` is tokenizer.json or tiktoken.model, for messages."""

    path: Path
    tokenizer: Mapping[str, Any]
    config: Mapping[str, Any]


def merged(parts: list[str], rank: Callable[[str, str], int]) -> list[str]:
    """Return the parts of a word after byte-pair encoding.

    `rank` returns the rank of a pair, or NO_RANK if it is not merged. The leftmost pair of the lowest rank is
    merged first.
    """
    parts = list(parts)
    ranks = [rank(left, right) for left, right in pairwise(parts)]
    while ranks and (least := min(ranks)) < NO_RANK:
        at = ranks.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del ranks[at]
        for changed in (at - 1, at):
            if 0 <= changed < len(ranks):
                ranks[changed] = rank(parts[changed], parts[changed + 1])
    return parts


def unreachable_tokens(vocabulary: Vocabulary) -> list[str]:
    """Return the tokens of text that no merges build. They are used only with `ignore_merges`."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in reversed(list(enumerate(vocabulary.merges)))}

    def rank(left: str, right: str) -> int:
        return ranks.get((left, right), NO_RANK)

    return [
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        # Merging a word takes time that grows with the square of its length.
        if kind == TokenType.NORMAL and len(token) <= MAX_TOKEN and len(merged(list(token), rank)) > 1
    ]


def _refuse(files: TokenizerFiles, what: str, remedy: str = "") -> NoReturn:
    raise TokenizerError(what, where=files.path, remedy=remedy)


def _model(files: TokenizerFiles) -> Mapping[str, Any]:
    model = files.tokenizer.get("model")
    if not isinstance(model, dict):
        _refuse(files, "the tokenizer has no model")
    unsupported.check_model(files.path, model)
    return model


def read_vocabulary(files: TokenizerFiles, n_vocab: int) -> Vocabulary:
    """Return the vocabulary for an embedding of `n_vocab` rows. Rows without a token become unused tokens.

    Raises TokenizerError.
    """
    model = _model(files)
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        _refuse(files, "the tokenizer has no vocabulary")
    tokens: dict[int, str] = {}
    types: dict[int, int] = {}
    for text, token_id in vocab.items():
        _place(files, tokens, token_id, text, n_vocab)
        types[token_id] = TokenType.NORMAL
    for token_id, text, entry in _added_tokens(files):
        if text not in vocab or vocab[text] != token_id:
            _place(files, tokens, token_id, text, n_vocab)
        special = bool(entry.get("special")) or any(
            text.startswith(start) and text.endswith(end) for start, end in _LOOKS_SPECIAL
        )
        types[token_id] = TokenType.CONTROL if special else TokenType.USER_DEFINED
        unsupported.check_added_token(files.path, text, entry)
    ids = {text: token_id for token_id, text in tokens.items()}
    if len(ids) != len(tokens):
        twice = next(text for token_id, text in tokens.items() if ids[text] != token_id)
        _refuse(files, f"the token {safe_line(repr(twice), 40)} has two ids")
    for token_id in range(n_vocab):
        if token_id not in tokens:
            padding = f"[PAD{token_id}]"
            if padding in ids:
                _refuse(files, f"the vocabulary has a token {padding}, the name of padding row {token_id}")
            tokens[token_id], types[token_id] = padding, TokenType.UNUSED
    rows = range(n_vocab)
    return Vocabulary(
        [tokens[i] for i in rows], [int(types[i]) for i in rows], _merges(files, model, vocab), ids
    )


def _place(
    files: TokenizerFiles, tokens: dict[int, str], token_id: object, text: object, n_vocab: int
) -> None:
    if type(token_id) is not int or not 0 <= token_id < n_vocab:
        _refuse(
            files,
            f"the token {safe_line(repr(text), 40)} has the id {safe_line(repr(token_id), 20)}",
            f"config.json's vocab_size is {n_vocab}",
        )
    if not isinstance(text, str) or not text or not is_encodable(text):
        _refuse(files, f"token {token_id} is not text")
    if token_id in tokens:
        _refuse(files, f"two tokens have the id {token_id}; one is {safe_line(repr(text), 40)}")
    tokens[token_id] = text


def _added_tokens(files: TokenizerFiles) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Yield the tokens outside the BPE model, from tokenizer.json and then from tokenizer_config.json."""
    entries: dict[object, Mapping[str, Any]] = {}
    added = files.tokenizer.get("added_tokens") or []
    decoder = files.config.get("added_tokens_decoder") or {}
    if not isinstance(added, list):
        _refuse(files, "added_tokens is not a list")
    if not isinstance(decoder, dict):
        _refuse(files, f"added_tokens_decoder in {CONFIG} is not an object")
    known = [(entry.get("id") if isinstance(entry, dict) else None, entry) for entry in added]
    # Longer numbers are not ids, and Python refuses to convert very long ones.
    listed = [
        (int(key) if key.isdecimal() and len(key) < 10 else key, entry) for key, entry in decoder.items()
    ]
    for token_id, entry in [*known, *listed]:
        content = entry.get("content") if isinstance(entry, dict) else None
        if type(token_id) is not int or not isinstance(content, str):
            _refuse(files, "an added token lacks id or content")
        earlier = entries.get(token_id)
        if earlier is not None and earlier["content"] != content:
            _refuse(files, f"the added token {token_id} differs in {CONFIG}")
        if earlier is None:
            entries[token_id] = entry
            yield token_id, content, entry


def _merges(files: TokenizerFiles, model: Mapping[str, Any], vocab: Mapping[str, int]) -> list[str]:
    """Return the merges as "left right". tokenizer.json has them in this form, or as pairs."""
    merges = model.get("merges")
    if not isinstance(merges, list) or not merges:
        _refuse(files, "the tokenizer has no merges")
    result: list[str] = []
    for position, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            _refuse(files, f"merge {position} is not a pair")
        left, right = parts
        if not left or not right or " " in left + right:
            _refuse(files, f"merge {position} has an empty part or one with a space")
        if left + right not in vocab:
            made = safe_line(repr(left + right), 40)
            _refuse(files, f"merge {position} makes {made}, which is not in the vocabulary")
        result.append(f"{left} {right}")
    return result
