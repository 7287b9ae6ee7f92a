"""Which layers a rule means in a model of so many: "the first eighth", "every third". Numbers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

LayerRule: TypeAlias = Callable[[int, int], bool]
"""Whether the layer at an index, of a number of layers, is meant."""


def first(parts: int) -> LayerRule:
    """The first of so many equal parts, rounded down: of fewer layers than parts, none."""
    return lambda index, count: index < count // parts


def last(parts: int) -> LayerRule:
    """The last of so many equal parts, rounded up: always one layer at least."""
    return lambda index, count: index >= (parts - 1) * count // parts


def every(step: int) -> LayerRule:
    """Every second, third, ... layer, counted from the first, which is not one."""
    return lambda index, count: index % step == step - 1


def more_bits(index: int, count: int) -> bool:
    """llama.cpp's rule: the first and last eighth of the layers, and every third between."""
    return first(8)(index, count) or last(8)(index, count) or (index - count // 8) % 3 == 2


LAYER_RULES: Mapping[str, LayerRule] = MappingProxyType(
    {
        "first-eighth": first(8),
        "last-eighth": last(8),
        "every-third": every(3),
        "more-bits": more_bits,
    }
)
"""By the word that a named recipe has for it."""
