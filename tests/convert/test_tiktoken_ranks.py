"""Tokenizers in the form of tiktoken ranks against `tiktoken`, as Moonlight and Kimi-K2 have them."""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from support import llama_oracle, vocabularies
from support.vocabularies import TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dsmoe_convert.errors import TokenizerError
from dsmoe_convert.pretokenizers import KIMI_K2_REGEX
from dsmoe_convert.tiktoken_ranks import as_tokenizer, read_ranks
from dsmoe_local.base.errors import DsmoeError

REAL = Path(__file__).parents[3] / "shared" / "data" / "deepseek-llm-tokenizer" / "tokenizer.json"
EXAMPLES = [200, pytest.param(20_000, marks=pytest.mark.soak)]
SPECIAL = ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>")
THINK = "<think>"
N_RESERVED = 32
CLASS = "TikTokenTokenizer"


def ranks_of_kimi() -> dict[bytes, int]:
    return vocabularies.ranks_of(vocabularies.trained("kimi-k2"))


def write_ranks(folder: Path, ranks: Mapping[bytes, int], tokenizer_class: str = CLASS) -> Path:
    """Write the files of a tokenizer with `ranks` and a few special tokens; return the folder."""
    first = len(ranks)
    added = {str(first + n): {"content": text, "special": True} for n, text in enumerate(SPECIAL)}
    added[str(first + 10)] = {"content": THINK, "special": False}
    config = {
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "tokenizer_class": tokenizer_class,
    }
    vocabularies.write_files(folder, None, config)
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    return folder


def test_ids_of_tiktoken(tmp_path: Path) -> None:
    """Guards: merges that build other tokens than the ranks, special tokens at wrong ids."""
    ranks = ranks_of_kimi()
    first = len(ranks)
    notes: list[str] = []
    fields = vocabularies.convert_vocabulary(write_ranks(tmp_path, ranks), first + N_RESERVED, notes=notes)
    assert notes == []
    assert fields["tokenizer.ggml.pre"].value == "kimi-k2"
    tokens, types = (fields[f"tokenizer.ggml.{name}"].value for name in ("tokens", "token_type"))
    assert tokens[first : first + 5] == list(SPECIAL)
    assert tokens[first + 5] == f"<|reserved_token_{first + 5}|>"
    assert types[first:] == [3] * 10 + [4] + [3] * (N_RESERVED - 11)
    special = {text: first + n for n, text in enumerate(SPECIAL)} | {THINK: first + 10}
    encoding = tiktoken.Encoding("kimi", pat_str=KIMI_K2_REGEX, mergeable_ranks=ranks, special_tokens=special)
    with llama_oracle.vocabulary(tmp_path / "vocabulary.gguf") as vocabulary:
        assert vocabulary.special() == {
            "bos": first,
            "eos": first + 2,
            "add_bos": False,
            "add_eos": False,
        }
        assert vocabulary.ends() == {first + 1, first + 2}
        for text in (*TEXTS, "[BOS]<|im_user|>user<think>\n a b</think><|im_end|>"):
            text = "".join(c for c in text if vocabularies.is_split_equally("kimi-k2", c))
            ids = encoding.encode(text, allowed_special="all")
            assert vocabulary.encode(text, parse_special=True) == ids, text
            assert b"".join(map(vocabulary.piece, ids)).decode() == text


@pytest.mark.parametrize("n", EXAMPLES)
def test_random_texts(n: int, tmp_path: Path) -> None:
    """Guards: a merge that `tiktoken` does in another order."""
    ranks = ranks_of_kimi()
    vocabularies.convert_vocabulary(write_ranks(tmp_path, ranks), len(ranks) + N_RESERVED)
    encoding = tiktoken.Encoding("kimi", pat_str=KIMI_K2_REGEX, mergeable_ranks=ranks, special_tokens={})
    with llama_oracle.vocabulary(tmp_path / "vocabulary.gguf") as vocabulary:

        @settings(
            max_examples=n,
            derandomize=n < 1000,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(vocabularies.random_texts("kimi-k2"))
        def check(text: str) -> None:
            assert vocabulary.encode(text) == encoding.encode_ordinary(text)

        check()


def test_merges_of_a_trained_tokenizer(tmp_path: Path) -> None:
    """Guards: merges that differ from those with which the tokens were made."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        vocabularies.CORPUS,
        trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False),
    )
    path = write_ranks(tmp_path, vocabularies.ranks_of(tokenizer)) / "tiktoken.model"
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert as_tokenizer(path, {}, 2000, "kimi-k2")["model"]["merges"] == merges


@pytest.mark.skipif(not REAL.exists(), reason="the real tokenizer is not here")
def test_merges_of_a_real_tokenizer(tmp_path: Path) -> None:
    """Guards: as above, with 20,000 merges in many languages."""
    tokenizer = Tokenizer.from_file(str(REAL))
    ranks = dict(list(vocabularies.ranks_of(tokenizer).items())[:20_256])
    path = write_ranks(tmp_path, ranks) / "tiktoken.model"
    merges = json.loads(tokenizer.to_str())["model"]["merges"][:20_000]
    assert as_tokenizer(path, {}, 30_000, "kimi-k2")["model"]["merges"] == merges


def test_tokens_that_no_merges_build(tmp_path: Path) -> None:
    """Guards: a token that `tiktoken` uses for a whole word and llama.cpp never, without a word."""
    ranks = ranks_of_kimi()
    ranks |= {b"qxqxq": len(ranks), b"zqzqz": len(ranks) + 1}
    notes: list[str] = []
    folder = write_ranks(tmp_path, ranks)
    vocabularies.convert_vocabulary(folder, len(ranks) + N_RESERVED, notes=notes)
    assert notes == ["tokens that llama.cpp never uses, since no merges build them: 2, such as 'qxqxq'"]


def test_added_tokens_that_are_none(tmp_path: Path) -> None:
    """Guards: a configuration of another shape that raises what nobody catches."""
    ranks = ranks_of_kimi()
    folder = write_ranks(tmp_path, ranks)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": 5}))
    with pytest.raises(TokenizerError, match="added_tokens_decoder"):
        vocabularies.convert_vocabulary(folder, len(ranks) + N_RESERVED)


def test_order_of_lines(tmp_path: Path) -> None:
    """Guards: ids by line instead of by rank."""
    ranks = ranks_of_kimi()
    items = list(ranks.items())
    random.Random(0).shuffle(items)
    assert read_ranks(write_ranks(tmp_path, dict(items)) / "tiktoken.model") == ranks


LINES = [b"%s %d" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)]
DAMAGED = {
    "no rank": [*LINES, b"YWI="],
    "not base64": [*LINES, b"YW!= 256"],
    "a rank twice": [*LINES, b"YWI= 255"],
    "a token twice": [*LINES, b"YQ== 256"],
    "a gap": [*LINES, b"YWI= 257"],
    "a negative rank": [*LINES, b"YWI= -1"],
    "an endless rank": [*LINES, b"YWI= " + b"1" * 5000],
    "an empty token": [*LINES, b" 256"],
    "an empty line": [*LINES, b""],
    "a long token": [*LINES, base64.b64encode(b"a" * 1025) + b" 256"],
    "a missing byte": [*LINES[:255]],
    "other bytes": [b"\xff\xfe\x00"],
    "nothing": [],
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_ranks(case: str, tmp_path: Path) -> None:
    """Guards: a damaged file that is converted, or that raises what nobody catches."""
    path = tmp_path / "tiktoken.model"
    path.write_bytes(b"\n".join([*DAMAGED[case], b""]) if case != "nothing" else b"")
    with pytest.raises(TokenizerError) as caught:
        read_ranks(path)
    assert max(map(len, str(caught.value).splitlines())) < 160


def test_unknown_rules(tmp_path: Path) -> None:
    """Guards: the splitting rules of Kimi taken for those of any file with this name."""
    ranks = ranks_of_kimi()
    folder = write_ranks(tmp_path, ranks, "HunyuanTokenizer")
    with pytest.raises(DsmoeError, match="--pre kimi-k2"):
        vocabularies.convert_vocabulary(folder, len(ranks) + N_RESERVED)
    fields = vocabularies.convert_vocabulary(folder, len(ranks) + N_RESERVED, pre="gpt-4o")
    assert fields["tokenizer.ggml.pre"].value == "gpt-4o"


def test_long_tokens_are_fast(tmp_path: Path) -> None:
    """Guards: a file of long tokens whose merges take hours to find."""
    words = itertools.islice(itertools.product(b"ab", repeat=10), 50)
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {bytes(word) * 100: 256 + n for n, word in enumerate(words)}
    path = write_ranks(tmp_path, ranks) / "tiktoken.model"
    assert as_tokenizer(path, {}, 400, "kimi-k2")["model"]["merges"] == []
