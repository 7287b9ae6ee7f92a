"""Typed, range-checked access to the metadata keys of a GGUF file's architecture."""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
from gguf.constants import GGUFValueType

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.gguf_file import GgufFile


class Keys:
    """The keys of a file that begin with `prefix`, the name of its architecture.

    Methods take a key without the prefix, and return `default` if the file lacks it. They raise FormatError
    if a value has another type or is out of range, and if a key without default is missing.
    """

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self.file = file
        self.prefix = prefix

    def refuse(self, key: str, value: object, accepted: str) -> NoReturn:
        """Raise the error for a value that is not `accepted`. `key` has its prefix."""
        raise FormatError(
            f"{key} = {safe_line(str(value), 60)} is not valid",
            where=self.file.path,
            remedy=f"accepted: {accepted}; convert the model again",
        )

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """Return an unsigned 32-bit number from `low` to `high`."""
        key = f"{self.prefix}.{key}"
        field = self.file.metadata.get(key)
        if field is None:
            if default is None:
                self.refuse(key, "(missing)", f"a number from {low} to {high}")
            return default
        if field.type is not GGUFValueType.UINT32 or not low <= field.value <= high:
            self.refuse(key, field.value, f"an unsigned 32-bit number from {low} to {high}")
        return int(field.value)

    def integers(self, key: str, n_layers: int, high: int, default: list[int]) -> list[int]:
        """Return a number from 0 to `high` for each layer. Files have one for all, or a list."""
        field = self.file.metadata.get(f"{self.prefix}.{key}")
        if field is None:
            return default
        if field.type is not GGUFValueType.ARRAY:
            return [self.integer(key, 0, high)] * n_layers
        values = field.value
        whole = field.item_type in (GGUFValueType.UINT32, GGUFValueType.INT32)
        if not whole or len(values) != n_layers or not all(0 <= value <= high for value in values):
            self.refuse(f"{self.prefix}.{key}", "(list)", f"{n_layers} numbers from 0 to {high}")
        return [int(value) for value in values]

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Return a finite 32-bit float from `low` to `high`."""
        key = f"{self.prefix}.{key}"
        field = self.file.metadata.get(key)
        if field is None:
            if default is None:
                self.refuse(key, "(missing)", f"a number from {low:g} to {high:g}")
            return default
        if field.type is not GGUFValueType.FLOAT32 or not math.isfinite(field.value):
            self.refuse(key, field.value, "a finite 32-bit float")
        # For example 1e-06 instead of 9.999999974752427e-07.
        value = shortest_float(field.value)
        if not low <= value <= high:
            self.refuse(key, value, f"a number from {low:g} to {high:g}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return a boolean."""
        key = f"{self.prefix}.{key}"
        field = self.file.metadata.get(key)
        if field is None and default is not None:
            return default
        if field is None or field.type is not GGUFValueType.BOOL:
            self.refuse(key, "(missing)" if field is None else field.value, "true or false")
        return bool(field.value)

    def vocabulary_size(self) -> int:
        """Return the number of tokens. `check_vocabulary` checks that they are strings."""
        tokens = self.file.get("tokenizer.ggml.tokens", [])
        if not isinstance(tokens, list):
            self.refuse("tokenizer.ggml.tokens", tokens, "a list")
        return len(tokens)


def shortest_float(value: float) -> float:
    """Return the number with the fewest decimal digits that rounds to the same 32-bit float."""
    return float(str(np.float32(value)))
