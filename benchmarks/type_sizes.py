"""What the 16B model weighs in each type: the README's table. Counts bytes; reads and writes no weights.

python benchmarks/type_sizes.py [PRESET]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from dsmoe_local.model.cost import read_fraction
from dsmoe_local.model.ggml import GgmlType, tensor_bytes
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, tensor_specs
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.choose import choose_types
from dsmoe_quantize.mixes import MIXES
from dsmoe_quantize.recipes import RECIPES
from dsmoe_quantize.types import resolve


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the unquantized file."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType


@dataclass(frozen=True, slots=True)
class Row:
    """One type: stored bytes, bits per weight, and weight bytes that decoding one token reads."""

    type: str
    gigabytes: float
    bits_per_weight: float
    gigabytes_per_token: float


def measure(hp: Hyperparameters, word: str) -> Row:
    """The cost of a model in the type called `word`."""
    specs = tensor_specs(hp)
    floats = (Role.NORM, Role.ROUTER)
    tensors = [
        Tensor(spec.name, spec.shape, GgmlType.F32 if spec.role in floats else GgmlType.BF16)
        for spec in specs
    ]
    choices = choose_types(tensors, hp, resolve(word))
    sizes = [tensor_bytes(choice.type, spec.shape) for choice, spec in zip(choices, specs, strict=True)]
    read = sum(size * read_fraction(hp, spec.role) for size, spec in zip(sizes, specs, strict=True))
    n_weights = sum(spec.n_weights for spec in specs)
    return Row(word, sum(sizes) / 1e9, 8 * sum(sizes) / n_weights, read / 1e9)


def main() -> None:
    """Print the table, then the same as one JSON line."""
    preset = sys.argv[1] if len(sys.argv) > 1 else "deepseekmoe-16b"
    hp = PRESETS[preset].hp
    rows = [measure(hp, word) for word in ("bf16", *RECIPES, *MIXES)]
    rows.sort(key=lambda row: -row.gigabytes)
    print("| `--type` | size, GB | bits per weight | GB read per token |")
    print("|---|---|---|---|")
    for row in rows:
        name = f"**`{row.type}`**" if row.type in RECIPES else f"`{row.type}`"
        print(f"| {name} | {row.gigabytes:.2f} | {row.bits_per_weight:.2f} | {row.gigabytes_per_token:.2f} |")
    print(
        json.dumps(
            {
                "model": preset,
                "rows": [
                    [row.type, row.gigabytes, row.bits_per_weight, row.gigabytes_per_token] for row in rows
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
