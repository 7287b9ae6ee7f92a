"""Refuse parts of a tokenizer.json that llama.cpp does not implement, so that ids are never silently wrong.

llama.cpp's `gpt2` vocabularies have no normalizer, do not strip space around added tokens, and add at most
BOS in front and EOS behind. The normalizer NFC is accepted, since it only changes decomposed characters,
which few texts have. With at most NFC, `normalized` of an added token has no effect. Decoders, truncation and
padding do not affect ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_convert.byte_level import byte_characters
from dsmoe_convert.errors import TokenizerError
from dsmoe_convert.pretokenizers import definition_of
from dsmoe_local.base.text import safe_line

# Options of the BPE model that llama.cpp does not have.
_MODEL_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}
_TOKEN_OPTIONS = ("lstrip", "rstrip", "single_word")
_BYTES = frozenset(byte_characters().values())
_ADDS_NOTHING = ("ByteLevel",)
_EDIT = "llama.cpp does not support it; to convert anyway, change it in a copy of the file"


def _refuse(path: Path, part: str, what: str, remedy: str = _EDIT) -> NoReturn:
    raise TokenizerError(what, where=f"{path}: {part}", remedy=remedy)


def _kind(part: object) -> str:
    return safe_line(str(part.get("type") if isinstance(part, dict) else part), 30)


def check_model(path: Path, model: Mapping[str, Any]) -> None:
    """Raise TokenizerError for options of the BPE model that llama.cpp does not have."""
    for key, accepted in _MODEL_OPTIONS.items():
        if model.get(key) not in accepted:
            value = safe_line(str(model.get(key)), 30)
            needed = f"llama.cpp needs {accepted[0] or 'none'}"
            _refuse(path, "model", f"the tokenizer's {key} is {value}", needed)
    vocab = model.get("vocab")
    unknown = model.get("unk_token")
    # With a token for each byte, the unknown token is never used.
    if unknown is not None and isinstance(vocab, dict) and not vocab.keys() >= _BYTES:
        _refuse(path, "model", f"{safe_line(repr(unknown), 30)} (unk_token) replaces bytes without a token")


def check_normalizer(path: Path, normalizer: object) -> None:
    """Raise TokenizerError for any normalizer except NFC and an empty sequence."""
    for step in _steps(normalizer, "normalizers"):
        if _kind(step) != "NFC":
            _refuse(path, "normalizer", f"the normalizer {_kind(step)} changes text before it is split")


def check_added_token(path: Path, text: str, entry: Mapping[str, Any]) -> None:
    """Raise TokenizerError for an added token that strips space around it, or is not matched inside words."""
    for option in _TOKEN_OPTIONS:
        if entry.get(option):
            _refuse(path, "added_tokens", f"the token {safe_line(repr(text), 40)} has {option} set")


def check_pre_tokenizer(path: Path, tokenizer: Mapping[str, Any]) -> None:
    """Raise TokenizerError for words that are not byte-level, or that get a space in front."""
    steps = definition_of(tokenizer.get("pre_tokenizer"))
    byte_level = [step for step in steps if step[0] == "ByteLevel"]
    if not byte_level:
        _refuse(
            path, "pre_tokenizer", "the vocabulary is not byte-level", "llama.cpp's gpt2 model needs that"
        )
    if any(prefix for _, prefix, _ in byte_level):
        _refuse(path, "pre_tokenizer", "a space is added in front of each text (add_prefix_space)")


def tokens_around(path: Path, post_processor: object, ids: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor adds before and after a text.

    Raises TokenizerError if unknown.
    """
    before: list[int] = []
    after: list[int] = []
    for step in _steps(post_processor, "processors"):
        if _kind(step) in _ADDS_NOTHING:
            continue
        if _kind(step) != "TemplateProcessing":
            _refuse(path, "post_processor", f"the post-processor {_kind(step)} may add tokens")
        first, last = _around_text(path, step, ids)
        before, after = [*first, *before], [*after, *last]
    return before, after


def check_tokens_around(path: Path, around: tuple[list[int], list[int]], bos: int | None, eos: int) -> None:
    """Raise TokenizerError for tokens around a text other than BOS in front and EOS behind."""
    for found, known, place in ((around[0], bos, "before"), (around[1], eos, "after")):
        if found not in ([], [known]):
            shown = safe_line(", ".join(map(str, found)), 40)
            _refuse(
                path,
                "post_processor",
                f"the post-processor adds the tokens {shown} {place} a text",
                f"llama.cpp can only add {'BOS' if place == 'before' else 'EOS'}, which is {known}",
            )


def _around_text(path: Path, step: Any, ids: Mapping[str, int]) -> tuple[list[int], list[int]]:  # noqa: ANN401 - JSON
    """Return the ids before and after the text in a template for a single text."""
    pieces, known = step.get("single"), step.get("special_tokens") or {}
    sides: list[list[Any]] = [[], []]
    n_texts = 0
    for piece in pieces if isinstance(pieces, list) else [None]:
        match piece:
            case {"Sequence": _}:
                n_texts += 1
            case {"SpecialToken": {"id": str(name)}} if n_texts < 2:
                sides[n_texts].extend(_ids_of(known, name, ids))
            case _:
                n_texts = 2
    if n_texts != 1 or None in (*sides[0], *sides[1]):
        _refuse(path, "post_processor", "the post-processor's template cannot be read", "")
    return sides[0], sides[1]


def _ids_of(known: object, name: str, ids: Mapping[str, int]) -> list[Any]:
    """Return the ids of a special token of a template; [None] if they are unknown."""
    entry = known.get(name) if isinstance(known, dict) else None
    if isinstance(entry, dict):
        found = entry.get("ids")
        return found if isinstance(found, list) and all(type(each) is int for each in found) else [None]
    return [ids.get(name)]


def _steps(part: object, inner: str) -> Iterator[object]:
    """Yield the steps of a part of a tokenizer.json, with sequences flattened; nothing for null."""
    waiting: list[object] = [part]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict) and step.get("type") == "Sequence" and isinstance(step.get(inner), list):
            waiting += reversed(step[inner])
        elif step is not None:
            yield step
