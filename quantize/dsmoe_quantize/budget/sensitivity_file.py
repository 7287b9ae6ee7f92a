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
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, FormatError, UsageError
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.identity import file_identity
from dsmoe_quantize.budget.sensitivity import SAMPLE, Probe, Probes, Sensitivity, TensorErrors
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.recipes import KINDS
from dsmoe_quantize.write import kernels

_FORMAT, _VERSION = "dsmoe-sensitivity", 1
_ANOTHER = "name another file"
_MAX_BYTES = 1 << 26
_PROBE_FIELDS = frozenset(item.name for item in fields(Probe))
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
    """Return the path in the cache, named by a digest of all that decides the values."""
    parts = (wanted.source, wanted.imatrix, wanted.kernels, wanted.sample)
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return cache_folder() / "sensitivity" / f"{digest}.json"


def resume(path: Path, wanted: Sensitivity, *, any_sample: bool = False) -> Sensitivity:
    """Return the content of the file, or `wanted` if it does not exist.

    UsageError if it was measured on another model or with another importance matrix, version or sample.
    `any_sample`: accept the file's sample.
    """
    if not path.exists():
        return wanted
    found = read_sensitivity(path)
    for what, had, want, same in (
        ("another model", found.source, wanted.source, ""),
        (_other_matrix(found, wanted), found.imatrix, wanted.imatrix, ", or use the same matrix"),
        ("another version of llama-cpp-python", found.kernels, wanted.kernels, ""),
        ("another sample", found.sample, found.sample if any_sample else wanted.sample, ""),
    ):
        if had != want:
            raise UsageError(
                f"the sensitivity was measured with {what}",
                where=path,
                remedy=f"name another file, remove it{same}",
            )
    return found


def costs_of_another_matrix(path: Path, wanted: Sensitivity) -> Sensitivity | None:
    """Return the content of a file whose `weights` can be used but whose errors cannot, otherwise None.

    That is a file with weights that was measured with another importance matrix than `wanted`, or without
    one: errors depend on the matrix, but what an error costs does not. UsageError if it is of another model;
    FileError, FormatError.
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
        """Remember the latest state; write it if the last write was some seconds ago. FileError."""
        self._latest = sensitivity
        if time.monotonic() - self._written > _SECONDS:
            self.close()

    def close(self) -> None:
        """Write the latest state if it is not written yet. FileError."""
        if self._latest is not None:
            write_sensitivity(self._latest, self._path)
            self._latest, self._written = None, time.monotonic()


def write_sensitivity(sensitivity: Sensitivity, path: Path) -> None:
    """Write the file, durably, replacing an existing one. FileError."""
    content: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "source": sensitivity.source,
        "imatrix": sensitivity.imatrix,
        "kernels": sensitivity.kernels,
        "sample": sensitivity.sample,
        "tensors": {
            name: {
                "n_weights": each.n_weights,
                "n_tried": each.n_tried,
                "energy": each.energy,
                "errors": {kind.name: error for kind, error in sorted(each.errors.items())},
            }
            for name, each in sensitivity.tensors.items()
        },
        "weights": dict(sensitivity.weights),
    }
    if sensitivity.probes is not None:
        content["probes"] = _probes_as_json(sensitivity.probes)
    try:
        durable.write_file(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise FileError(f"cannot write the sensitivity: {error.strerror}", where=path) from error


def _probes_as_json(probes: Probes) -> dict[str, Any]:
    return {
        "text": probes.text,
        "text_digest": probes.text_digest,
        "n_context": probes.n_context,
        "n_windows": probes.n_windows,
        "n_windows_of_text": probes.n_windows_of_text,
        "types": [kind.name for kind in probes.types],
        "floor": probes.floor,
        "groups": {
            group: {kind.name: asdict(probe) for kind, probe in sorted(found.items())}
            for group, found in probes.groups.items()
        },
    }


def read_sensitivity(path: Path) -> Sensitivity:
    """Read a sensitivity file. FileError if it cannot be read, FormatError for its content.

    The error suggests to remove the file only if it is a sensitivity file: any other may be precious, such as
    a model that was named by mistake.
    """
    try:
        content = durable.read_at_most(path, _MAX_BYTES)
    except OSError as error:
        raise FileError(f"cannot read the sensitivity: {error.strerror}", where=path) from error
    try:
        found = json.loads(content[:_MAX_BYTES])
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "it is not JSON", _ANOTHER) from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise _refusal(path, f"it is not {_FORMAT}", _ANOTHER)
    if found.get("version") != _VERSION:
        raise _refusal(path, f"it is not of version {_VERSION}")
    return _Reader(path, found).read()


def _refusal(path: Path, what: str, remedy: str = "remove it to measure again") -> FormatError:
    return FormatError(f"not a usable sensitivity file: {what}", where=path, remedy=remedy)


class _Reader:
    """Validates a JSON object and turns it into a Sensitivity."""

    def __init__(self, path: Path, found: Mapping[str, Any]) -> None:
        self._path = path
        self._found = found

    def refuse(self, what: str) -> NoReturn:
        raise _refusal(self._path, safe_line(what, 120))

    def read(self) -> Sensitivity:
        """Return the whole content."""
        source, imatrix, version = (self._found.get(key) for key in ("source", "imatrix", "kernels"))
        sample, tensors = self._found.get("sample"), self._found.get("tensors")
        if not isinstance(source, str) or not isinstance(imatrix, str) or not isinstance(version, str):
            self.refuse("it does not name its model and importance matrix")
        if type(sample) is not int or sample < 0:
            self.refuse("its sample size is missing")
        if not isinstance(tensors, dict):
            self.refuse("it has no tensors")
        return Sensitivity(
            source,
            imatrix,
            version,
            sample,
            {name: self._tensor(name, value) for name, value in tensors.items()},
            self._weights(),
            None if self._found.get("probes") is None else self._probes(self._found["probes"]),
        )

    def _weights(self) -> dict[str, float]:
        """Weights may be written by hand, and a misspelt group would have no effect: it is refused."""
        found = self._numbers("weights", self._found.get("weights", {}))
        for name in found:
            kind, dot, layer = name.partition(".")
            if kind not in KINDS or (dot and not (layer.isascii() and layer.isdigit())):
                raise _refusal(
                    self._path,
                    safe_line(f"weights: {name} is not a group", 120),
                    f"correct it; known: {', '.join(KINDS)}",
                )
        return found

    def _tensor(self, name: str, value: object) -> TensorErrors:
        if not isinstance(value, dict):
            self.refuse(f"{name} is not an object")
        n_weights, n_tried = value.get("n_weights"), value.get("n_tried")
        if type(n_weights) is not int or type(n_tried) is not int or not 0 < n_tried <= n_weights:
            self.refuse(f"{name}: impossible numbers of weights")
        energy = self._numbers(name, {"energy": value.get("energy")})["energy"]
        errors = self._numbers(name, value.get("errors"))
        return TensorErrors(
            n_weights, n_tried, energy, {self._type(name, key): error for key, error in errors.items()}
        )

    def _type(self, where: str, name: object) -> GgmlType:
        kind = GgmlType.__members__.get(name) if isinstance(name, str) else None
        if kind is None:
            self.refuse(f"{where}: {name} is not a type")
        return kind

    def _probes(self, value: object) -> Probes:
        if not isinstance(value, dict):
            self.refuse("probes is not an object")
        text, digest, types, groups = (value.get(key) for key in ("text", "text_digest", "types", "groups"))
        if not isinstance(text, str) or not isinstance(digest, str):
            self.refuse("probes: the text is missing")
        if not isinstance(types, list) or not isinstance(groups, dict):
            self.refuse("probes: types or groups are missing")
        n_context, n_windows = value.get("n_context"), value.get("n_windows")
        if type(n_context) is not int or type(n_windows) is not int or min(n_context, n_windows) < 1:
            self.refuse("probes: the numbers of tokens and windows are missing")
        of_text = value.get("n_windows_of_text", 0)
        if type(of_text) is not int or (of_text != 0 and of_text < n_windows):
            self.refuse("probes: the text has fewer windows than were read")
        return Probes(
            safe_line(text, 80),
            safe_line(digest, 80),
            n_context,
            n_windows,
            tuple(self._type("probes", kind) for kind in types),
            self._numbers("probes", {"floor": value.get("floor")})["floor"],
            {group: self._group(group, found) for group, found in groups.items()},
            of_text,
        )

    def _group(self, group: str, value: object) -> dict[GgmlType, Probe]:
        if not isinstance(value, dict):
            self.refuse(f"{group} is not an object")
        found = {}
        for kind, probe in value.items():
            numbers = self._numbers(group, probe)
            if numbers.keys() != _PROBE_FIELDS:
                self.refuse(f"{group}: {kind} is not a probe")
            found[self._type(group, kind)] = Probe(**numbers)
        return found

    def _numbers(self, where: str, value: object) -> dict[str, float]:
        if not isinstance(value, dict):
            self.refuse(f"{where}: numbers are missing")
        for key, number in value.items():
            if type(number) not in (int, float) or not math.isfinite(number) or number < 0:
                self.refuse(f"{where}: {key} is not a number of at least 0")
        return {key: float(number) for key, number in value.items()}
