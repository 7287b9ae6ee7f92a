"""The type of a whole file: its name, and llama.cpp's number for it (`general.file_type`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from gguf.constants import LlamaFileType

from dsmoe_local.base.text import safe_line
from dsmoe_local.model.gguf_file import GgufFile

FILE_TYPES: Mapping[str, int] = {
    kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): kind.value for kind in LlamaFileType
}
"""llama.cpp's numbers for mixes and float types (`general.file_type`), by their names."""

RECIPE_KEY = "dsmoe.recipe"
"""The metadata key of the recipe that a file was made with, in the format of recipe files."""

CALIBRATION_KEY = "dsmoe.calibration"
"""The metadata key of how weights were calibrated: method, text, number of tokens, seed."""

RECIPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
"""The pattern that a recipe's name must match."""

_HEAD = 4096
"""Characters of a recipe in which its name is searched for."""

_NAMES = {number: name for name, number in FILE_TYPES.items()}
_NAME = re.compile(rf'^name = "({RECIPE_NAME.pattern})"$', re.MULTILINE)
_CLOSEST = re.compile(r'^closest = "(\w+)"$', re.MULTILINE)


def file_type_name(file: GgufFile) -> str:
    """Return the name of the file's recipe; otherwise llama.cpp's name of its type.

    If the file states neither, return the types that hold most of its weights.
    """
    number = file.get("general.file_type")
    name = _NAMES.get(number) if isinstance(number, int) else None
    recipe, closest = _recipe_names(file)
    # llama.cpp's quantizer copies the recipe of its source and changes only general.file_type. Then the
    # recipe does not describe the file.
    if recipe is not None and closest is not None and closest == name:
        return recipe
    if name is not None:
        return name
    weights: Counter[str] = Counter()
    for tensor in file.tensors.values():
        weights[tensor.type.name] += tensor.n_weights
    return " + ".join(name for name, _ in weights.most_common(2))


def imatrix_name(file: GgufFile) -> str:
    """Return the name of the importance matrix that the file was quantized with; empty if there was none."""
    name = file.get("quantize.imatrix.file")
    return safe_line(name, 80) if isinstance(name, str) else ""


def calibration_of(file: GgufFile) -> str:
    """Return how the file's weights were calibrated; empty if they were not."""
    record = file.get(CALIBRATION_KEY)
    return safe_line(record, 300) if isinstance(record, str) else ""


def _recipe_names(file: GgufFile) -> tuple[str | None, str | None]:
    """Return the recipe's name, and the name of the mix whose number its files have."""
    text = file.get(RECIPE_KEY)
    head = text[:_HEAD].partition("[")[0] if isinstance(text, str) else ""
    name, closest = _NAME.search(head), _CLOSEST.search(head)
    return name[1] if name else None, closest[1] if closest else None
