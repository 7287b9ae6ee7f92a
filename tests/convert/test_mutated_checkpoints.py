"""Files of a checkpoint, mutated: an error in words or a result, soon, in bounded memory."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.mutations import damaged_bytes, damaged_json, try_mutants

from dsmoe_convert import check_encoding, safetensors_file
from dsmoe_convert.checkpoint import PICKLE, SAFETENSORS, Form, match_index, read_index
from dsmoe_convert.errors import TokenizerError
from dsmoe_convert.shards import StoredTensor
from dsmoe_convert.tokenizer import read_tokenizer

COUNTS = [300, pytest.param(50_000, marks=pytest.mark.soak)]
N_VOCAB = 12
BOS, EOS = "<|begin|>", "<|end|>"


@pytest.mark.parametrize("n", COUNTS)
def test_safetensors(n: int, tmp_path: Path) -> None:
    """A header that makes a reader raise what nobody catches, or believe in bytes that are not there."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 4), "b": torch.ones(3, dtype=torch.bfloat16)}, path, {"format": "pt"})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def read(rng: random.Random) -> None:
        content = damaged_bytes(whole, rng)
        if rng.random() < 0.7:
            changed = damaged_json(header, rng)
            content = len(changed).to_bytes(8, "little") + changed + data
        path.write_bytes(content)
        for tensor in safetensors_file.read_tensors(path).values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.n_bytes <= len(content)

    try_mutants(read, n, seed=1)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("form", [SAFETENSORS, PICKLE])
def test_indexes(form: Form, n: int, tmp_path: Path) -> None:
    """An index that leads out of its folder, or makes the reader raise what nobody catches."""
    path = tmp_path / form.index
    names = [f"model-0000{number}-of-00002{form.suffix}" for number in (1, 2)]
    weight_map = {f"model.{number}.weight": names[number % 2] for number in range(4)}
    index = {"metadata": {"total_size": 8}, "weight_map": weight_map}

    def stored(shard: str) -> dict[str, StoredTensor]:
        return {
            name: StoredTensor(name, "F32", (1,), shard, 0, 4)
            for name, place in weight_map.items()
            if place == shard
        }

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_json(index, rng))
        found = read_index(path, form.suffix)
        for shard in found.values():
            assert (tmp_path / shard).parent == tmp_path
        match_index(found, {shard: stored(shard) for shard in found.values()}, tmp_path)

    try_mutants(read, n, seed=2)


def tokenizer() -> dict[str, Any]:
    """A tokenizer.json with as little in it as one can have."""
    vocab = {"a": 0, "b": 1, "c": 2, "\u0120": 3, "ab": 4, "abc": 5}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 6, "content": BOS, **flags}, {"id": 7, "content": EOS, **flags}],
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {BOS: {"id": BOS, "ids": [6], "tokens": [BOS]}},
        },
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "dropout": None, "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]]},
    }


FILES: Mapping[str, Any] = {
    "tokenizer.json": tokenizer(),
    "tokenizer_config.json": {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {"6": {"content": BOS, "special": True}},
        "bos_token": {"__type": "AddedToken", "content": BOS},
        "eos_token": EOS,
        "chat_template": [{"name": "default", "template": "{{ 1 }}"}],
        "tokenizer_class": "LlamaTokenizerFast",
    },
    "special_tokens_map.json": {"bos_token": BOS, "eos_token": {"content": EOS}, "pad_token": EOS},
    "generation_config.json": {"bos_token_id": 6, "eos_token_id": [7, 6], "pad_token_id": -1},
    "config.json": {"bos_token_id": 6, "eos_token_id": 7},
    "chat_template.json": {"chat_template": "{{ 1 }}"},
}


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("name", FILES)
def test_tokenizer_files(name: str, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the tokenizer that makes its reader raise what nobody catches."""
    for other, content in FILES.items():
        (tmp_path / other).write_text(json.dumps(content))
    if name == "special_tokens_map.json":
        # Where the configuration names them, too, nothing asks this file.
        (tmp_path / "tokenizer_config.json").write_text("{}")
    path = tmp_path / name

    def no_child(path: Path, text: str) -> list[int]:
        raise TokenizerError("not recognised", where=path)

    monkeypatch.setattr(check_encoding, "encode", no_child)

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_json(FILES[name], rng))
        fields = read_tokenizer(tmp_path, N_VOCAB, None, lambda text: None)
        assert len(fields["tokenizer.ggml.tokens"].value) == N_VOCAB
        json.dumps({key: field.value for key, field in fields.items()}).encode()

    try_mutants(read, n, seed=3)
