"""Convert a checkpoint's tokenizer to GGUF metadata, without transformers.

It is read from tokenizer.json or tiktoken.model and the JSON files beside it. The vocabulary becomes
llama.cpp's `gpt2` model (byte-level BPE). Tokenizers on which llama.cpp would abort, or that it would not
reproduce, are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType

from dsmoe_convert import chat_templates, check_encoding, pretokenizers, tiktoken_ranks, unsupported
from dsmoe_convert.byte_level import decode, has_joined_digits
from dsmoe_convert.errors import TokenizerError
from dsmoe_convert.special_tokens import SpecialTokens, read_special_tokens
from dsmoe_convert.vocabulary import CONFIG, TokenizerFiles, Vocabulary, read_vocabulary, unreachable_tokens
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.json_object import load_json

TOKENIZER = "tokenizer.json"
_MAX_BYTES = 256 << 20


def read_tokenizer(
    folder: Path, n_vocab: int, pre: str | None, note: Callable[[str], None]
) -> dict[str, Field]:
    """Return the `tokenizer.*` metadata of a checkpoint with `n_vocab` rows in its embedding.

    `pre` names the pre-tokenizer; None: recognise it. `note` is called with messages for the user. Raises
    FileError if a file cannot be read, TokenizerError or FormatError if llama.cpp cannot reproduce the
    tokenizer, UsageError if llama.cpp does not know `pre`.
    """
    if pre is not None:
        pretokenizers.check_name(pre)
    files = _load(folder, n_vocab, pre)
    unsupported.check_normalizer(files.path, files.tokenizer.get("normalizer"))
    vocabulary = read_vocabulary(files, n_vocab)
    templates = chat_templates.read_templates(folder, files.config)
    special = read_special_tokens(files, vocabulary, templates, note)
    name = pre or _recognize(files, vocabulary, special)
    unsupported.check_pre_tokenizer(files.path, files.tokenizer)
    _check_ignore_merges(files, vocabulary, name, note)
    return {
        "tokenizer.ggml.model": Field("gpt2", GGUFValueType.STRING),
        "tokenizer.ggml.pre": Field(name, GGUFValueType.STRING),
        "tokenizer.ggml.tokens": _array(vocabulary.tokens, GGUFValueType.STRING),
        "tokenizer.ggml.token_type": _array(vocabulary.types, GGUFValueType.INT32),
        "tokenizer.ggml.merges": _array(vocabulary.merges, GGUFValueType.STRING),
        **special.fields(),
        **chat_templates.fields(templates),
    }


def _array(values: list[Any], item: GGUFValueType) -> Field:
    return Field(values, GGUFValueType.ARRAY, item)


def _load(folder: Path, n_vocab: int, pre: str | None) -> TokenizerFiles:
    config = load_json(folder / CONFIG, _MAX_BYTES) if (folder / CONFIG).exists() else {}
    path = folder / TOKENIZER
    if path.exists():
        return TokenizerFiles(path, load_json(path, _MAX_BYTES), config)
    path = folder / tiktoken_ranks.FILE_NAME
    if path.exists():
        return TokenizerFiles(path, tiktoken_ranks.as_tokenizer(path, config, n_vocab, pre), config)
    raise TokenizerError(
        f"the checkpoint has neither {TOKENIZER} nor {tiktoken_ranks.FILE_NAME}",
        where=folder,
        remedy="download it from the model's repository, or save the fast tokenizer to this folder",
    )


def _recognize(files: TokenizerFiles, vocabulary: Vocabulary, special: SpecialTokens) -> str:
    joins_digits = has_joined_digits(files.tokenizer["model"]["vocab"])
    name = pretokenizers.by_definition(files.tokenizer, vocabulary.ids, joins_digits=joins_digits)
    if name is None:
        plain = check_encoding.encode(files.path, pretokenizers.CHECK_TEXT)
        before, after = unsupported.tokens_around(
            files.path, files.tokenizer.get("post_processor"), vocabulary.ids
        )
        whole = [*before, *plain, *after]
        name = pretokenizers.by_check_text((plain, whole, [special.bos, *plain], [*plain, special.eos]))
    if name is None:
        raise TokenizerError(
            "the pre-tokenizer is not recognised",
            where=f"{files.path}: pre_tokenizer",
            remedy="name llama.cpp's equivalent, for example: --pre deepseek-llm",
        )
    return name


def _check_ignore_merges(
    files: TokenizerFiles, vocabulary: Vocabulary, name: str, note: Callable[[str], None]
) -> None:
    """Compare `ignore_merges` with what llama.cpp assumes for the pre-tokenizer `name`.

    With it, a word that is a token becomes that token, even if merges build others. It has no effect if
    merges build all tokens.
    """
    ignores = files.tokenizer["model"].get("ignore_merges") or False
    if ignores == (name in pretokenizers.IGNORE_MERGES):
        return
    tokens = unreachable_tokens(vocabulary)
    if tokens and not ignores:
        raise TokenizerError(
            f"ignore_merges is false, but llama.cpp's {name} would use {len(tokens)} tokens without merges",
            where=f"{files.path}: model",
            remedy="name other rules with --pre",
        )
    if tokens:
        example = safe_line(repr(decode(tokens[0]) or tokens[0]), 30)
        note(
            f"tokens that llama.cpp never uses, since no merges build them: {len(tokens)}, such as {example}"
        )
