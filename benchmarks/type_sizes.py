"""What models weigh in each type (docs/quantization.md). Counts bytes; reads and writes no weights.

    python benchmarks/type_sizes.py [--preset NAME]
    python benchmarks/type_sizes.py --family            every model with published weights

Prints tables, then one JSON line.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict

from benchmarks.support import arguments
from benchmarks.support.sizes import choices_of, size_of
from benchmarks.support.tables import markdown
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.mixes import MIXES
from dsmoe_quantize.policy.named_recipes import RECIPES

_DEFAULT = "deepseekmoe-16b"
_FAMILY_TYPES = ("bf16", "q8", "Q6_K", "Q5_K_M", "Q4_K_M", "q4", "q4-fast", "q4-small", "IQ4_XS")
_COMPARED = ("Q4_K_M", "q4")


def one_model(preset: str) -> Mapping[str, object]:
    """Print all types of one model."""
    rows = [size_of(PRESETS[preset].hp, word) for word in ("bf16", *RECIPES, *MIXES)]
    rows.sort(key=lambda row: -row.n_bytes)
    lines = [
        (
            _styled(row.type),
            f"{row.n_bytes / 1e9:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.n_bytes_per_token / 1e9:.2f}",
        )
        for row in rows
    ]
    print(markdown(("`--type`", "size, GB", "bits per weight", "GB read per token"), "lrrr", lines))
    return {"model": preset, "rows": [asdict(row) for row in rows]}


def family() -> Mapping[str, object]:
    """Print the most important types of every model with published weights, and their fallbacks."""
    models = [preset.hp for name, preset in PRESETS.items() if name == _DEFAULT or preset.ffn_factor is None]
    lines, misfits, record = [], [], {}
    for hp in models:
        sizes = [size_of(hp, word) for word in _FAMILY_TYPES]
        lines.append((hp.name, *(f"{_gb(each.n_bytes)} / {_gb(each.n_bytes_per_token)}" for each in sizes)))
        found = [fallbacks(hp, word) for word in _COMPARED]
        misfits += [
            (hp.name, f"`{tensor}`", str(columns), *(each.get((tensor, columns), "fits") for each in found))
            for tensor, columns in {**found[0], **found[1]}
        ]
        record[hp.name] = [asdict(each) for each in sizes]
    heads = ("GB in all / per token", *map(_styled, _FAMILY_TYPES))
    print(markdown(heads, "l" + "r" * len(_FAMILY_TYPES), lines) + "\n")
    heads = ("model", "tensors", "columns", *map(_styled, _COMPARED))
    print(markdown(heads, "llrll", misfits))
    return {"models": record, "fallbacks": misfits}


def fallbacks(hp: Hyperparameters, word: str) -> dict[tuple[str, int], str]:
    """Return the types of the tensors that the wanted type does not fit, by tensor and columns."""
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


def main() -> None:
    """Print the tables."""
    given = arguments.parse(__doc__, preset=_DEFAULT, family=False)
    print(json.dumps(family() if given.family else one_model(given.preset)))


if __name__ == "__main__":
    main()
