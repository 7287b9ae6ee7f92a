"""Find llama.cpp's pre-tokenizer (`tokenizer.ggml.pre`) that splits text like a given tokenizer.json.

Pre-tokenizers are recognised by the splitting rules in tokenizer.json, with any vocabulary. If that fails,
the ids of llama.cpp's check text identify particular vocabularies. Rules and hashes are those of llama.cpp
(src/llama-vocab.cpp, conversion/base.py). To support another one, extend DEFINITIONS or CHECK_HASHES.
docs/tokenizers.md lists the texts that llama.cpp splits differently.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line

Step: TypeAlias = tuple[object, ...]
"""A splitting step: its kind and parameters, as `definition_of` normalizes them."""

_BYTES: Step = ("ByteLevel", False, False)
_BYTES_GPT2: Step = ("ByteLevel", False, True)
_DIGITS: Step = ("Digits", True)


def _split(regex: str) -> Step:
    return ("Split", regex, "Isolated", False)


# The letters of cased scripts, without modifiers. Escaped, since some look alike or change when normalized.
_CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-"
    "\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20"
    "-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc"
    "\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6"
    "-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-"
    "\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-"
    "\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-"
    "\U000118df\U0001e900-\U0001e943"
)
_CJK = _split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_KIMI_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI_K2_REGEX = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}*{_KIMI_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}+{_KIMI_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Definition:
    """The rules in tokenizer.json that correspond to llama.cpp's `name`.

    In llama.cpp, `ignore_merges` depends on the name. `marker` is a token that the vocabulary must have:
    llama.cpp has several names for some rules. `digits_stay_whole`: llama.cpp does not split numbers although
    these rules do. The result is equal only if no token has adjacent digits.
    """

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool = False
    marker: str = ""
    digits_stay_whole: bool = False


DEFINITIONS: tuple[Definition, ...] = (
    Definition(
        "deepseek-llm",
        (
            _split("[\r\n]"),
            _split(rf"\s?[{_CASED_LETTERS}]+"),
            _split(
                r"\s?[!-/:-~"
                "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
                r"]+"
            ),
            _split(r"\s+$"),
            _CJK,
            _DIGITS,
            _BYTES,
        ),
        digits_stay_whole=True,
    ),
    Definition(
        "deepseek-coder",
        (_split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _CJK, _DIGITS, _BYTES),
    ),
    Definition(
        "deepseek-v3",
        (
            _split(r"\p{N}{1,3}"),
            _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            _split(_DEEPSEEK_V3),
            _BYTES,
        ),
    ),
    Definition("smollm", (_DIGITS, _BYTES_GPT2)),
    Definition("olmo", (_BYTES_GPT2,), marker="|||IP_ADDRESS|||"),
    Definition("gpt-2", (_BYTES_GPT2,)),
    Definition("qwen2", (_split(_LLAMA3.replace("{1,3}", "")), _BYTES)),
    Definition("glm4", (_split(_LLAMA3), _BYTES), ignore_merges=True, marker="[gMASK]"),
    Definition("chatglm-bpe", (_split(_LLAMA3), _BYTES), marker="[gMASK]"),
    Definition("llama-bpe", (_split(_LLAMA3), _BYTES), ignore_merges=True),
    Definition("smaug-bpe", (_split(_LLAMA3), _BYTES)),
    Definition("bailingmoe2", (_split(_BAILING), _BYTES)),
    Definition("kimi-k2", (_split(KIMI_K2_REGEX), _BYTES)),
)
"""The first definition that fits is used."""

CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f "
    "(multiple emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 "
    "3.3 3..3 3...3 \u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785"
    "\U0001f601 ?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= "
    "\u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
"""llama.cpp's check text, which exercises as many splitting rules as possible."""

CHECK_HASHES: Mapping[str, str] = {
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "a1336059768a55c99a734006ffb02203cd450fed003e9a71886c88acf24fdbc2": "glm4",
    "9ca2dd618e8afaf09731a7cf6e2105b373ba6a1821559f258b272fe83e6eb902": "glm4",
    "cdf5f35325780597efd76153d4d1c16778f766173908894c04afc20108536267": "glm4",
    "96a5f08be6259352137b512d4157e333e21df7edd3fcd152990608735a65b224": "bailingmoe",
    "9b1be57e70d20d9501b2b3186e792d81181ae36ada3903c26f9fea418cf87206": "bailingmoe2",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "81212dc7cdb7e0c1074ca62c5aeab0d43c9f52b8a737be7b12a777c953027890": "kimi-k2",
}
"""llama.cpp's names by the sha256 of the ids of CHECK_TEXT, formatted as a Python list."""

# fmt: off
KNOWN_NAMES = frozenset({
    "a.x-4.0", "afmoe", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "chatglm-bpe", "codeshell",
    "cohere2moe", "command-r", "dbrx", "deepseek-coder", "deepseek-llm", "deepseek-r1-qwen", "deepseek-v3",
    "default", "exaone", "exaone-moe", "exaone4", "f2llmv2", "falcon", "falcon-h1", "falcon3", "gigachat",
    "glm4", "glm5", "gpt-2", "gpt-4o", "gpt3-finnish", "granite-docling", "granite-embed-multi-97m", "grok-2",
    "hunyuan", "hunyuan-dense", "hy_v4", "jais", "jais-2", "jina-de", "jina-es", "jina-v1-en", "jina-v2-code",
    "jina-v2-de", "jina-v2-es", "jina-v5-nano", "joyai-llm", "kanana2", "kimi-k2", "kormo", "laguna", "lfm2",
    "llada-moe", "llama-bpe", "llama-v3", "llama3", "llama4", "megrez", "mellum", "mellum2", "midm-2.0",
    "minerva-7b", "minicpm5", "minimax-m2", "modern-bert", "mpt", "olmo", "phi-2", "pixtral", "poro-chat",
    "qwen2", "qwen35", "refact", "roberta-bpe", "seed-coder", "smaug-bpe", "smollm", "solar-open", "spark2_5",
    "stablelm2", "starcoder", "superbpe", "talkie", "tekken", "tiny_aya", "trillion", "ufakzeka", "viking",
    "youtu",
})
# fmt: on
"""All names that llama.cpp accepts for a byte-level vocabulary. It refuses files with another name."""

# fmt: off
IGNORE_MERGES = frozenset({
    "falcon-h1", "falcon3", "glm4", "glm5", "granite-embed-multi-97m", "jina-v5-nano", "lfm2", "llama-bpe",
    "llama-v3", "llama3", "midm-2.0", "minicpm5", "pixtral", "tekken", "youtu",
})
# fmt: on
"""The names with which llama.cpp encodes a word that is a token as that token, without applying merges."""


def check_name(name: str) -> None:
    """Raise UsageError, with similar names, if llama.cpp does not know `name`."""
    if name in KNOWN_NAMES:
        return
    near = difflib.get_close_matches(name, KNOWN_NAMES, 3, 0.4) or ["deepseek-llm", "smollm", "gpt-2"]
    raise UsageError(
        f"llama.cpp has no pre-tokenizer called {safe_line(name, 40)!r}",
        remedy=f"did you mean {', '.join(near)}?",
    )


def by_definition(tokenizer: Mapping[str, Any], tokens: Container[str], *, joins_digits: bool) -> str | None:
    """Return llama.cpp's name for the splitting rules of a tokenizer.json with these `tokens`, or None.

    `joins_digits`: a token of the vocabulary contains two adjacent digits.
    """
    steps = definition_of(tokenizer.get("pre_tokenizer"))
    ignore_merges = tokenizer["model"].get("ignore_merges") or False
    known = [
        each
        for each in DEFINITIONS
        if each.steps == steps
        and (not each.marker or each.marker in tokens)
        and not (each.digits_stay_whole and joins_digits)
    ]
    # If none has the same `ignore_merges`, the caller checks whether that matters.
    known.sort(key=lambda each: each.ignore_merges != ignore_merges)
    return known[0].name if known else None


def by_check_text(encodings: Iterable[Sequence[int]]) -> str | None:
    """Return llama.cpp's name for a tokenizer that encodes CHECK_TEXT as one of `encodings`, or None."""
    for ids in encodings:
        name = CHECK_HASHES.get(hashlib.sha256(str(list(ids)).encode()).hexdigest())
        if name is not None:
            return name
    return None


def definition_of(pre_tokenizer: object) -> tuple[Step, ...]:
    """Return the steps of a `pre_tokenizer`, with sequences flattened and defaults filled in."""
    if not isinstance(pre_tokenizer, dict):
        return ()
    kind = pre_tokenizer.get("type")
    inner = pre_tokenizer.get("pretokenizers")
    if kind == "Sequence" and isinstance(inner, list):
        return tuple(step for item in inner for step in definition_of(item))
    if kind == "Split":
        pattern = pre_tokenizer.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        return (("Split", regex, pre_tokenizer.get("behavior"), pre_tokenizer.get("invert", False)),)
    if kind == "Digits":
        return (("Digits", pre_tokenizer.get("individual_digits", False)),)
    if kind == "ByteLevel":
        prefix, regex = pre_tokenizer.get("add_prefix_space", True), pre_tokenizer.get("use_regex", True)
        return (("ByteLevel", prefix, regex),)
    return ((kind, json.dumps(pre_tokenizer, sort_keys=True)),)
