"""The architectures that the converter and the quantizer know: one module for each, with its ARCHITECTURE.

To add one, copy the module of the most similar architecture. Nothing else needs to change.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module

from dsmoe_local.model.architectures.table import Architecture

_SHARED = ("common", "table")


def _modules() -> list[Architecture]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED]
    return [import_module(f"{__name__}.{name}").ARCHITECTURE for name in names]


ARCHITECTURES: Mapping[str, Architecture] = {architecture.name: architecture for architecture in _modules()}
"""The architectures by their names in GGUF files."""
