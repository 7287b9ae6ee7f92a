"""Write a random checkpoint of the exact DeepSeekMoE 16B shape, to measure conversion with: 33 GB of bf16.

    python benchmarks/make_checkpoint.py FOLDER                  28 layers, with a shard for each
    python benchmarks/make_checkpoint.py FOLDER --layers 2       a small one (2.2 GB)
    python benchmarks/make_checkpoint.py FOLDER --tokenizer DIR  with a real tokenizer's files

Weights are slices of one pool of normal numbers: they look like weights to a quantizer, and writing is as
fast as the disk. The tokenizer is synthetic unless one is given: pairs and triples of bytes under the
original's splitting rules.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.support import arguments
from dsmoe_convert.byte_level import byte_characters
from dsmoe_convert.pretokenizers import DEFINITIONS
from dsmoe_local.base.sizes import format_size
from dsmoe_local.model.config_json import config_values
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, layer_of, tensor_specs
from dsmoe_local.model.presets import PRESETS

PRESET = "deepseekmoe-16b"
POOL_WEIGHTS = 24 << 20
DEVIATION = 0.02
N_BPE_TOKENS = 100_000
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": BOS,
    "eos_token": EOS,
    "tokenizer_class": "LlamaTokenizerFast",
}

Pool = NDArray[np.uint16]


def to_bf16(values: NDArray[np.float32]) -> Pool:
    """Return the upper halves of floats, rounded to nearest."""
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def to_f32(weights: Pool) -> NDArray[np.float32]:
    """Return bf16 as floats."""
    return (weights.astype(np.uint32) << 16).view(np.float32)


def make_pool(seed: int) -> Pool:
    """Return normal numbers as bf16, so many that repetitions are far apart."""
    values = np.random.default_rng(seed).standard_normal(POOL_WEIGHTS, np.float32)
    return to_bf16(values * np.float32(DEVIATION))


def tensors_of(hp: Hyperparameters) -> Iterator[tuple[int | None, str, tuple[int, ...], Role]]:
    """Yield the layer, the Hugging Face name, the shape and the role of each tensor."""
    for spec in tensor_specs(hp):
        shape = spec.shape[-2:] if spec.role is Role.ROUTED_EXPERT else spec.shape
        for source in spec.sources:
            yield layer_of(spec.name), source, shape, spec.role


def _weights(count: int, role: Role, pool: Pool, random: np.random.Generator) -> Pool:
    """Return a random slice of the pool, or the whole pool repeated. Norms are near 1."""
    if count > len(pool):
        return np.resize(pool, count)
    start = int(random.integers(len(pool) - count + 1))
    weights = pool[start : start + count]
    if role is Role.NORM:
        return to_bf16(1 + to_f32(weights))
    return weights


def write_weights(folder: Path, hp: Hyperparameters, seed: int) -> int:
    """Write the shards and their index. Return the bytes of the weights."""
    pool, random = make_pool(seed), np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for number, layer in enumerate((None, *range(hp.n_layers)), 1):
        shard = f"model-{number:05}-of-{hp.n_layers + 1:05}.safetensors"
        tensors = [(name, shape, role) for at, name, shape, role in tensors_of(hp) if at == layer]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape, _ in tensors:
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / shard).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for _, shape, role in tensors:
                file.write(_weights(math.prod(shape), role, pool, random).data)
        weight_map |= {name: shard for name, _, _ in tensors}
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def tokenizer_json() -> dict[str, Any]:
    """Return a byte-level BPE of 100,000 tokens: bytes, pairs and triples, none of them with two digits."""
    letters = [character for byte, character in byte_characters().items() if not chr(byte).isdigit()]
    pairs = list(itertools.product(letters, letters))
    triples = (("".join(pair), letter) for pair in pairs for letter in letters)
    vocab = {character: at for at, character in enumerate(byte_characters().values())}
    merges = list(itertools.islice(itertools.chain(pairs, triples), N_BPE_TOKENS - len(vocab)))
    vocab |= {left + right: at for at, (left, right) in enumerate(merges, len(vocab))}
    added = [
        {"id": N_BPE_TOKENS + at, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for at, token in enumerate((BOS, EOS))
    ]
    return {**bpe_json(vocab, merges), "added_tokens": added}


def bpe_json(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return a byte-level BPE with the original's splitting rules as a tokenizer.json."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _splitting_steps()},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _splitting_steps() -> list[dict[str, Any]]:
    """Return the original's splitting rules in the form of a tokenizer.json."""
    steps: list[dict[str, Any]] = []
    for kind, *parameters in DEFINITIONS[0].steps:
        if kind == "Split":
            regex, behavior, invert = parameters
            steps.append({"type": kind, "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert})
        elif kind == "Digits":
            steps.append({"type": kind, "individual_digits": parameters[0]})
        else:
            prefix, use_regex = parameters
            steps.append(
                {"type": kind, "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}
            )
    return steps


def write_tokenizer(folder: Path, source: Path | None) -> None:
    """Write the files of a given tokenizer, or the synthetic one."""
    if source is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / name, folder / name)
        return
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG | {"chat_template": template}))


def make_checkpoint(folder: Path, *, layers: int = 28, seed: int = 0, tokenizer: Path | None = None) -> int:
    """Write a checkpoint to `folder`. Return the bytes of the weights."""
    hp = replace(PRESETS[PRESET].hp, n_layers=layers)
    folder.mkdir(parents=True, exist_ok=True)
    values = config_values(hp, bos_token_id=100000, eos_token_id=100001, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    write_tokenizer(folder, tokenizer)
    return write_weights(folder, hp, seed)


def main() -> None:
    """Write one."""
    given = arguments.parse(__doc__, "folder", layers=28, seed=0, tokenizer=Path)
    total = make_checkpoint(given.folder, layers=given.layers, seed=given.seed, tokenizer=given.tokenizer)
    print(f"{given.folder}: {format_size(total)}")


if __name__ == "__main__":
    main()
