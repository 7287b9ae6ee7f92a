"""What the 16B model weighs in each type (docs/quantization.md). Counts bytes; reads and writes no weights.

python benchmarks/type_sizes.py [PRESET]
"""

from __future__ import annotations

import json
import sys

from benchmarks.support.sizes import size_of
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.mixes import MIXES
from dsmoe_quantize.policy.named_recipes import RECIPES


def main() -> None:
    """Print the table, then the same as one JSON line."""
    preset = sys.argv[1] if len(sys.argv) > 1 else "deepseekmoe-16b"
    hp = PRESETS[preset].hp
    rows = [size_of(hp, word) for word in ("bf16", *RECIPES, *MIXES)]
    rows.sort(key=lambda row: -row.n_bytes)
    print("| `--type` | size, GB | bits per weight | GB read per token |")
    print("|---|---|---|---|")
    for row in rows:
        name = f"**`{row.type}`**" if row.type in RECIPES else f"`{row.type}`"
        size, read = row.n_bytes / 1e9, row.n_bytes_per_token / 1e9
        print(f"| {name} | {size:.2f} | {row.bits_per_weight:.2f} | {read:.2f} |")
    print(
        json.dumps(
            {
                "model": preset,
                "rows": [
                    [row.type, row.n_bytes / 1e9, row.bits_per_weight, row.n_bytes_per_token / 1e9]
                    for row in rows
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
