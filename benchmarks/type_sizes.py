"""What the 16B model weighs in each type (docs/quantization.md). Counts bytes; reads and writes no weights.

python benchmarks/type_sizes.py [PRESET]
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from benchmarks.support.sizes import size_of
from benchmarks.support.tables import markdown
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.mixes import MIXES
from dsmoe_quantize.policy.named_recipes import RECIPES


def main() -> None:
    """Print the table, then the same as one JSON line."""
    preset = sys.argv[1] if len(sys.argv) > 1 else "deepseekmoe-16b"
    hp = PRESETS[preset].hp
    rows = [size_of(hp, word) for word in ("bf16", *RECIPES, *MIXES)]
    rows.sort(key=lambda row: -row.n_bytes)
    lines = [
        [
            f"**`{row.type}`**" if row.type in RECIPES else f"`{row.type}`",
            f"{row.n_bytes / 1e9:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.n_bytes_per_token / 1e9:.2f}",
        ]
        for row in rows
    ]
    print(markdown(("`--type`", "size, GB", "bits per weight", "GB read per token"), "lrrr", lines))
    print(json.dumps({"model": preset, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
