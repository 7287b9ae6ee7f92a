"""Dense models with grouped queries, which mixtures are compared with. llama.cpp: src/models/llama.cpp."""

from __future__ import annotations

import re
from dataclasses import replace

from dsmoe_local.model.architectures import common
from dsmoe_local.model.architectures.table import Architecture, Parameter

ARCHITECTURE = Architecture(
    name="llama",
    classes=(),
    model=common.MODEL,
    every_layer=(*common.PERMUTED_QUERIES, common.FFN_NORM),
    dense_layer=common.DENSE_FFN,
    moe_layer=(),
    parameters=(
        *common.WIDTHS,
        replace(common.FFN_SIZE, gguf_default=0),
        *common.HEADS,
        common.EPSILON,
        *common.ROPE,
        Parameter("n_dense_layers", default=lambda values: values["n_layers"]),
    ),
    constants={},
    config_values={},
    gguf_values={**common.GGUF_VALUES, "expert_count": (0,)},
    checks=(
        *common.CHECKS[:2],
        common.heads_are_rotated_as_a_whole,
        common.values_are_as_wide_as_keys,
    ),
    ignored=re.compile(
        rf"{common.ROPE_FREQUENCIES.pattern}|blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.bias"
    ),
    rotates_adjacent_values=True,
)
