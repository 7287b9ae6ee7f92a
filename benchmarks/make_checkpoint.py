"""Write a random checkpoint of the exact DeepSeekMoE 16B shape, to measure conversion with: 33 GB of bf16.

    python benchmarks/make_checkpoint.py FOLDER                  28 layers in 7 shards, like the original
    python benchmarks/make_checkpoint.py FOLDER --layers 2       a small one (2.2 GB)
    python benchmarks/make_checkpoint.py FOLDER --tokenizer DIR  with a real tokenizer's files

Weights are slices of one pool of normal numbers: they look like weights to a quantizer, and writing is as
fast as the disk. The tokenizer is synthetic unless one is given: pairs and triples of bytes under the
original's splitting rules.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmoe_convert.byte_level import byte_characters
from dsmoe_convert.pretokenizers import DEFINITIONS
from dsmoe_local.base.sizes import format_size
from dsmoe_local.model.config_json import config_values
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, tensor_specs
from dsmoe_local.model.presets import PRESETS

PRESET = "deepseekmoe-16b"
POOL_WEIGHTS = 24 << 20
DEVIATION = 0.02
WRITE_BYTES = 16 << 20
N_BPE_TOKENS = 100_000
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"

Pool = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write, by its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def n_bytes(self) -> int:
        """Size as bf16."""
        return 2 * int(np.prod(self.shape))


def entries_of(hp: Hyperparameters) -> list[Entry]:
    """All tensors in the order of a Hugging Face checkpoint: embedding, layers, norm, output."""
    entries = [
        Entry(source, spec.shape[-2:] if spec.role is Role.ROUTED_EXPERT else spec.shape, spec.role)
        for spec in tensor_specs(hp)
        for source in spec.sources
    ]
    last = [entry for entry in entries if entry.name in ("model.norm.weight", "lm_head.weight")]
    return [entry for entry in entries if entry not in last] + last


def to_bf16(values: NDArray[np.float32]) -> Pool:
    """The upper halves, rounded to nearest."""
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def make_pool(seed: int) -> Pool:
    """Normal numbers as bf16, enough for the largest repeat to be far away."""
    values = np.random.default_rng(seed).standard_normal(POOL_WEIGHTS, np.float32)
    return to_bf16(values * np.float32(DEVIATION))


def pieces(entry: Entry, pool: Pool, start: int) -> Iterator[memoryview]:
    """The tensor's bytes: the pool from weight `start` on, round and round. Norms are near one instead."""
    if entry.role is Role.NORM:
        near_one = 1 + (pool[: entry.shape[0]].astype(np.uint32) << 16).view(np.float32)
        yield to_bf16(near_one.astype(np.float32)).data.cast("B")
        return
    left = entry.n_bytes // 2
    while left:
        count = min(left, POOL_WEIGHTS - start, WRITE_BYTES // 2)
        yield pool[start : start + count].data.cast("B")
        left -= count
        start = (start + count) % POOL_WEIGHTS


def write_shard(path: Path, entries: list[Entry], pool: Pool, seed: int) -> None:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": "BF16",
            "shape": entry.shape,
            "data_offsets": [end, end + entry.n_bytes],
        }
        end += entry.n_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    random = np.random.default_rng(seed)
    with path.open("wb", buffering=0) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for entry in entries:
            for piece in pieces(entry, pool, int(random.integers(POOL_WEIGHTS))):
                while piece:
                    piece = piece[file.write(piece) or 0 :]
        os.fsync(file.fileno())


def write_weights(folder: Path, hp: Hyperparameters, n_shards: int, seed: int) -> int:
    """All shards and their index; the bytes of the weights."""
    entries = entries_of(hp)
    total = sum(entry.n_bytes for entry in entries)
    pool = make_pool(seed)
    weight_map: dict[str, str] = {}
    done = 0
    shards: list[list[Entry]] = [[] for _ in range(n_shards)]
    for entry in entries:
        shards[min(n_shards - 1, done * n_shards // total)].append(entry)
        done += entry.n_bytes
    for number, part in enumerate(shards, 1):
        name = f"model-{number:05}-of-{n_shards:05}.safetensors"
        write_shard(folder / name, part, pool, seed + number)
        weight_map |= {entry.name: name for entry in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def tokenizer_json() -> dict[str, Any]:
    """A byte-level BPE of 100,000 tokens: all bytes, then pairs, then triples. None joins two digits."""
    letters = [character for byte, character in byte_characters().items() if not chr(byte).isdigit()]
    vocab = {character: at for at, character in enumerate(byte_characters().values())}
    merges: list[list[str]] = []
    pairs = [left + right for left, right in itertools.product(letters, letters)]
    candidates = itertools.chain(
        itertools.product(letters, letters), ((pair, letter) for pair in pairs for letter in letters)
    )
    for left, right in candidates:
        if len(vocab) == N_BPE_TOKENS:
            break
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    added = [
        {"id": N_BPE_TOKENS + at, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for at, token in enumerate((BOS, EOS))
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitting_steps()},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def splitting_steps() -> list[dict[str, Any]]:
    """The original's rules as a tokenizer.json states them."""
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
    """A given tokenizer's files, or the synthetic one."""
    if source is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / name, folder / name)
        return
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_checkpoint(
    folder: Path, *, layers: int = 28, shards: int = 7, seed: int = 0, tokenizer: Path | None = None
) -> int:
    """Write everything to `folder`; returns the bytes of the weights."""
    hp = replace(PRESETS[PRESET].hp, n_layers=layers)
    folder.mkdir(parents=True, exist_ok=True)
    values = config_values(hp, bos_token_id=100000, eos_token_id=100001, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    write_tokenizer(folder, tokenizer)
    return write_weights(folder, hp, shards, seed)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--shards", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json and tokenizer_config.json")
    arguments = parser.parse_args()
    started = time.monotonic()
    total = make_checkpoint(
        arguments.folder,
        layers=arguments.layers,
        shards=arguments.shards,
        seed=arguments.seed,
        tokenizer=arguments.tokenizer,
    )
    seconds = time.monotonic() - started
    print(f"{arguments.folder}: {format_size(total)} in {seconds:.1f} s, {format_size(total / seconds)}/s")


if __name__ == "__main__":
    main()
