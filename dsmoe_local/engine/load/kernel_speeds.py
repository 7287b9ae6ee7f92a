"""Speeds of a model with each form of its weights, as `dsmoe bench --kernels --save` keeps them in the cache.

They are valid for one model, processor and version of llama-cpp-python.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import msgspec

from dsmoe_local.base import durable
from dsmoe_local.base.errors import file_errors
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine import native
from dsmoe_local.engine.load.kernels import FORMS, FormSpeed, Kernels
from dsmoe_local.engine.load.machine import cpu_name
from dsmoe_local.model.identity import file_identity

_MAX_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class _Saved:
    model: str
    cpu: str
    llama_cpp: str
    speeds: dict[Kernels, FormSpeed]


def save_speeds(model: Path, speeds: dict[Kernels, FormSpeed]) -> Path:
    """Save the speeds of a model with each form, and return the file. Raises FileError."""
    identity = file_identity(model)
    path = _path(identity)
    saved = _Saved(identity, cpu_name(), native.VERSION, speeds)
    with file_errors("the speeds cannot be saved", path):
        durable.make_folders(path.parent)
        durable.write_file(path, msgspec.json.format(msgspec.json.encode(saved)))
    return path


def read_speeds(model: Path) -> tuple[dict[Kernels, FormSpeed], str]:
    """Return the saved speeds of a model, {} if there are none, and a note if a file had to be ignored.

    Raises FileError if the model cannot be read.
    """
    if not _folder().is_dir():
        return {}, ""
    identity = file_identity(model)
    path = _path(identity)
    try:
        saved = msgspec.json.decode(durable.read_at_most(path, _MAX_BYTES), type=_Saved)
    except FileNotFoundError:
        return {}, ""
    # UnicodeDecodeError and msgspec's errors are ValueErrors.
    except (OSError, ValueError, RecursionError):
        return {}, _ignored(path, "is damaged")
    if (saved.model, saved.cpu, saved.llama_cpp) != (identity, cpu_name(), native.VERSION):
        return {}, _ignored(path, "is of another processor or version of llama-cpp-python")
    positive = all(each.prompt > 0 and each.decode > 0 for each in saved.speeds.values())
    if set(saved.speeds) != set(FORMS) or not positive:
        return {}, _ignored(path, "is damaged")
    return saved.speeds, ""


def _ignored(path: Path, why: str) -> str:
    return f"{safe_line(str(path))} {why} and is ignored: run dsmoe bench MODEL --kernels --save again"


def _folder() -> Path:
    return cache_folder() / "kernels"


def _path(identity: str) -> Path:
    return _folder() / f"{blake2b(identity.encode(), digest_size=8).hexdigest()}.json"
