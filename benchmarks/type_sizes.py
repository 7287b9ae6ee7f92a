"""What models weigh in each type (docs/quantization.md). Counts bytes; reads and writes no weights.

python benchmarks/type_sizes.py [PRESET]
python benchmarks/type_sizes.py --family
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict

from benchmarks.support.sizes import choices_of, size_of
from benchmarks.support.tables import markdown
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.mixes import MIXES
from dsmoe_quantize.policy.named_recipes import RECIPES

_DEFAULT = "deepseekmoe-16b"
_FAMILY_TYPES = ("bf16", "q8", "Q6_K", "Q5_K_M", "Q4_K_M", "q4", "q4-fast", "q4-small", "IQ4_XS")


def main() -> None:
    """Print the tables, then the same as one JSON line."""
    arguments = sys.argv[1:] or [_DEFAULT]
    record = _family() if arguments == ["--family"] else _one(arguments[0])
    print(json.dumps(record))


def _one(preset: str) -> Mapping[str, object]:
    """Print all types of one model."""
    hp = PRESETS[preset].hp
    rows = [size_of(hp, word) for word in ("bf16", *RECIPES, *MIXES)]
    rows.sort(key=lambda row: -row.n_bytes)
    lines = [
        [
            _styled(row.type),
            f"{row.n_bytes / 1e9:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.n_bytes_per_token / 1e9:.2f}",
        ]
        for row in rows
    ]
    print(markdown(("`--type`", "size, GB", "bits per weight", "GB read per token"), "lrrr", lines))
    return {"model": preset, "rows": [asdict(row) for row in rows]}


def _family() -> Mapping[str, object]:
    """Print the most important types of every model with published weights, and their fallbacks."""
    models = {
        name: preset.hp for name, preset in PRESETS.items() if name == _DEFAULT or preset.ffn_factor is None
    }
    rows = {name: [size_of(hp, word) for word in _FAMILY_TYPES] for name, hp in models.items()}
    lines = [
        [models[name].name, *(f"{_gb(each.n_bytes)} / {_gb(each.n_bytes_per_token)}" for each in sizes)]
        for name, sizes in rows.items()
    ]
    heads = ("GB in all / per token", *map(_styled, _FAMILY_TYPES))
    print(markdown(heads, "l" + "r" * len(_FAMILY_TYPES), lines))
    print()
    fallbacks = {name: [_fallbacks(hp, word) for word in ("Q4_K_M", "q4")] for name, hp in models.items()}
    lines = [
        [
            models[name].name,
            f"`{tensor}`",
            str(columns),
            *(each.get((tensor, columns), "fits") for each in found),
        ]
        for name, found in fallbacks.items()
        for tensor, columns in {**found[0], **found[1]}
    ]
    print(markdown(("model", "tensors", "columns", "`Q4_K_M`", "**`q4`**"), "llrll", lines))
    return {
        "models": {name: [asdict(row) for row in sizes] for name, sizes in rows.items()},
        "fallbacks": {name: [[*each.items()] for each in found] for name, found in fallbacks.items()},
    }


def _fallbacks(hp: Hyperparameters, word: str) -> dict[tuple[str, int], str]:
    """Return the types of the tensors that the wanted type did not fit, by tensor and columns."""
    found: dict[tuple[str, int], Counter[str]] = {}
    for choice in choices_of(hp, word):
        if choice.misfit:
            name = re.sub(r"^blk\.\d+\.|\.weight$", "", choice.name)
            found.setdefault((name, choice.shape[-1]), Counter())[choice.type.name] += 1
    return {
        key: ", ".join(
            f"{kind} in {count}" if len(counts) > 1 else kind for kind, count in sorted(counts.items())
        )
        for key, counts in found.items()
    }


def _styled(word: str) -> str:
    return f"**`{word}`**" if word in RECIPES else f"`{word}`"


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f}" if n_bytes < 1e11 else f"{n_bytes / 1e9:.0f}"


if __name__ == "__main__":
    main()
