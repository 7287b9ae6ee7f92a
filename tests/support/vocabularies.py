"""Small tokenizers with the splitting rules of real models, texts, and GGUF files without weights."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsmoe_convert.byte_level import byte_characters
from dsmoe_convert.pretokenizers import CHECK_TEXT, DEFINITIONS
from dsmoe_convert.tokenizer import read_tokenizer
from dsmoe_local.model.gguf_file import Field
from support.checkpoints import pre_tokenizer

EOS = "<|endoftext|>"

TEXTS = (
    "Hello world, how are you today?",
    " leading space and  two  spaces",
    "I'll say it's 'quoted', they've \"double\" ones... I'd know, we're sure I'm right, don't!",
    "I'LL SAY IT'S LOUD, THEY'VE GONE, WE'RE HERE, I'M SURE, DON'T, YOU'D KNOW 'LLama 'Tis 'Re",
    "人工智能模型可以回答问题。今天天气很好，我们去公园。第123章：2026年11月29日",
    "日本語のテキスト。カタカナ、ひらがな、漢字。東京タワーは333メートル。",
    "한국어 텍스트입니다. 오늘은 날씨가 좋네요! 안녕하세요 123 세계",
    "هذا نص باللغة العربية، وفيه أرقام ١٢٣ وعلامات ترقيم؟",
    "זהו טקסט בעברית. שלום, עולם!",
    "हिन्दी में एक वाक्य है। क्षेत्र १२३। ภาษาไทยไม่มีช่องว่าง ๑๒๓",
    "нещо на Български, Это текст на русском — тире",
    "Ελληνικό κείμενο. Größe, naïve café, Øl, Ångström, señor, coração, ΣΊΣΥΦΟΣ",
    "combining: e\u0301 n\u0303 a\u0308\u0323 o\u0302 Z\u0351\u035b\u0317 \u0301alone",
    "def f(x: int) -> int:\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; } // HelloWorld camelCase XMLHttpRequest\r\n",
    '{"key": [1, 2.50, null], "url": "https://example.org/?q=a&b=c#d"}',
    "0 1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 2026-11-24 ½ ² Ⅳ ①②③",
    "🚀 (normal) 😶‍🌫️ ✅ 🦙🦙 👩‍👩‍👧 🇩🇪 👍🏽 ❤️ 1️⃣",
    "\t\t\ttabs\n\n \n  \n   mixed \r\n windows\r\n\r\nold mac\r\r",
    "long" + " " * 200 + "whitespace" + "\n" * 50 + "and" + "\t" * 50 + "tabs" + " \n" * 40,
    "   \n",
    " ",
    "",
    "™ © € £ ∑∫√ ≤≥ → ← “quotes” ‘single’ … – «guillemets» _under_score_ a_b",
    "a" * 100 + " " + "A" * 100 + "1" * 100 + "!" * 100,
    "\x00\x01\x7f\x85\xa0\xad\u200b\u200d\u202e\ufeff\ufffd",
    CHECK_TEXT,
)

CORPUS = (
    *TEXTS,
    "The quick brown fox jumps over the lazy dog. It's what they've said: I'll go, you're late, she'd know.",
    "IT'S NOT WHAT THEY'VE SAID; WE'LL SEE. 'Twas 1984 and 3.14159 or 1,000,000 (2026-11-24).",
    "def encode(rows: list[int]) -> bytes:\n    return bytes(row % 256 for row in rows)  # 1234\n",
    "ខ្មែរ កាន់តែពិសេសអាច ქართული ენა հայերեն አማርኛ நன்றி ధన్యవాదాలు",
    "whitespace   runs\t\tand    indents        end   \r\nof\u3000lines \n \n\n\n\n",
    "a\"b'c`d~e!f@g#h$i%j^k&l*m(n)o-p_q=r+s[t]u{v}w\\x|y;z:1,2.3<4>5/6?7",
)

# Unicode 3.2: characters that every version of every library knows.
_KNOWN = unicodedata.ucd_3_2_0.category
_PIECES = (
    *(
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        " \n",
        "\u3000",
        "\xa0",
        "'",
        '"',
        "!",
        "-",
        "_",
        ".",
        ",",
        "/",
        "1",
        "12",
    ),
    *(
        "1234",
        "²",
        "٣",
        "a",
        "b",
        "A",
        "É",
        "é",
        "ß",
        "Hello",
        "WORLD",
        "helloWorld",
        "中",
        "文字",
        "あ",
        "カ",
        "한",
    ),
    *(
        "'s",
        "'S",
        "'re",
        "'RE",
        "'lL",
        "'ve",
        "'d",
        "'M",
        "é",
        "🚀",
        "👩‍👧",
        "\u200d",
        "\ufe0f",
        "\u0301",
        "नमस्ते",
        "ไทย",
    ),
)


def _is_unusual_space(character: str) -> bool:
    return character not in " \xa0" and unicodedata.category(character)[0] == "Z"


def _is_mark_or_capital(character: str) -> bool:
    """Characters that llama.cpp's kimi-k2 treats in another way: marks, capitals, Han outside its ranges."""
    category = unicodedata.category(character)
    return category[0] == "M" or category in ("Lu", "Lt") or "\u2e80" <= character <= "\u3029"


def _is_unusual_space_or_digit(character: str) -> bool:
    """llama.cpp's deepseek-llm does not split numbers. Our vocabulary of pairs joins digits beyond ASCII."""
    return _is_unusual_space(character) or (character > "\x7f" and unicodedata.category(character)[0] == "N")


_EXCLUDED: dict[str, Callable[[str], bool]] = {
    "deepseek-llm": _is_unusual_space_or_digit,
    "deepseek-coder": _is_unusual_space,
    "kimi-k2": _is_mark_or_capital,
}
"""Characters with which llama.cpp splits differently (see docs/tokenizers.md)."""


def is_split_equally(pre: str, text: str) -> bool:
    """True if llama.cpp splits texts of these characters as `tokenizers` does."""
    excluded = _EXCLUDED.get(pre, lambda character: False)
    return not any(map(excluded, text))


def random_texts(pre: str) -> st.SearchStrategy[str]:
    """Texts of common pieces and any characters that llama.cpp splits as `tokenizers` does."""

    def allowed(text: str) -> bool:
        return is_split_equally(pre, text)

    pieces = [piece for piece in _PIECES if allowed(piece)]
    known = st.characters(exclude_categories=("Cs", "Co", "Cn")).filter(
        lambda c: _KNOWN(c) != "Cn" and allowed(c)
    )
    return st.lists(st.one_of(st.sampled_from(pieces), known), max_size=20).map("".join)


def _new_tokenizer(pre: str, model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _special_tokens(pre: str) -> list[AddedToken]:
    marker = next(known.marker for known in DEFINITIONS if known.name == pre)
    return [AddedToken(text, normalized=False, special=True) for text in (EOS, marker) if text]


def _ignores_merges(pre: str) -> bool:
    return next(known.ignore_merges for known in DEFINITIONS if known.name == pre)


@cache
def trained(pre: str, n_tokens: int = 2000) -> Tokenizer:
    """A tokenizer trained under the rules `pre`, as those of real models are."""
    tokenizer = _new_tokenizer(pre, models.BPE(ignore_merges=_ignores_merges(pre)))
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=_special_tokens(pre),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


@cache
def of_pairs(pre: str) -> Tokenizer:
    """A tokenizer that merges a quarter of all pairs of bytes, so that wrong word boundaries change ids.

    It has no token of two digits, which deepseek-llm must not have.
    """
    characters = list(byte_characters().values())
    pairs = [(a, b) for a in characters for b in characters if not (a + b).isdigit()]
    pairs = random.Random(0).sample(pairs, len(pairs) // 4)
    vocab = {text: number for number, text in enumerate([*characters, *map("".join, pairs)])}
    tokenizer = _new_tokenizer(pre, models.BPE(vocab, pairs, ignore_merges=_ignores_merges(pre)))
    tokenizer.add_special_tokens(_special_tokens(pre))
    return tokenizer


def write_files(
    folder: Path, tokenizer: Tokenizer | None, config: Mapping[str, Any] | None = None, **others: Any
) -> Path:
    """Write tokenizer.json, tokenizer_config.json and other JSON files; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    files = {"tokenizer_config": config or {"eos_token": EOS}, **others}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def n_rows(tokenizer: Tokenizer) -> int:
    """The rows of an embedding for `tokenizer`, with a few to spare as most models have."""
    return tokenizer.get_vocab_size() + 5


def convert_vocabulary(
    folder: Path, n_vocab: int, pre: str | None = None, notes: list[str] | None = None
) -> dict[str, Field]:
    """Convert the tokenizer in `folder` and write it to `vocabulary.gguf` there; return the metadata."""
    fields = read_tokenizer(folder, n_vocab, pre, (notes if notes is not None else []).append)
    write_vocabulary_file(folder / "vocabulary.gguf", fields)
    return fields


def write_vocabulary_file(path: Path, fields: Mapping[str, Field]) -> Path:
    """Write a GGUF file that llama.cpp can load without weights."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in fields.items():
        writer.add_key_value(key, field.value, field.type, field.item_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of `text` without special tokens around it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Return the tokens of a tokenizer as tiktoken's ranks: bytes first, then in the order of merges."""
    to_byte = {character: byte for byte, character in byte_characters().items()}
    merges: Iterable[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    texts = dict.fromkeys([*to_byte, *("".join(pair) for pair in merges)])
    return {bytes(to_byte[character] for character in text): rank for rank, text in enumerate(texts)}
