"""The `general.*` metadata of a converted file."""

from __future__ import annotations

from pathlib import Path

import gguf
from gguf.constants import GGUFValueType

from dsmoe_local.base.text import safe_line
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.gguf_vocabulary import clashes_with_phi3
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, tensor_specs

_MODEL_CARD = "README.md"
_MAX_CARD = 4 << 20


def general_fields(hp: Hyperparameters, name: str, license_id: str | None) -> dict[str, Field]:
    """Return the `general.*` metadata, without the keys about the file's type.

    A name with which llama.cpp could not load the file is replaced by that of the architecture.
    """
    if clashes_with_phi3(name):
        name = hp.architecture
    fields = {
        "general.architecture": Field(hp.architecture, GGUFValueType.STRING),
        "general.type": Field("model", GGUFValueType.STRING),
        "general.name": Field(name, GGUFValueType.STRING),
        "general.size_label": Field(size_label(hp), GGUFValueType.STRING),
    }
    if license_id:
        fields["general.license"] = Field(license_id, GGUFValueType.STRING)
    return fields


def size_label(hp: Hyperparameters) -> str:
    """Return the size as llama.cpp writes it: number of experts, and weights with one routed expert."""
    specs = tensor_specs(hp)
    routed = sum(spec.n_weights for spec in specs if spec.role is Role.ROUTED_EXPERT)
    total = sum(spec.n_weights for spec in specs)
    per_expert = routed // max(1, hp.n_routed_experts)
    return gguf.size_label(total, total - routed, per_expert, hp.n_routed_experts)


def license_of(folder: Path) -> str | None:
    """Return the licence that the model card names, or None. Malformed cards are ignored."""
    card = folder / _MODEL_CARD
    try:
        if card.stat().st_size > _MAX_CARD:
            return None
        text = card.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    lines = iter(text.splitlines())
    if next(lines, "") != "---":
        return None
    values: dict[str, str] = {}
    for line in lines:
        if line == "---":
            break
        key, colon, value = line.partition(":")
        if colon and value.strip():
            values[key] = value.strip().strip("\"'")
    found = values.get("license")
    # For `other`, the name is in another key.
    found = values.get("license_name", found) if found == "other" else found
    return safe_line(found, 80) if found else None
