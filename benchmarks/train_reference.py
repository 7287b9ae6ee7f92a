"""Train a small real DeepSeekMoE from scratch, to measure quantization with.

    python -m benchmarks.train_reference                  1,200 steps (half an hour), into the cache
    python -m benchmarks.train_reference --steps 2400     longer
    python -m benchmarks.train_reference --architecture deepseek2    with the attention of DeepSeek-V2

It has a width of 256, 6 layers, 16 routed experts of width 128, of which each token chooses 4, and 2 shared
ones. As in the 16B, 256 does not divide the width of the routed down projections. It learns Python's help
topics and standard library. `held-out.txt` beside the checkpoint has topics and docstrings that it never saw.
The seed fixes the order of the data, not the bits of the result. Prints one JSON line.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.trainers import BpeTrainer
from torch.nn import functional

from benchmarks.make_checkpoint import BOS, EOS, TOKENIZER_CONFIG, bpe_json
from benchmarks.support import arguments
from benchmarks.support.reference_model import ReferenceModel
from benchmarks.support.reference_shape import (
    CALIBRATION,
    HELD_OUT,
    HP,
    SHAPES,
    STEPS,
    TRAINING,
    reference_folder,
)
from benchmarks.support.reference_text import Corpus, read_corpus
from benchmarks.support.runner import say
from dsmoe_convert.byte_level import byte_characters
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.model.config_json import config_values
from dsmoe_local.model.hyperparameters import Hyperparameters

_BATCH = 4  # windows of n_context tokens
_RATE, _LEAST_RATE = 3e-3, 1e-4
_WARM_UP = 0.02  # of the steps
_BALANCE = 0.003
_CALIBRATION_CHARACTERS = 200_000

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Trained:
    """The training, with the losses of the last steps and of the held-out text in nats per token."""

    seed: int
    n_steps: int
    n_tokens: int
    n_epochs: float
    loss: float
    held_out_loss: float
    products: str
    python: str = sys.version.split()[0]
    torch: str = torch.__version__


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Train a byte-level BPE with the original's splitting rules. BOS and EOS are the last tokens."""
    tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(bpe_json({}, [])))
    trainer = BpeTrainer(
        vocab_size=HP.n_vocab - 2, show_progress=False, initial_alphabet=list(byte_characters().values())
    )
    tokenizer.train_from_iterator(corpus.training, trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    assert tokenizer.get_vocab_size() == HP.n_vocab
    return tokenizer


def encode(tokenizer: Tokenizer, documents: tuple[str, ...]) -> Ids:
    """Return the token ids of all documents, each after BOS."""
    begin = tokenizer.token_to_id(BOS)
    parts = [[begin, *encoding.ids] for encoding in tokenizer.encode_batch(list(documents))]
    return np.concatenate([np.array(part, np.int64) for part in parts])


def batches(ids: Ids, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches, shape (_BATCH, n_context + 1). Each epoch has other windows in another order."""
    random = np.random.default_rng(seed)
    length = HP.n_context
    while True:
        starts = np.arange(random.integers(length), len(ids) - length - 1, length)
        random.shuffle(starts)
        for at in range(0, len(starts) - _BATCH + 1, _BATCH):
            yield torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts[at : at + _BATCH]]))


def rate_at(share: float) -> float:
    """Return the learning rate after a share of the steps: a linear warm-up, then a cosine decay."""
    if share < _WARM_UP:
        return _RATE * max(share, 1e-4) / _WARM_UP
    left = 0.5 + 0.5 * math.cos(math.pi * min(1.0, (share - _WARM_UP) / (1 - _WARM_UP)))
    return _LEAST_RATE + (_RATE - _LEAST_RATE) * left


@cache
def computes_bf16() -> bool:
    """Return True if the processor multiplies bf16 itself. Others are much faster with f32."""
    return any(present for name, present in torch.cpu.get_capabilities().items() if "bf16" in name)


def loss_of(model: ReferenceModel, batch: torch.Tensor) -> torch.Tensor:
    """Return the loss in nats per token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=computes_bf16()):
        logits = model(batch[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: ReferenceModel, ids: Ids) -> float:
    """Return the loss over whole windows in nats per token."""
    step = _BATCH * (HP.n_context + 1)
    parts = (ids[at : at + step].reshape(_BATCH, -1) for at in range(0, len(ids) - step + 1, step))
    losses = [loss_of(model, torch.from_numpy(part)).item() for part in parts]
    return float(np.mean(losses))


def train(model: ReferenceModel, ids: Ids, n_steps: int, seed: int) -> float:
    """Train the model. Return the mean loss of the last steps."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    for batch in islice(batches(ids, seed), n_steps):
        share = len(losses) / n_steps
        for group in optimizer.param_groups:
            group["lr"] = rate_at(share)
        loss = loss_of(model, batch)
        torch.autograd.backward(loss + _BALANCE * model.balance())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            say(f"  {share:.0%}, step {len(losses)}: loss {np.mean(losses[-50:]):.3f}")
    return float(np.mean(losses[-50:]))


def write(
    folder: Path,
    hp: Hyperparameters,
    model: ReferenceModel,
    tokenizer: Tokenizer,
    corpus: Corpus,
    trained: Trained,
) -> None:
    """Write a Hugging Face checkpoint and the texts. The folder gets its name when it is complete."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    begin, end = (tokenizer.token_to_id(token) for token in (BOS, EOS))
    values = config_values(hp, bos_token_id=begin, eos_token_id=end, torch_dtype="bfloat16")
    tokenizer.save(str(temporary / "tokenizer.json"))
    files = {
        "config.json": json.dumps(values, indent=2),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG),
        HELD_OUT: corpus.held_out,
        CALIBRATION: corpus.calibration(_CALIBRATION_CHARACTERS),
        TRAINING: json.dumps(asdict(trained)),
    }
    for name, text in files.items():
        (temporary / name).write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def make_reference(folder: Path, n_steps: int, seed: int, hp: Hyperparameters = HP) -> Trained:
    """Train a model and write it to `folder`."""
    torch.manual_seed(seed)
    torch.set_num_threads(physical_cores())
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus)
    ids = encode(tokenizer, corpus.training)
    model = ReferenceModel(hp)
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    say(f"{n_weights / 1e6:.1f}M weights, {len(ids) / 1e6:.2f}M tokens of text")
    loss = train(model, ids, n_steps, seed)
    n_tokens = n_steps * _BATCH * HP.n_context
    measured = held_out_loss(model, encode(tokenizer, (corpus.held_out,)))
    products = "bf16" if computes_bf16() else "f32"
    trained = Trained(seed, n_steps, n_tokens, n_tokens / len(ids), loss, measured, products)
    write(folder, hp, model, tokenizer, corpus, trained)
    return trained


def main() -> None:
    """Train a model if it is not there. Print where it is, and how the training went."""
    given = arguments.parse(__doc__, steps=STEPS, seed=0, architecture=HP.architecture)
    folder = reference_folder(given.steps, given.seed, given.architecture)
    if (folder / TRAINING).is_file():
        say(f"{folder} is there already")
    else:
        make_reference(folder, given.steps, given.seed, SHAPES[given.architecture])
    print(json.dumps({"folder": str(folder), **json.loads((folder / TRAINING).read_text())}))


if __name__ == "__main__":
    main()
