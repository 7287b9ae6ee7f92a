"""Tiny random DeepSeekMoE checkpoints in every form, with a small tokenizer trained on the spot."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsmoe_convert.pretokenizers import DEFINITIONS
from dsmoe_local.model.config_json import config_values
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, tensor_specs

Form = Literal["single", "sharded", "bin", "sharded bin"]

TINY = Hyperparameters(
    architecture="deepseek",
    n_layers=3,
    hidden_size=64,
    n_heads=4,
    n_kv_heads=4,
    head_dim=16,
    value_dim=16,
    rotary_dim=16,
    ffn_size=96,
    n_vocab=640,
    n_context=256,
    n_dense_layers=1,
    n_routed_experts=8,
    n_shared_experts=2,
    n_experts_per_token=3,
    expert_size=32,
    shared_expert_size=32,
)
"""Small enough for logits in milliseconds."""

WIDE = replace(
    TINY,
    hidden_size=256,
    head_dim=64,
    value_dim=64,
    rotary_dim=64,
    ffn_size=288,
    expert_size=96,
    shared_expert_size=96,
    n_routed_experts=4,
)
"""As in the 16B model, K-quants hold all rows but those of the down projections."""

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
CORPUS = (
    "The quick brown fox jumps over the lazy dog. Nothing in the world is as soft as water.",
    "def encode(rows: list[int]) -> bytes:\n    return bytes(row % 256 for row in rows)  # 1234\n",
    "人工智能模型可以回答问题。今天天气很好，我们去公园。",
    "нещо на Български, café naïve Äpfel, 3.14159 and 2026",
    "whitespace   runs\t\tand\n\n\nnew lines \r\n emoji \U0001f680\U0001f600 \u2705",
)


def random_weights(
    hp: Hyperparameters, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """All tensors of a model by their Hugging Face names, scaled so that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for spec in tensor_specs(hp):
        for source in spec.sources:
            shape = spec.source_shape
            if source in weights:
                continue
            values = torch.randn(shape, generator=generator)
            if len(shape) == 1 and spec.role is not Role.NORM:
                values *= 0.1
            elif spec.role is Role.NORM:
                values = 1 + 0.1 * values
            elif spec.role is not Role.EMBEDDING:
                values *= (4.0 if spec.role is Role.ROUTER else 1.0) / shape[-1] ** 0.5
            weights[source] = values.to(dtype)
    return weights


def write_checkpoint(
    folder: Path,
    hp: Hyperparameters = TINY,
    *,
    form: Form = "sharded",
    n_shards: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    weights: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write a whole checkpoint to `folder` and return it; `config` adds keys to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    values = config_values(hp, bos_token_id=0, eos_token_id=1, **config)
    (folder / "config.json").write_text(json.dumps(values))
    write_tokenizer(folder)
    write_weights(folder, dict(weights or random_weights(hp, seed, dtype)), form, n_shards)
    return folder


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], form: Form, n_shards: int = 3) -> None:
    """Write `weights` in one of the forms that checkpoints have."""
    suffix, stem = (".bin", "pytorch_model") if form.endswith("bin") else (".safetensors", "model")
    if not form.startswith("sharded"):
        _save(folder / f"{stem}{suffix}", weights)
        return
    names = list(weights)
    weight_map: dict[str, str] = {}
    for number in range(n_shards):
        part = names[len(names) * number // n_shards : len(names) * (number + 1) // n_shards]
        shard = f"{stem}-{number + 1:05}-of-{n_shards:05}{suffix}"
        _save(folder / shard, {name: weights[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def _save(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, {"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE with a little over 500 tokens."""
    for file in _trained_tokenizer().iterdir():
        shutil.copyfile(file, folder / file.name)


@cache
def _trained_tokenizer() -> Path:
    """A folder with the files of a tokenizer with the rules of deepseek-llm; made once."""
    folder = Path(tempfile.mkdtemp(prefix="dsmoe-tokenizer-"))
    atexit.register(shutil.rmtree, folder, True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer("deepseek-llm")
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (BOS, EOS)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    tokenizer.add_tokens([AddedToken("\xf8", normalized=True, special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": BOS},
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": None,
        "chat_template": TEMPLATE,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """The `tokenizers` object with the splitting rules that llama.cpp calls `name`."""
    from tokenizers import Regex

    steps: list[pre_tokenizers.PreTokenizer] = []
    definition = next(known for known in DEFINITIONS if known.name == name)
    for kind, *parameters in definition.steps:
        if kind == "Split":
            steps.append(pre_tokenizers.Split(Regex(str(parameters[0])), "isolated"))
        elif kind == "Digits":
            steps.append(pre_tokenizers.Digits(individual_digits=bool(parameters[0])))
        else:
            prefix, use_regex = map(bool, parameters)
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex))
    return pre_tokenizers.Sequence(steps)
