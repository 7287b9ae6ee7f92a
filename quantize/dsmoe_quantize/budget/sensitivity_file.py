"""Sensitivity files in JSON. They are written during the measurement, so that an interrupted run can resume.

    {"format": "dsmoe-sensitivity", "version": 1, "source": …, "imatrix": …, "kernels": …, "sample": 262144,
     "tensors": {"blk.1.attn_q.weight": {"n_weights": …, "n_tried": …, "energy": …, "errors": {"Q4_K": …}}},
     "weights": {"routed-down": 0.9, "routed-down.1": 0.05},
     "probes": {"text": …, "text_digest": …, "n_context": 512, "n_windows": 8, "n_windows_of_text": 37,
                "types": ["Q4_0"], "floor": …,
                "groups": {"routed-down": {"Q4_0": {"error": …, "kl": …, "kl_error": …}}}}}

`dsmoe eval --sensitivity` adds `weights` and `probes`; `weights` may also be written by hand. `sensitivity`
explains the values.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FormatError, UsageError, file_errors
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.identity import file_identity
from dsmoe_quantize.budget.sensitivity import (
    SAMPLE,
    NonNegative,
    Probe,
    Probes,
    Sensitivity,
    TensorErrors,
)
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.recipes import KINDS
from dsmoe_quantize.write import kernels

_FORMAT, _VERSION = "dsmoe-sensitivity", 1
_ANOTHER = "name another file"
_REPLACE = "name another file, or remove this one to measure again"
_MAX_BYTES = 1 << 26
_SECONDS = 5.0  # between two writes


def start(file: GgufFile, imatrix: Imatrix | None, sample: int | None) -> Sensitivity:
    """Return an empty Sensitivity of this model with this importance matrix."""
    return Sensitivity(
        file_identity(file.path),
        imatrix.digest() if imatrix else "",
        kernels.version(),
        SAMPLE if sample is None else sample,
    )


def default_path(wanted: Sensitivity) -> Path:
    """Return the path in the cache. Its name is a digest of everything that the measurements depend on."""
    parts = (wanted.source, wanted.imatrix, wanted.kernels, wanted.sample)
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return cache_folder() / "sensitivity" / f"{digest}.json"


def resume(path: Path, wanted: Sensitivity, *, any_sample: bool = False) -> Sensitivity:
    """Return the content of the file, or `wanted` if it does not exist.

    Raises UsageError if it was measured on another model or with another importance matrix, version or
    sample. `any_sample`: accept the file's sample.
    """
    if not path.exists():
        return wanted
    found = read_sensitivity(path)
    for what, had, want, remedy in (
        ("on another model", found.source, wanted.source, _REPLACE),
        (
            f"with {_other_matrix(found, wanted)}",
            found.imatrix,
            wanted.imatrix,
            f"use the same matrix, {_REPLACE}",
        ),
        ("with another version of llama-cpp-python", found.kernels, wanted.kernels, _REPLACE),
        ("with another sample", found.sample, found.sample if any_sample else wanted.sample, _REPLACE),
    ):
        if had != want:
            raise UsageError(f"the sensitivity was measured {what}", where=path, remedy=remedy)
    return found


def costs_of_another_matrix(path: Path, wanted: Sensitivity) -> Sensitivity | None:
    """Return the content of a file whose `weights` can be used but whose errors cannot, otherwise None.

    That is a file with weights that was measured with another importance matrix than `wanted`, or without
    one: errors depend on the matrix, but what an error costs does not. Raises UsageError if it is of another
    model, and the errors of `read_sensitivity`.
    """
    if not path.exists():
        return None
    found = read_sensitivity(path)
    if not found.weights or found.imatrix == wanted.imatrix:
        return None
    return resume(path, replace(wanted, imatrix=found.imatrix), any_sample=True)


def _other_matrix(found: Sensitivity, wanted: Sensitivity) -> str:
    """Say how the importance matrices differ."""
    if not found.imatrix:
        return "no importance matrix"
    return "another importance matrix" if wanted.imatrix else "an importance matrix"


class Keeper:
    """Writes the latest state of a measurement every few seconds, and at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = time.monotonic()
        self._latest: Sensitivity | None = None

    def keep(self, sensitivity: Sensitivity) -> None:
        """Remember the latest state; write it if the last write was some seconds ago. Raises FileError."""
        self._latest = sensitivity
        if time.monotonic() - self._written > _SECONDS:
            self.close()

    def close(self) -> None:
        """Write the latest state if it is not written yet. Raises FileError."""
        if self._latest is not None:
            write_sensitivity(self._latest, self._path)
            self._latest, self._written = None, time.monotonic()


def write_sensitivity(sensitivity: Sensitivity, path: Path) -> None:
    """Write the file, durably, replacing an existing one. Raises FileError."""
    content = {"format": _FORMAT, "version": _VERSION, **_with_names(msgspec.to_builtins(sensitivity))}
    if sensitivity.probes is None:
        del content["probes"]
    else:
        content["probes"]["types"] = [kind.name for kind in sensitivity.probes.types]
    with file_errors("cannot write the sensitivity", path):
        durable.write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def read_sensitivity(path: Path) -> Sensitivity:
    """Read a sensitivity file. Raises FileError if it cannot be read, FormatError for its content.

    The error suggests to remove the file only if it is a sensitivity file. Any other may be one that the user
    needs and named by mistake, such as a model.
    """
    with file_errors("cannot read the sensitivity", path):
        content = durable.read_at_most(path, _MAX_BYTES)
    if len(content) > _MAX_BYTES:
        raise _refusal(path, f"it is larger than {_MAX_BYTES >> 20} MiB", _ANOTHER)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "it is not JSON", _ANOTHER) from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise _refusal(path, f'its "format" is not "{_FORMAT}"', _ANOTHER)
    if found.get("version") != _VERSION:
        raise _refusal(path, f"its version is not {_VERSION}")
    try:
        sensitivity = _sensitivity_of(found)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, safe_line(str(error), 120)) from error
    _refuse_unknown_groups(path, sensitivity.weights)
    if sensitivity.probes is None:
        return sensitivity
    text, digest = (safe_line(each, 80) for each in (sensitivity.probes.text, sensitivity.probes.text_digest))
    return replace(sensitivity, probes=replace(sensitivity.probes, text=text, text_digest=digest))


def _with_names(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return `value` with types as keys replaced by their names. No other keys are numbers."""
    if not isinstance(value, dict):
        return value
    return {GgmlType(key).name if isinstance(key, int) else key: _with_names(value[key]) for key in value}


def _sensitivity_of(found: Mapping[str, Any]) -> Sensitivity:
    """Convert the content of a file. Raises ValueError, which says where the content is wrong."""
    tensors = {name: _tensor_errors(name, each) for name, each in _object("tensors", found).items()}
    weights = {
        name: _convert(f"weights: {name}", each, NonNegative)
        for name, each in _object("weights", found).items()
    }
    probes = None if found.get("probes") is None else _probes(_object("probes", found))
    rest = {**found, "tensors": {}, "weights": {}, "probes": None}
    return replace(msgspec.convert(rest, Sensitivity), tensors=tensors, weights=weights, probes=probes)


def _tensor_errors(name: str, found: object) -> TensorErrors:
    """Convert the measurements of one tensor."""
    if not isinstance(found, dict) or "errors" not in found:
        raise ValueError(f"{name} has no errors")
    errors = _by_type(name, found["errors"], NonNegative)
    converted: TensorErrors = _convert(name, {**found, "errors": {}}, TensorErrors)
    return replace(converted, errors=errors)


def _probes(found: Mapping[str, Any]) -> Probes:
    """Convert the member "probes"."""
    types = found.get("types")
    if not isinstance(types, list):
        raise ValueError("probes: types is not a list")
    numbers = [_type_of("probes: types", name) for name in types]
    groups = {
        name: _by_type(f"probes: {name}", each, Probe) for name, each in _object("groups", found).items()
    }
    converted: Probes = _convert("probes", {**found, "types": numbers, "groups": {}}, Probes)
    return replace(converted, groups=groups)


def _by_type(where: str, found: object, kind: Any) -> dict[GgmlType, Any]:  # noqa: ANN401 - a type for msgspec
    """Convert an object whose keys are the names of types."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: not an object")
    types = {name: _type_of(where, name) for name in found}
    return {types[name]: _convert(f"{where}: {name}", each, kind) for name, each in found.items()}


def _type_of(where: str, name: object) -> GgmlType:
    """Return the type of this name."""
    if not isinstance(name, str) or name not in GgmlType.__members__:
        raise ValueError(f"{where}: {name} is not a type")
    return GgmlType.__members__[name]


def _object(key: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object at `key`, empty if there is none."""
    value = found.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} is not an object")
    return value


def _convert(where: str, value: object, kind: Any) -> Any:  # noqa: ANN401 - the signature of msgspec.convert
    """Convert a value. Errors begin with `where`."""
    try:
        return msgspec.convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _refusal(path: Path, what: str, remedy: str = "remove it to measure again") -> FormatError:
    return FormatError(f"not a usable sensitivity file: {what}", where=path, remedy=remedy)


def _refuse_unknown_groups(path: Path, weights: Mapping[str, float]) -> None:
    """Refuse the names of groups that do not exist: weights may be written by hand."""
    for name in weights:
        kind, dot, layer = name.partition(".")
        if kind not in KINDS or (dot and not (layer.isascii() and layer.isdigit())):
            raise _refusal(
                path,
                safe_line(f"weights: {name} is not a group", 120),
                f"correct it; known: {', '.join(KINDS)}",
            )
