"""A tokenizer and the files beside it as GGUF metadata: recognition, special tokens, templates, refusals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import llama_oracle
from support.checkpoints import BOS, EOS, TINY, write_checkpoint, write_tokenizer
from support.vocabularies import TEXTS
from tokenizers import Tokenizer

from dsmoe_convert import check_encoding, pretokenizers
from dsmoe_convert.convert import ConvertOptions, convert_folder
from dsmoe_convert.tokenizer import read_tokenizer
from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.model.gguf_file import Field, read_gguf

REAL = Path(__file__).parents[3] / "shared" / "data" / "deepseek-llm-tokenizer"
SEPARATOR = "\n__ggml_vocab_test__\n"


def test_special_tokens(tmp_path: Path) -> None:
    """BOS that is not added, special-token text that becomes a special token when it must not."""
    out = convert_folder(write_checkpoint(tmp_path / "model"), tmp_path / "out.gguf").path
    with llama_oracle.vocabulary(out) as vocabulary:
        assert vocabulary.special() == {"bos": 0, "eos": 1, "add_bos": True, "add_eos": False}
        assert vocabulary.encode("", add_special=True) == [0]
        assert vocabulary.encode(f"a{EOS}", parse_special=True)[-1] == 1
        assert 1 not in vocabulary.encode(f"a{EOS}")
    types = read_gguf(out).get("tokenizer.ggml.token_type")
    tokens = read_gguf(out).get("tokenizer.ggml.tokens")
    assert tokens[-1] == f"[PAD{TINY.n_vocab - 1}]"
    assert (types[0], types[1], types[tokens.index("ø")], types[5], types[-1]) == (3, 3, 4, 1, 5)


@pytest.mark.skipif(not REAL.exists(), reason="the real tokenizer is not here")
def test_real_vectors(tmp_path: Path) -> None:
    """The 46 cases that llama.cpp ships for this tokenizer."""
    folder = write_checkpoint(tmp_path / "model", replace(TINY, n_vocab=102400, n_layers=1, n_dense_layers=0))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((REAL / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": 100000, "eos_token_id": 100001}
    (folder / "config.json").write_text(json.dumps(config))
    out = convert_folder(folder, tmp_path / "out.gguf", ConvertOptions("q8")).path
    texts = (REAL / "vectors.inp").read_text("utf-8").split(SEPARATOR)[:-1]
    wanted = [[int(word) for word in line.split()] for line in (REAL / "vectors.out").read_text().split("\n")]
    assert len(texts) == 46
    file = read_gguf(out)
    assert file.get("tokenizer.ggml.token_type")[100002:100015] == [4] * 13
    reference = Tokenizer.from_file(str(REAL / "tokenizer.json"))
    with llama_oracle.vocabulary(out) as vocabulary:
        assert vocabulary.special() == {"bos": 100000, "eos": 100001, "add_bos": True, "add_eos": False}
        for text, ids in zip(texts, wanted, strict=False):
            assert vocabulary.encode(text) == ids, text
        for text in TEXTS:
            assert vocabulary.encode(text) == reference.encode(text, add_special_tokens=False).ids, text


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a trained tokenizer and nothing else."""
    write_tokenizer(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def read(folder: Path, pre: str | None = None) -> dict[str, Field]:
    return read_tokenizer(folder, TINY.n_vocab, pre, lambda text: None)


def test_merges_in_both_forms(files: Path) -> None:
    """A tokenizer.json of another age: merges as strings instead of pairs, or the other way round."""
    pairs = read(files)
    edit(files, lambda t: t["model"].update(merges=[" ".join(merge) for merge in t["model"]["merges"]]))
    assert read(files) == pairs


def sequence(inner: str, *steps: object) -> dict[str, object]:
    return {"type": "Sequence", inner: list(steps)}


def nested(depth: int) -> dict[str, object]:
    step: dict[str, object] = {"type": "Digits"}
    for _ in range(depth):
        step = sequence("pretokenizers", step)
    return step


def template(*pieces: str | None, **more: object) -> dict[str, object]:
    """A post-processor; None stands for the text."""
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if piece is None
        else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}, **more}


REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown splitting": (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0), "pre-tokenizer"),
    "a normalizer": (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizer"),
    "a normalizer in a sequence": (
        lambda t: t.update(normalizer=sequence("normalizers", sequence("normalizers", {"type": "NFKC"}))),
        "NFKC",
    ),
    "a normalizer that is none": (lambda t: t.update(normalizer=[]), "normalizer"),
    "an unknown token": (
        lambda t: (t["model"].update(unk_token="a"), t["model"]["vocab"].pop("\u0100")),
        "replaces bytes without a token",
    ),
    "a token that takes the space before it": (lambda t: t["added_tokens"][2].update(lstrip=True), "lstrip"),
    "a token that takes the space behind it": (lambda t: t["added_tokens"][0].update(rstrip=True), "rstrip"),
    "a token that is a word": (lambda t: t["added_tokens"][2].update(single_word=True), "single_word"),
    "a template with another token": (
        lambda t: t.update(post_processor=template("a", None)),
        "adds the tokens 66",
    ),
    "a template with two tokens": (
        lambda t: t.update(post_processor=template(BOS, BOS, None)),
        "tokens 0, 0 before",
    ),
    "a template with EOS in front": (lambda t: t.update(post_processor=template(EOS, None)), "1 before"),
    "a template with BOS behind": (lambda t: t.update(post_processor=template(None, BOS)), "0 after"),
    "a template whose token is another": (
        lambda t: t.update(post_processor=template(BOS, None, special_tokens={BOS: {"ids": [7]}})),
        "7 before",
    ),
    "a template without a text": (lambda t: t.update(post_processor=template(BOS)), "cannot be read"),
    "a template that doubles the text": (
        lambda t: t.update(post_processor=template(None, None)),
        "cannot be",
    ),
    "a template with a token that is none": (
        lambda t: t.update(post_processor=template("<nothing>", None)),
        "cannot be read",
    ),
    "a post-processor of another kind": (
        lambda t: t.update(post_processor={"type": "RobertaProcessing", "sep": [EOS, 1], "cls": [BOS, 0]}),
        "RobertaProcessing",
    ),
    "an endless sequence": (
        lambda t: t.update(pre_tokenizer=nested(400)),
        "nested more than 64 levels deep",
    ),
    "not BPE": (lambda t: t["model"].update(type="Unigram"), "type"),
    "byte fallback": (lambda t: t["model"].update(byte_fallback=True), "byte_fallback"),
    "no model": (lambda t: t.pop("model"), "no model"),
    "no merges": (lambda t: t["model"].update(merges=[]), "merges"),
    "a merge of three": (lambda t: t["model"]["merges"].append(["a", "b", "c"]), "not a pair"),
    "a merge with a space": (lambda t: t["model"]["merges"].append(["a b", "c"]), "space"),
    "a merge to nowhere": (lambda t: t["model"]["merges"].append(["q", "\u0120q"]), "not in the vocabulary"),
    "two tokens, one id": (lambda t: t["model"]["vocab"].update({"zzz": 7}), "two tokens"),
    "id beyond the rows": (lambda t: t["model"]["vocab"].update({"zzz": TINY.n_vocab}), "vocab_size"),
    "negative id": (lambda t: t["model"]["vocab"].update({"zzz": -1}), "vocab_size"),
    "id that is no number": (lambda t: t["model"]["vocab"].update({"zzz": True}), "vocab_size"),
    "an empty token": (lambda t: t["model"]["vocab"].update({"": 630}), "not text"),
    "half a surrogate pair": (lambda t: t["model"]["vocab"].update({"\ud800": 630}), "not text"),
    "one token, two ids": (
        lambda t: t["added_tokens"].append({"id": 631, "content": "a", "special": False}),
        "two ids",
    ),
    "a padding row's name": (lambda t: t["model"]["vocab"].update({"[PAD639]": 630}), "PAD639"),
    "added token without text": (lambda t: t["added_tokens"].append({"id": 631}), "lacks"),
    "added tokens not a list": (lambda t: t.update(added_tokens={"a": 1}), "not a list"),
    "a definition on which the library panics": (
        lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
        "library cannot read it",
    ),
    "padding that fills the memory": (
        lambda t: t.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": t["pre_tokenizer"]["pretokenizers"][1:]},
            padding={
                "strategy": {"Fixed": 10**12},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            },
        ),
        "is not recognised",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_tokenizers_that_are_refused(case: str, files: Path) -> None:
    """A vocabulary that would make llama.cpp abort, or split text in another way without a word."""
    change, word = REFUSALS[case]
    edit(files, change)
    with pytest.raises(DsmoeError) as caught:
        read(files)
    assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert max(map(len, str(caught.value).splitlines())) < 160


def test_errors_without_a_text(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a refusal that says nothing, where the library ran out of memory."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "tokenizers.py").write_text(
        "class Tokenizer:\n    def from_file(path):\n        raise MemoryError\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(library))
    with pytest.raises(DsmoeError, match="the tokenizers library cannot read it: MemoryError"):
        check_encoding.encode(files / "tokenizer.json", "text")


def test_the_library_aborts(files: Path) -> None:
    """A definition that ends the process in which it is read."""
    edit(files, lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}))
    with pytest.raises(DsmoeError, match="library cannot read it"):
        check_encoding.encode(files / "tokenizer.json", "text")


@pytest.mark.parametrize("normalizer", [None, {"type": "Sequence", "normalizers": []}])
def test_a_normalizer_that_changes_nothing(normalizer: object, files: Path) -> None:
    """The tokenizer of the 16B, whose normalizer is a sequence of none, refused for it."""
    edit(files, lambda t: t.update(normalizer=normalizer))
    assert read(files)["tokenizer.ggml.pre"].value == "deepseek-llm"


HASHED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a normalizer": REFUSALS["a normalizer"],
    "a space in front": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
        "add_prefix_space",
    ),
    "not byte-level": (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(), "not byte-level"),
}


@pytest.mark.parametrize("case", HASHED)
@pytest.mark.parametrize("by_name", [True, False])
def test_what_no_name_stands_for(
    case: str, by_name: bool, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes ids beside the splitting, let pass where `--pre` or the check text gives the name."""
    change, word = HASHED[case]
    edit(files, REFUSALS["unknown splitting"][0])
    edit(files, change)
    if not by_name:
        monkeypatch.setattr(pretokenizers, "by_check_text", lambda encodings: "deepseek-llm")
    with pytest.raises(DsmoeError) as caught:
        read(files, "deepseek-llm" if by_name else None)
    assert word in str(caught.value)


@pytest.mark.parametrize("name", ["gemma4", "whitespace", "sarvam-moe", "granite-embed-multi-311m"])
def test_names_for_other_vocabularies(name: str, files: Path) -> None:
    """--pre with a name under which llama.cpp takes tokens for UTF-8, not for bytes."""
    with pytest.raises(UsageError, match="no pre-tokenizer called"):
        read(files, name)


def test_an_added_token_with_an_endless_id(files: Path) -> None:
    """Digits that Python refuses to turn into a number."""
    edit(files, lambda c: c.update(added_tokens_decoder={"1" * 5000: {"content": "x"}}), CONFIG)
    with pytest.raises(DsmoeError, match="lacks id"):
        read(files)


def test_padding_and_truncation_do_not_hide_a_known_tokenizer(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer.json saved with them, whose ids of the check text are then others."""

    split = {"type": "Split", "pattern": {"String": "\x07"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}

    def spoil(t: dict[str, Any], **settings: Any) -> None:
        t.update(pre_tokenizer=sequence("pretokenizers", split, level), **settings)

    edit(files, spoil)
    ids = check_encoding.encode(files / "tokenizer.json", pretokenizers.CHECK_TEXT)
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setattr(pretokenizers, "CHECK_HASHES", {digest: "smollm"})
    cut = {"max_length": 5, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    edit(files, lambda t: spoil(t, truncation=cut))
    assert read(files)["tokenizer.ggml.pre"].value == "smollm"


def test_a_vocabulary_that_joins_digits_is_not_deepseek_llm(files: Path) -> None:
    """llama.cpp keeps numbers whole under this name; a token for "12" would then be used where HF splits."""

    def join(t: dict[str, Any]) -> None:
        t["model"]["vocab"]["12"] = 630
        t["model"]["merges"].append(["1", "2"])

    edit(files, join)
    with pytest.raises(DsmoeError, match="pre-tokenizer"):
        read(files)


def test_duplicate_token_strings_are_refused(files: Path) -> None:
    """A key that JSON parsers silently take twice."""
    text = json.dumps(json.loads((files / "tokenizer.json").read_text()))
    (files / "tokenizer.json").write_text(text.replace('"vocab": {', '"vocab": {"a": 3, "a": 4, ', 1))
    with pytest.raises(DsmoeError, match="twice"):
        read(files)


def test_pre_overrides(files: Path) -> None:
    """--pre that is ignored, or that accepts a name llama.cpp will refuse."""
    edit(files, REFUSALS["unknown splitting"][0])
    assert read(files, "deepseek-coder")["tokenizer.ggml.pre"].value == "deepseek-coder"
    with pytest.raises(UsageError) as caught:
        read(files, "deepseek-lm")
    assert "deepseek-llm" in str(caught.value)


CONFIG = "tokenizer_config.json"


def test_bos_by_template_or_class(files: Path) -> None:
    """add_bos that is lost where the configuration does not say it."""
    edit(files, lambda c: c.pop("add_bos_token"), CONFIG)
    assert read(files)["tokenizer.ggml.add_bos_token"].value is True
    edit(files, lambda c: c.update(tokenizer_class="PreTrainedTokenizerFast"), CONFIG)
    assert read(files)["tokenizer.ggml.add_bos_token"].value is False
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }
    edit(files, lambda t: t.update(post_processor={"type": "Sequence", "processors": [template]}))
    assert read(files)["tokenizer.ggml.add_bos_token"].value is True


def test_special_ids_from_other_files(files: Path) -> None:
    """Checkpoints that name BOS and EOS in special_tokens_map.json, or by number only."""
    edit(files, lambda c: (c.pop("bos_token"), c.pop("eos_token")), CONFIG)
    (files / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": BOS, "eos_token": {"content": EOS}})
    )
    assert read(files)["tokenizer.ggml.eos_token_id"].value == 1
    (files / "special_tokens_map.json").unlink()
    (files / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 5]}))
    assert read(files)["tokenizer.ggml.eos_token_id"].value == 1
    (files / "generation_config.json").write_text(json.dumps({"eos_token_id": TINY.n_vocab}))
    with pytest.raises(DsmoeError, match="eos_token_id"):
        read(files)
    (files / "generation_config.json").unlink()
    with pytest.raises(DsmoeError, match="end-of-sequence"):
        read(files)


def test_eos_that_is_no_token(files: Path) -> None:
    """A name that the vocabulary lacks."""
    edit(files, lambda c: c.update(eos_token="<nothing>"), CONFIG)
    with pytest.raises(DsmoeError, match="eos_token"):
        read(files)


def test_templates_in_every_place(files: Path) -> None:
    """A chat template that is not found where newer and older tools keep it."""
    key = "tokenizer.chat_template"
    edit(files, lambda c: c.update(chat_template="{{ 1 }}"), CONFIG)
    assert read(files)[key].value == "{{ 1 }}"
    named = [{"name": "default", "template": "{{ 2 }}"}, {"name": "tool_use", "template": "{{ 3 }}"}]
    edit(files, lambda c: c.update(chat_template=named), CONFIG)
    assert read(files)[key].value == "{{ 2 }}"
    assert read(files)[f"{key}.tool_use"].value == "{{ 3 }}"
    assert read(files)["tokenizer.chat_templates"].value == ["tool_use"]
    (files / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 4 }}"}))
    assert read(files)[key].value == "{{ 4 }}"
    (files / "chat_template.jinja").write_text("{{ 5 }}")
    assert read(files)[key].value == "{{ 5 }}"
    assert "tokenizer.chat_templates" not in read(files)
    (files / "additional_chat_templates").mkdir()
    for name, text in (("tool-use", "{{ 6 }}"), ("rag", "{{ 7 }}")):
        (files / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    assert read(files)[key].value == "{{ 5 }}"
    assert read(files)[f"{key}.tool_use"].value == "{{ 6 }}"
    assert read(files)["tokenizer.chat_templates"].value == ["rag", "tool_use"]
    (files / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DsmoeError, match="UTF-8"):
        read(files)


def test_no_template_for_a_base_model(files: Path) -> None:
    """A base model that is given a chat template it was not trained with."""
    edit(files, lambda c: c.pop("chat_template"), CONFIG)
    assert not [key for key in read(files) if "chat_template" in key]


def test_known_hashes() -> None:
    """The second table: a name that llama.cpp does not load."""
    assert set(pretokenizers.CHECK_HASHES.values()) <= pretokenizers.KNOWN_NAMES
    assert {known.name for known in pretokenizers.DEFINITIONS} <= pretokenizers.KNOWN_NAMES


@pytest.mark.skipif(not REAL.exists(), reason="the real tokenizer is not here")
def test_recognition_by_check_text(tmp_path: Path) -> None:
    """A tokenizer whose rules are written in another form, known by the ids of the check text alone."""
    reference = Tokenizer.from_file(str(REAL / "tokenizer.json"))
    ids = reference.encode(pretokenizers.CHECK_TEXT, add_special_tokens=False).ids
    assert pretokenizers.by_check_text(([1, 2], ids, [100000, *ids])) == "deepseek-llm"
    assert pretokenizers.by_check_text((ids,)) is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((REAL / name).read_bytes())
    edit(tmp_path, lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="[\\n\\r]"))
    fields = read_tokenizer(tmp_path, 102400, None, lambda text: None)
    assert fields["tokenizer.ggml.pre"].value == "deepseek-llm"
