"""Make the Hugging Face files of the source's tokenizer.

Vocabulary, merges and chat template are those of the GGUF file. The splitting rules are those of its
pre-tokenizer, `smollm`: single digits, then GPT-2's rules.
"""

from __future__ import annotations

from typing import Any

from gguf.constants import TokenType

from dsmoe_convert.demo.source import Source

_SPECIAL = (TokenType.CONTROL, TokenType.USER_DEFINED)


def tokenizer_json(source: Source) -> dict[str, Any]:
    """Return the content of tokenizer.json."""
    tokens: list[str] = source.metadata("tokenizer.ggml.tokens")
    types: list[int] = source.metadata("tokenizer.ggml.token_type")
    merges: list[str] = source.metadata("tokenizer.ggml.merges")
    added = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == TokenType.CONTROL,
        }
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in _SPECIAL
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def tokenizer_config(source: Source) -> dict[str, Any]:
    """Return the content of tokenizer_config.json: special tokens, BOS and EOS, the chat template."""
    tokens: list[str] = source.metadata("tokenizer.ggml.tokens")
    types: list[int] = source.metadata("tokenizer.ggml.token_type")

    def token(name: str) -> str:
        token_id: int = source.metadata(f"tokenizer.ggml.{name}_token_id")
        return tokens[token_id]

    return {
        "add_bos_token": source.metadata("tokenizer.ggml.add_bos_token"),
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {
                "content": tokens[token_id],
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": kind == TokenType.CONTROL,
            }
            for token_id, kind in enumerate(types)
            if kind in _SPECIAL
        },
        "bos_token": token("bos"),
        "chat_template": source.metadata("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": source.hyperparameters.n_context,
        "pad_token": token("padding"),
        "tokenizer_class": "GPT2TokenizerFast",
        "unk_token": token("unknown"),
    }


def generation_config(source: Source) -> dict[str, Any]:
    """Return the content of generation_config.json."""
    return {
        "bos_token_id": source.metadata("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.metadata("tokenizer.ggml.eos_token_id"),
        "pad_token_id": source.metadata("tokenizer.ggml.padding_token_id"),
    }
