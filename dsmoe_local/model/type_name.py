"""What a file's type is called: by the recipe that made it, else as llama.cpp calls it. Shown wherever files
are; nothing is decided by it.
"""

from __future__ import annotations

import re
from collections import Counter

from gguf.constants import LlamaFileType

from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import type_name
from dsmoe_local.model.gguf_file import GgufFile

RECIPE_KEY = "dsmoe.recipe"
"""Where a file's metadata holds the recipe that it was made by, as a recipe file."""

RECIPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
"""What a recipe may be called."""

_HEAD = 4096
"""Characters of a recipe in which its name is looked for: little else of it is read."""

_NAME = re.compile(rf'^name = "({RECIPE_NAME.pattern})"$', re.MULTILINE)
_CLOSEST = re.compile(r'^closest = "(\w+)"$', re.MULTILINE)


def file_type_name(file: GgufFile) -> str:
    """The recipe's name; without one, llama.cpp's name of the file's type; without that, the types that hold
    most of its weights.
    """
    number = file.get("general.file_type")
    known = isinstance(number, int) and number in LlamaFileType._value2member_map_
    name = LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_") if known else None
    recipe, closest = _recipe_names(file)
    # llama.cpp's quantizer keeps the recipe of its source and sets the type's number alone.
    if recipe is not None and closest is not None and closest == name:
        return recipe
    if name is not None:
        return name
    weights: Counter[str] = Counter()
    for tensor in file.tensors.values():
        weights[type_name(tensor.type)] += tensor.n_weights
    return " + ".join(name for name, _ in weights.most_common(2))


def imatrix_name(file: GgufFile) -> str:
    """What the importance matrix is called that the weights were encoded with; empty if there was none."""
    name = file.get("quantize.imatrix.file")
    return safe_line(name, 80) if isinstance(name, str) else ""


def _recipe_names(file: GgufFile) -> tuple[str | None, str | None]:
    """What the recipe in the metadata is called, and the type of llama.cpp's that a file made by it has."""
    text = file.get(RECIPE_KEY)
    head = text[:_HEAD].partition("[")[0] if isinstance(text, str) else ""
    name, closest = _NAME.search(head), _CLOSEST.search(head)
    return name[1] if name else None, closest[1] if closest else None
