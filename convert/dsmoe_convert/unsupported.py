"""Refuses what a tokenizer.json asks for and llama.cpp does not do, so that ids are never silently others.

llama.cpp's `gpt2` vocabularies run no normalizer, strip no space around added tokens, and add at most BOS in
front and EOS behind. Whether an added token is matched before or after normalization (`normalized`) makes no
difference without a normalizer. Decoders, truncation and padding are of no concern: they change no ids that
llama.cpp is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_convert.byte_level import byte_characters
from dsmoe_convert.errors import TokenizerError
from dsmoe_convert.pretokenizers import IGNORE_MERGES, definition_of
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
_EDIT = "llama.cpp does nothing of the kind; to convert all the same, change it in a copy of the file"


def _refuse(path: Path, part: str, what: str, remedy: str = _EDIT) -> NoReturn:
    raise TokenizerError(what, where=f"{path}: {part}", remedy=remedy)


def _kind(part: object) -> str:
    return safe_line(str(part.get("type") if isinstance(part, dict) else part), 30)


def check_model(path: Path, model: Mapping[str, Any]) -> None:
    """TokenizerError for options of the BPE model that llama.cpp does not have."""
    for key, accepted in _MODEL_OPTIONS.items():
        if model.get(key) not in accepted:
            value = safe_line(str(model.get(key)), 30)
            needed = f"llama.cpp needs {accepted[0] or 'none'}"
            _refuse(path, "model", f"the tokenizer's {key} is {value}", needed)
    vocab = model.get("vocab")
    unknown = model.get("unk_token")
    # With a token for each byte there is nothing unknown.
    if unknown is not None and isinstance(vocab, dict) and not vocab.keys() >= _BYTES:
        _refuse(path, "model", f"{safe_line(repr(unknown), 30)} stands where a byte has no token (unk_token)")


def check_normalizer(path: Path, normalizer: object) -> None:
    """TokenizerError for a normalizer that may change a text: any but a sequence of none."""
    for step in _steps(normalizer, "normalizers"):
        _refuse(path, "normalizer", f"the normalizer {_kind(step)} changes a text before it is split")


def check_added_token(path: Path, text: str, entry: Mapping[str, Any]) -> None:
    """TokenizerError for an added token that takes the space around it, or is none inside of a word."""
    for option in _TOKEN_OPTIONS:
        if entry.get(option):
            _refuse(path, "added_tokens", f"the token {safe_line(repr(text), 40)} has {option} set")


def check_pre_tokenizer(path: Path, tokenizer: Mapping[str, Any], name: str) -> None:
    """TokenizerError where rules that a name of llama.cpp's stands for cannot be those of `tokenizer`."""
    steps = definition_of(tokenizer.get("pre_tokenizer"))
    byte_level = [step for step in steps if step[0] == "ByteLevel"]
    if not byte_level:
        _refuse(path, "pre_tokenizer", "the vocabulary is not byte-level", "llama.cpp's gpt2 model is")
    if any(prefix for _, prefix, _ in byte_level):
        _refuse(path, "pre_tokenizer", "a space is put before each text (add_prefix_space)")
    ignores = tokenizer["model"].get("ignore_merges") or False
    if ignores != (name in IGNORE_MERGES):
        _refuse(
            path,
            "model",
            f"ignore_merges is {'true' if ignores else 'false'}",
            f"under the name {name}, llama.cpp takes it for {'false' if ignores else 'true'}",
        )


def tokens_around(path: Path, post_processor: object, ids: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text. TokenizerError if that cannot be told."""
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
    """TokenizerError for other tokens around a text than BOS in front and EOS behind."""
    for found, known, place in ((around[0], bos, "before"), (around[1], eos, "after")):
        if found not in ([], [known]):
            shown = safe_line(", ".join(map(str, found)), 40)
            _refuse(
                path,
                "post_processor",
                f"the post-processor adds the tokens {shown} {place} a text",
                f"llama.cpp adds {'BOS' if place == 'before' else 'EOS'} alone, which is {known}",
            )


def _around_text(path: Path, step: Any, ids: Mapping[str, int]) -> tuple[list[int], list[int]]:  # noqa: ANN401 - JSON
    """Of a template for a single text, the ids on both sides of it."""
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
    """What stands for a special token of a template; [None] if nothing does."""
    entry = known.get(name) if isinstance(known, dict) else None
    if isinstance(entry, dict):
        found = entry.get("ids")
        return found if isinstance(found, list) and all(type(each) is int for each in found) else [None]
    return [ids.get(name)]


def _steps(part: object, inner: str) -> Iterator[object]:
    """The steps of a part of a tokenizer.json, sequences flattened; none for null."""
    waiting: list[object] = [part]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict) and step.get("type") == "Sequence" and isinstance(step.get(inner), list):
            waiting += reversed(step[inner])
        elif step is not None:
            yield step
