"""The architectures that the converter and the quantizer know, one module for each.

To add one, copy the module of the most similar one, and add it to the list below.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsmoe_local.model.architectures.bailingmoe2 import BAILINGMOE2
from dsmoe_local.model.architectures.deepseek import DEEPSEEK
from dsmoe_local.model.architectures.deepseek2 import DEEPSEEK2
from dsmoe_local.model.architectures.glm4moe import GLM4MOE
from dsmoe_local.model.architectures.llama import LLAMA
from dsmoe_local.model.architectures.olmoe import OLMOE
from dsmoe_local.model.architectures.qwen2moe import QWEN2MOE
from dsmoe_local.model.architectures.qwen3moe import QWEN3MOE
from dsmoe_local.model.architectures.table import Architecture

ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (DEEPSEEK, DEEPSEEK2, QWEN2MOE, QWEN3MOE, GLM4MOE, BAILINGMOE2, OLMOE, LLAMA)
}
"""The architectures by their names in GGUF files."""
