"""The architectures that the converter and the quantizer know: one module for each, with its ARCHITECTURE.

To add one, copy the module of the most similar architecture. Nothing else needs to change.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.architectures.table import Architecture

_SHARED = ("common", "table")


def _modules() -> list[Architecture]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED]
    return [import_module(f"{__name__}.{name}").ARCHITECTURE for name in names]


ARCHITECTURES: Mapping[str, Architecture] = {architecture.name: architecture for architecture in _modules()}
"""The architectures by their names in GGUF files."""


def no_table(purpose: str, architecture: str, where: str | Path = "") -> UsageError:
    """Return the error for something that needs a table, and a model that none describes."""
    known = [each.name for each in ARCHITECTURES.values() if each.moe_layer]
    return UsageError(
        f"{purpose} is not available for this {safe_line(architecture, 40)} model",
        where=where,
        remedy=f"it works with {', '.join(known)}",
    )
