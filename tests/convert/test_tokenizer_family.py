"""Ids of converted tokenizers in llama.cpp against `tokenizers`, for the splitting rules of each model."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from support import llama_oracle, vocabularies
from support.vocabularies import TEXTS, ids_of
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import GPTNeoXTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from dsmoe_convert.errors import TokenizerError
from dsmoe_convert.pretokenizers import DEFINITIONS, IGNORE_MERGES, KNOWN_NAMES
from dsmoe_convert.special_tokens import ENDS_BY_TEXT

NAMES = [known.name for known in DEFINITIONS]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
EXAMPLES = [150, pytest.param(20_000, marks=pytest.mark.soak)]


@pytest.fixture(scope="module", params=["trained", "of_pairs"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=NAMES)
def pair(
    request: pytest.FixtureRequest, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Tokenizer, llama_oracle.Vocabulary]]:
    """The name of splitting rules, a tokenizer with them, and llama.cpp's reading of the converted file."""
    tokenizer = getattr(vocabularies, kind)(request.param)
    folder = vocabularies.write_files(tmp_path_factory.mktemp("model"), tokenizer)
    fields = vocabularies.convert_vocabulary(folder, vocabularies.n_rows(tokenizer))
    assert fields["tokenizer.ggml.pre"].value == request.param
    with llama_oracle.vocabulary(folder / "vocabulary.gguf") as vocabulary:
        yield request.param, tokenizer, vocabulary


def test_texts(pair: tuple[str, Tokenizer, llama_oracle.Vocabulary]) -> None:
    """Guards: splitting rules recognised as others, merges in the wrong order, tokens at wrong ids."""
    pre, tokenizer, vocabulary = pair
    for text in TEXTS:
        text = "".join(c for c in text if vocabularies.is_split_equally(pre, c))
        ids = ids_of(tokenizer, text)
        assert vocabulary.encode(text) == ids, text
        assert b"".join(map(vocabulary.piece, ids)).decode() == text


@pytest.mark.parametrize("n", EXAMPLES)
def test_random_texts(n: int, pair: tuple[str, Tokenizer, llama_oracle.Vocabulary]) -> None:
    """Guards: a class of characters that llama.cpp splits in another way, unknown to `vocabularies`."""
    pre, tokenizer, vocabulary = pair

    @settings(
        max_examples=n,
        derandomize=n < 1000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(vocabularies.random_texts(pre))
    def check(text: str) -> None:
        assert vocabulary.encode(text) == ids_of(tokenizer, text)

    check()


DIFFERENT = (
    # It splits words at combining marks: Hindi and Thai take many more tokens.
    ("kimi-k2", "trained", "हिन्दी में एक वाक्य है"),
    ("kimi-k2", "trained", "ภาษาไทยไม่มีช่องว่าง"),
    ("kimi-k2", "trained", "it\u0301's"),
    # It does not split words before capitals. Only tokens with a part of a character show it.
    ("kimi-k2", "trained", "rÉ"),
    # It takes these Chinese characters for letters or symbols.
    ("kimi-k2", "of_pairs", "〇一"),
    ("kimi-k2", "of_pairs", "人々"),
    ("kimi-k2", "of_pairs", "⼀二"),
    # It replaces spaces outside ASCII, so that the range of Chinese characters does not match them.
    ("deepseek-llm", "trained", "\u2029 "),
    ("deepseek-llm", "trained", "  \u3000"),
    ("deepseek-coder", "trained", "\u2029 "),
)


@pytest.mark.parametrize(("pre", "kind", "text"), DIFFERENT)
def test_known_differences(pre: str, kind: str, text: str, tmp_path: Path) -> None:
    """Texts that llama.cpp splits in another way. If it no longer does, update docs/tokenizers.md."""
    tokenizer = getattr(vocabularies, kind)(pre)
    folder = vocabularies.write_files(tmp_path, tokenizer)
    vocabularies.convert_vocabulary(folder, vocabularies.n_rows(tokenizer))
    with llama_oracle.vocabulary(folder / "vocabulary.gguf") as vocabulary:
        assert vocabulary.encode(text) != ids_of(tokenizer, text)


def test_nfc_is_not_applied(tmp_path: Path) -> None:
    """Guards: Qwen's and OLMoE's tokenizers refused for their normalizer. Decomposed text has other ids."""
    tokenizer = Tokenizer.from_str(vocabularies.trained("qwen2").to_str())
    tokenizer.normalizer = normalizers.NFC()
    folder = vocabularies.write_files(tmp_path, tokenizer)
    vocabularies.convert_vocabulary(folder, vocabularies.n_rows(tokenizer))
    with llama_oracle.vocabulary(folder / "vocabulary.gguf") as vocabulary:
        assert vocabulary.encode("caf\xe9") == ids_of(tokenizer, "caf\xe9") == ids_of(tokenizer, "cafe\u0301")
        assert vocabulary.encode("cafe\u0301") != ids_of(tokenizer, "cafe\u0301")


def special(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, normalized=False, special=True) for text in texts]


def plain(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, normalized=True, special=False) for text in texts]


@dataclass(frozen=True)
class Model:
    """The special tokens of a model, as its files name them."""

    pre: str
    tokens: list[AddedToken]
    eos: str
    listed: tuple[str, ...] = ()
    """generation_config.json's eos_token_id."""
    prefix: tuple[str, ...] = ()
    """Tokens that the post-processor adds in front."""
    template: str = ""
    bos: str = ""
    """What we expect as BOS."""
    ends: tuple[str, ...] = ()
    """The tokens that we expect to end a reply."""


MODELS = {
    "GLM-4.5": Model(
        "glm4",
        special(
            "[MASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|code_prefix|>"
        ),
        vocabularies.EOS,
        (vocabularies.EOS, "<|user|>", "<|observation|>"),
        ("[gMASK]", "<sop>"),
        "[gMASK]<sop>\n{% for m in messages %}<|user|>\n{{ m.content }}{% endfor %}",
        "[gMASK]",
        (vocabularies.EOS, "<|user|>", "<|observation|>"),
    ),
    "Qwen3-30B-A3B": Model(
        "qwen2",
        [*special("<|im_start|>", "<|im_end|>"), *plain("<think>", "</think>", "<tool_call>")],
        "<|im_end|>",
        ("<|im_end|>", vocabularies.EOS),
        bos="<|im_end|>",
        ends=("<|im_end|>", vocabularies.EOS),
    ),
    "Ling-mini-2.0": Model(
        "bailingmoe2",
        special("<|startoftext|>", "[CLS]", "[gMASK]", "<role>", "</role>", "<|role_end|>"),
        vocabularies.EOS,
        (vocabularies.EOS, "<|role_end|>"),
        bos=vocabularies.EOS,
        ends=(vocabularies.EOS, "<|role_end|>"),
    ),
    "OLMoE-1B-7B": Model(
        "olmo",
        [*special("<|padding|>"), *plain(*(" " * n for n in range(24, 1, -1)), "|||EMAIL_ADDRESS|||")],
        vocabularies.EOS,
        bos=vocabularies.EOS,
        ends=(vocabularies.EOS,),
    ),
    "DeepSeek-V3": Model(
        "deepseek-v3",
        special(
            "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
            "<\uff5cend\u2581of\u2581sentence\uff5c>",
            "<\uff5cUser\uff5c>",
        ),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        prefix=("<\uff5cbegin\u2581of\u2581sentence\uff5c>",),
        bos="<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        ends=("<\uff5cend\u2581of\u2581sentence\uff5c>", vocabularies.EOS),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_special_tokens(name: str, tmp_path: Path) -> None:
    """Guards: replies that do not end, a wrong BOS, the text of a special token split into words."""
    model = MODELS[name]
    tokenizer = Tokenizer.from_str(vocabularies.trained(model.pre).to_str())
    tokenizer.add_tokens(model.tokens)
    ids = tokenizer.get_vocab()
    if model.prefix:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*model.prefix, "$A"], special_tokens=[(text, ids[text]) for text in model.prefix]
        )
    adds_bos = len(model.prefix) == 1
    config = {"eos_token": model.eos, "bos_token": model.bos if adds_bos else None}
    folder = vocabularies.write_files(
        tmp_path,
        tokenizer,
        config | {"chat_template": model.template},
        generation_config={"eos_token_id": [ids[text] for text in model.listed]},
    )
    notes: list[str] = []
    vocabularies.convert_vocabulary(folder, vocabularies.n_rows(tokenizer), notes=notes)
    text = "A  text,     with" + " tokens ".join(token.content for token in model.tokens)
    with llama_oracle.vocabulary(folder / "vocabulary.gguf") as vocabulary:
        expected = {"bos": ids[model.bos], "eos": ids[model.eos], "add_bos": adds_bos, "add_eos": False}
        assert vocabulary.special() == expected
        assert vocabulary.ends() == {ids[text] for text in model.ends}
        # llama.cpp adds BOS. GLM's two tokens are in its chat template.
        written = text if adds_bos else "".join(model.prefix) + text
        found = vocabulary.encode(written, add_special=True, parse_special=True)
        assert found == tokenizer.encode(text).ids
        assert b"".join(map(vocabulary.piece, found[adds_bos:])).decode() == written
    assert len(notes) == (0 if adds_bos else 1)


def test_an_end_of_reply_without_a_place(tmp_path: Path) -> None:
    """Guards: a third token beside EOS, or a word that is no special token, ignored without a word."""
    tokenizer = Tokenizer.from_str(vocabularies.trained("qwen2").to_str())
    tokenizer.add_tokens(special("<|a|>", "<|b|>", "<|c|>"))
    ids = [tokenizer.token_to_id(text) for text in (vocabularies.EOS, "<|a|>", "x", "<|b|>", "<|c|>")]
    folder = vocabularies.write_files(tmp_path, tokenizer, generation_config={"eos_token_id": ids})
    notes: list[str] = []
    fields = vocabularies.convert_vocabulary(folder, vocabularies.n_rows(tokenizer), notes=notes)
    assert [fields[f"tokenizer.ggml.{name}_token_id"].value for name in ("eos", "eot", "eom")] == [
        ids[0],
        ids[1],
        ids[3],
    ]
    assert f"eos_token_id {ids[2]} is ignored: 'x' is not a special token" in notes
    assert f"eos_token_id {ids[4]} is ignored: there is no place for '<|c|>' beside EOS, EOT, EOM" in notes


@pytest.mark.parametrize("text", sorted(ENDS_BY_TEXT))
def test_ends_by_text(text: str, tmp_path: Path) -> None:
    """Guards: a token that llama.cpp does not take for the end of a reply, and that we do not name to it."""
    tokenizer = Tokenizer.from_str(vocabularies.trained("qwen2").to_str())
    tokenizer.add_tokens(special(text))
    folder = vocabularies.write_files(tmp_path, tokenizer)
    vocabularies.convert_vocabulary(folder, vocabularies.n_rows(tokenizer))
    with llama_oracle.vocabulary(folder / "vocabulary.gguf") as vocabulary:
        assert tokenizer.token_to_id(text) in vocabulary.ends()


def test_names_of_pre_tokenizers(tmp_path: Path) -> None:
    """Guards: a name for --pre that llama.cpp does not know, or under which it merges in another way."""
    data = json.loads(vocabularies.trained("qwen2").to_str())
    data["model"]["vocab"]["qxqxq"] = len(data["model"]["vocab"])
    folder = vocabularies.write_files(tmp_path, None)
    ignoring = set()
    for name in KNOWN_NAMES:
        data["model"]["ignore_merges"] = name in IGNORE_MERGES
        (folder / "tokenizer.json").write_text(json.dumps(data))
        fields = vocabularies.convert_vocabulary(folder, len(data["model"]["vocab"]) + 5, pre=name)
        assert fields["tokenizer.ggml.pre"].value == name
        with llama_oracle.vocabulary(folder / "vocabulary.gguf") as vocabulary:
            if len(vocabulary.encode("qxqxq")) == 1:
                ignoring.add(name)
    assert ignoring == IGNORE_MERGES


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
@pytest.mark.parametrize("ignored", [False, True])
def test_merges_that_are_ignored(pre: str, ignored: bool, tmp_path: Path) -> None:
    """Guards: a token that only one of both uses, and nothing is said; a refusal without such a token."""
    data = json.loads(vocabularies.trained("qwen2").to_str())
    data["model"]["ignore_merges"] = ignored
    folder = vocabularies.write_files(tmp_path, None)
    n_vocab = len(data["model"]["vocab"]) + 5
    notes: list[str] = []
    for token in (None, "qxqxq"):
        if token:
            data["model"]["vocab"][token] = n_vocab - 5
        (folder / "tokenizer.json").write_text(json.dumps(data))
        if token and not ignored and pre == "llama-bpe":
            with pytest.raises(TokenizerError, match="ignore_merges is false"):
                vocabularies.convert_vocabulary(folder, n_vocab, pre=pre)
        else:
            vocabularies.convert_vocabulary(folder, n_vocab, pre=pre, notes=notes)
    assert sum("never uses, since no merges build them: 1, such as 'qxqxq'" in text for text in notes) == (
        ignored and pre == "qwen2"
    )


def test_gaps_in_the_vocabulary(tmp_path: Path) -> None:
    """Guards: ids shifted after a gap, or a gap that text can become."""
    tokenizer = Tokenizer.from_str(vocabularies.trained("qwen2").to_str())
    data = json.loads(tokenizer.to_str())
    last = tokenizer.get_vocab_size()
    data["added_tokens"].append({"id": last + 40, "content": "<late>", "special": True} | FLAGS)
    folder = vocabularies.write_files(tmp_path, tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    fields = vocabularies.convert_vocabulary(folder, last + 64)
    assert fields["tokenizer.ggml.tokens"].value[last + 40] == "<late>"
    assert fields["tokenizer.ggml.token_type"].value[last:] == [5] * 40 + [3] + [5] * 23
    with llama_oracle.vocabulary(folder / "vocabulary.gguf") as vocabulary:
        gap = f"[PAD{last}]"
        assert vocabulary.encode(gap, parse_special=True) == ids_of(tokenizer, gap)
        assert vocabulary.encode("<late>", parse_special=True) == [last + 40]


@pytest.mark.parametrize(("saver", "pre"), [(Qwen2Tokenizer, "qwen2"), (GPTNeoXTokenizer, "gpt-2")])
def test_classes_of_transformers(saver: Any, pre: str, tmp_path: Path) -> None:
    """Guards: rules that transformers 5 itself has for Qwen and OLMoE. Both classes normalize to NFC."""
    model = json.loads(vocabularies.trained(pre).to_str())["model"]
    saved = saver(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    saved.save_pretrained(tmp_path)
    fields = vocabularies.convert_vocabulary(tmp_path, len(saved) + 5)
    assert fields["tokenizer.ggml.pre"].value == pre
    with llama_oracle.vocabulary(tmp_path / "vocabulary.gguf") as vocabulary:
        for text in TEXTS:
            composed = unicodedata.normalize("NFC", text)
            assert vocabulary.encode(composed) == saved.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("pre", ["qwen2", "glm4"])
def test_saved_by_transformers(pre: str, tmp_path: Path) -> None:
    """Guards: the files of transformers 5, which differ from older ones."""
    tokenizer = vocabularies.trained(pre)
    saved = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=vocabularies.EOS,
        chat_template={"default": "{{ 1 }}", "tool_use": "{{ 2 }}"},
    )
    saved.save_pretrained(tmp_path)
    fields = vocabularies.convert_vocabulary(tmp_path, vocabularies.n_rows(tokenizer))
    assert fields["tokenizer.ggml.pre"].value == pre
    assert fields["tokenizer.ggml.eos_token_id"].value == tokenizer.token_to_id(vocabularies.EOS)
    assert fields["tokenizer.chat_template"].value == "{{ 1 }}"
    assert fields["tokenizer.chat_template.tool_use"].value == "{{ 2 }}"
    with llama_oracle.vocabulary(tmp_path / "vocabulary.gguf") as vocabulary:
        for text in TEXTS:
            assert vocabulary.encode(text) == saved.encode(text, add_special_tokens=False), text
