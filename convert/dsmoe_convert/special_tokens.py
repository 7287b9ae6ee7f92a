"""Find the ids of BOS, EOS and other special tokens, and whether BOS and EOS are added to the input.

They are always written to the file: without them, llama.cpp uses token 11 for both, and adds none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType

from dsmoe_convert.errors import TokenizerError
from dsmoe_convert.unsupported import check_tokens_around
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.config_json import FILE_NAME, load_json
from dsmoe_local.model.gguf_file import Field

# Classes that add BOS by default.
_ADDS_BOS = ("LlamaTokenizer", "LlamaTokenizerFast")
_MAP = "special_tokens_map.json"
_GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of special tokens; `padding` and `unknown` are optional."""

    bos: int
    eos: int
    padding: int | None
    unknown: int | None
    add_bos: bool
    add_eos: bool

    def fields(self) -> dict[str, Field]:
        """Return them as GGUF metadata."""
        ids = {"bos": self.bos, "eos": self.eos, "unknown": self.unknown, "padding": self.padding}
        flags = {"add_bos_token": self.add_bos, "add_eos_token": self.add_eos}
        return {
            f"tokenizer.ggml.{name}_token_id": Field(token_id, GGUFValueType.UINT32)
            for name, token_id in ids.items()
            if token_id is not None
        } | {f"tokenizer.ggml.{name}": Field(flag, GGUFValueType.BOOL) for name, flag in flags.items()}


def read_special_tokens(
    path: Path,
    around: tuple[list[int], list[int]],
    config: Mapping[str, Any],
    ids: Mapping[str, int],
    n_vocab: int,
    note: Callable[[str], None],
) -> SpecialTokens:
    """Return the special tokens of the tokenizer at `path`, from the files beside it.

    `ids` is its vocabulary; `around` are the ids that its post-processor adds before and after a text. Names
    in tokenizer_config.json or special_tokens_map.json take precedence over ids in generation_config.json and
    config.json. Raises TokenizerError if there is no EOS, a name is not a token, an id is out of range, or a
    flag is not true or false.
    """
    folder = path.parent
    named = [config, *_existing(folder, _MAP)]
    numbered = _existing(folder, _GENERATION, FILE_NAME)

    def find(name: str) -> int | None:
        token = next(filter(None, (_text_of(values.get(f"{name}_token")) for values in named)), None)
        number = _number(folder, numbered, f"{name}_token_id", n_vocab)
        if token is None:
            return number
        if token not in ids:
            raise TokenizerError(
                f"{name}_token is {safe_line(repr(token), 50)}, which is not in the vocabulary",
                where=folder,
                remedy=f"correct it in tokenizer_config.json or {_MAP}",
            )
        if number not in (None, ids[token]) and name in ("bos", "eos"):
            note(f"{name} is {ids[token]} by its name but {number} in the configuration; the name is used")
        return ids[token]

    eos = find("eos")
    if eos is None:
        raise TokenizerError(
            "the tokenizer has no end-of-sequence token",
            where=folder,
            remedy="add eos_token to tokenizer_config.json",
        )
    bos = find("bos")
    check_tokens_around(path, around, bos, eos)
    add_bos = _flag(folder, config, "add_bos_token")
    add_eos = _flag(folder, config, "add_eos_token")
    if add_bos is None:
        add_bos = bool(around[0]) or config.get("tokenizer_class") in _ADDS_BOS
    if bos is None:
        note("the tokenizer has no beginning-of-sequence token; none is added to a text")
        bos, add_bos = eos, False
    if add_eos is None:
        add_eos = bool(around[1])
    return SpecialTokens(bos, eos, find("pad"), find("unk"), add_bos, add_eos)


def _existing(folder: Path, *names: str) -> list[dict[str, Any]]:
    """Return the content of those JSON files that exist."""
    return [load_json(folder / name) for name in names if (folder / name).exists()]


def _text_of(entry: object) -> str | None:
    """Return the text of a special token, which is stored as text or as an object with its `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _number(folder: Path, sources: list[dict[str, Any]], key: str, n_vocab: int) -> int | None:
    """Return the first id under `key` in the sources. Raises TokenizerError if any of them is invalid."""
    found = None
    for source in sources:
        value = source.get(key)
        # Several EOS ids are a list, of which the first is used.
        values = value if isinstance(value, list) else [] if value is None else [value]
        for number in values:
            # In some files, -1 means none.
            if type(number) is not int or not -1 <= number < n_vocab:
                raise TokenizerError(
                    f"{key} is {safe_line(repr(number), 30)}",
                    where=folder,
                    remedy=f"accepted: ids below vocab_size = {n_vocab}",
                )
            if found is None and number >= 0:
                found = number
    return found


def _flag(folder: Path, config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(
            f"{key} is {safe_line(repr(value), 30)}",
            where=f"{folder}: tokenizer_config.json",
            remedy="accepted: true, false",
        )
    return value
