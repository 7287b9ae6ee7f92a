"""Find the ids of BOS, EOS and other special tokens, and whether BOS and EOS are added to the input.

BOS and EOS are always written to the file: without them, llama.cpp uses token 11 for both, and adds none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType, TokenType

from dsmoe_convert import chat_templates
from dsmoe_convert.errors import TokenizerError
from dsmoe_convert.unsupported import check_tokens_around, tokens_around
from dsmoe_convert.vocabulary import TokenizerFiles, Vocabulary
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.config_json import FILE_NAME
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.json_object import load_json

# Classes that add BOS by default.
_ADDS_BOS = ("LlamaTokenizer", "LlamaTokenizerFast")
_MAP = "special_tokens_map.json"
_GENERATION = "generation_config.json"

# fmt: off
ENDS_BY_TEXT = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
})
# fmt: on
"""The tokens that llama.cpp takes for the end of a reply because of their text (src/llama-vocab.cpp)."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of special tokens. `eot` and `eom` end a reply, like `eos`."""

    bos: int
    eos: int
    eot: int | None
    eom: int | None
    padding: int | None
    unknown: int | None
    add_bos: bool
    add_eos: bool

    def fields(self) -> dict[str, Field]:
        """Return them as GGUF metadata."""
        ids = {
            "bos": self.bos,
            "eos": self.eos,
            "eot": self.eot,
            "eom": self.eom,
            "unknown": self.unknown,
            "padding": self.padding,
        }
        flags = {"add_bos_token": self.add_bos, "add_eos_token": self.add_eos}
        return {
            f"tokenizer.ggml.{name}_token_id": Field(token_id, GGUFValueType.UINT32)
            for name, token_id in ids.items()
            if token_id is not None
        } | {f"tokenizer.ggml.{name}": Field(flag, GGUFValueType.BOOL) for name, flag in flags.items()}


def read_special_tokens(
    files: TokenizerFiles, vocabulary: Vocabulary, templates: Mapping[str, str], note: Callable[[str], None]
) -> SpecialTokens:
    """Return the special tokens of a tokenizer with these chat templates.

    Names in tokenizer_config.json or special_tokens_map.json take precedence over ids in
    generation_config.json and config.json. Raises TokenizerError if there is no EOS, a name is not a token,
    an id is out of range, or a flag is not true or false.
    """
    folder = files.path.parent
    ids, n_vocab = vocabulary.ids, len(vocabulary.tokens)
    named = [files.config, *_existing(folder, _MAP)]
    numbered = _existing(folder, _GENERATION, FILE_NAME)

    def find(name: str) -> int | None:
        token = next(filter(None, (_text_of(values.get(f"{name}_token")) for values in named)), None)
        number = next(iter(_numbers(folder, numbered, f"{name}_token_id", n_vocab)), None)
        if token is None:
            return number
        if token not in ids:
            raise TokenizerError(
                f"{name}_token is {safe_line(repr(token), 50)}, which is not in the vocabulary",
                where=folder,
                remedy=f"correct it in tokenizer_config.json or {_MAP}",
            )
        if number not in (None, ids[token]) and name == "bos":
            note(f"bos is {ids[token]} by its name but {number} in the configuration; the name is used")
        return ids[token]

    eos = find("eos")
    if eos is None:
        raise TokenizerError(
            "the tokenizer has no end-of-sequence token",
            where=folder,
            remedy="add eos_token to tokenizer_config.json",
        )
    eot, eom = _other_ends(eos, _numbers(folder, numbered, "eos_token_id", n_vocab), vocabulary, note)
    bos = find("bos")
    before, after = tokens_around(files.path, files.tokenizer.get("post_processor"), ids)
    if _is_in_template(before, vocabulary, templates):
        # As GLM's [gMASK]<sop>. llama.cpp cannot add two tokens, but need not for conversations.
        shown = safe_line("".join(vocabulary.tokens[token_id] for token_id in before), 40)
        note(f"{shown} is added in front of conversations, but not of other texts")
        bos, before = before[0] if bos is None else bos, []
    check_tokens_around(files.path, (before, after), bos, eos)
    add_bos = _flag(folder, files.config, "add_bos_token")
    add_eos = _flag(folder, files.config, "add_eos_token")
    if add_bos is None:
        add_bos = bool(before) or files.config.get("tokenizer_class") in _ADDS_BOS
    if bos is None:
        note("the tokenizer has no beginning-of-sequence token; none is added to a text")
        bos, add_bos = eos, False
    if add_eos is None:
        add_eos = bool(after)
    return SpecialTokens(bos, eos, eot, eom, find("pad"), find("unk"), add_bos, add_eos)


def _other_ends(
    eos: int, listed: list[int], vocabulary: Vocabulary, note: Callable[[str], None]
) -> tuple[int | None, int | None]:
    """Return the tokens for EOT and EOM: those of the listed ids that llama.cpp does not find by their text.

    `listed` are the ids of the configuration, of which some files have several.
    """
    found: list[int] = []
    for token_id in listed:
        text = vocabulary.tokens[token_id]
        if token_id == eos or text in ENDS_BY_TEXT:
            continue
        shown = safe_line(repr(text), 30)
        if vocabulary.types[token_id] != TokenType.CONTROL:
            note(f"eos_token_id {token_id} is ignored: {shown} is not a special token")
        elif len(found) == 2:
            note(f"eos_token_id {token_id} is ignored: there is no place for {shown} beside EOS, EOT, EOM")
        else:
            found.append(token_id)
    eot, eom = (*found, None, None)[:2]
    return eot, eom


def _is_in_template(before: list[int], vocabulary: Vocabulary, templates: Mapping[str, str]) -> bool:
    """True if the chat template has the text of several special tokens that the tokenizer adds in front."""
    return (
        len(before) > 1
        and all(0 <= token_id < len(vocabulary.tokens) for token_id in before)
        and all(vocabulary.types[token_id] == TokenType.CONTROL for token_id in before)
        and "".join(vocabulary.tokens[token_id] for token_id in before)
        in templates.get(chat_templates.DEFAULT, "")
    )


def _existing(folder: Path, *names: str) -> list[dict[str, Any]]:
    """Return the content of those JSON files that exist."""
    return [load_json(folder / name) for name in names if (folder / name).exists()]


def _text_of(entry: object) -> str | None:
    """Return the text of a special token, which is stored as text or as an object with its `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _numbers(folder: Path, sources: list[dict[str, Any]], key: str, n_vocab: int) -> list[int]:
    """Return the ids under `key` in the first source that has any.

    Raises TokenizerError for an invalid id in any source.
    """
    found: list[int] = []
    for source in sources:
        value = source.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for number in values:
            # In some files, -1 means none.
            if type(number) is not int or not -1 <= number < n_vocab:
                raise TokenizerError(
                    f"{key} is {safe_line(repr(number), 30)}",
                    where=folder,
                    remedy=f"accepted: ids below vocab_size = {n_vocab}",
                )
        found = found or [number for number in values if number >= 0]
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
