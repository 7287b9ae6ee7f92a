"""What a reference model made of a text: recorded in a folder, kept in one file, compared with. Runs models
through `measure`; what is recorded of each token is the observers' own.

A kept reference is a zip archive, not compressed, of the folder's files: `about.json`, `tokens` (int32,
windows after each other), `predictions`, and `choices` where the model has routers.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_local.base.durable import locked, publish, require_space, sync
from dsmoe_local.base.errors import FileError, FormatError, UsageError
from dsmoe_local.base.progress import Listener, ignore
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.observe.routing_file import Gates, gates_of
from dsmoe_local.engine.types import ObserverOptions, TextEngine
from dsmoe_local.evaluate.measure import measure, name_of
from dsmoe_local.evaluate.results import Comparison, Evaluation, divergence_of, reference_of, routing_of
from dsmoe_local.evaluate.windows import Windows
from dsmoe_local.model.gguf_model import read_model

TOP = 2048
"""Entries that are kept of a token at most, but for a small vocabulary."""
SMALL = 4096
"""A vocabulary of so many tokens is kept whole: then the divergence is exact."""

_VERSION = 1
_ABOUT, _TOKENS, _PREDICTIONS, _CHOICES = "about.json", "tokens", "predictions", "choices"
_MOST_ABOUT = 1 << 20
_ARCHIVE = b"PK\x03\x04"
_ENCRYPTED = 1  # a bit of a member's flags; zipfile asks for a password
# What zipfile, json and numpy raise of a file that is something else.
_MALFORMED = (
    zipfile.BadZipFile,
    ArithmeticError,
    EOFError,
    KeyError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Reference:
    """A recorded reference, in a folder. `gates` is None where no choices were recorded."""

    folder: Path
    model: str
    windows: Windows
    gates: Gates | None

    def observers(self, model: Path) -> tuple[ObserverOptions, ...]:
        """What compares a model with it: its routers only where they are alike."""
        predictions = _observer("divergence", self.folder / _PREDICTIONS)
        if self.gates is None or self.gates != _gates(model):
            return (predictions,)
        return (predictions, _observer("routing_divergence", self.folder / _CHOICES))


def _gates(model: Path) -> Gates | None:
    """A model file's; raises what the strict reader does."""
    return gates_of(read_model(model)[1])


def recorders(folder: Path, model: Path) -> tuple[ObserverOptions, ...]:
    """What records a reference into `folder`; load the model with them before `record`."""
    hp = read_model(model)[1]
    kept: tuple[tuple[str, int | float], ...] = (("top", _most_entries(hp.n_vocab)),)
    if hp.n_vocab <= SMALL:
        kept += (("mass", 1.0),)
    predictions = _observer("reference", folder / _PREDICTIONS, *kept)
    if gates_of(hp) is None:
        return (predictions,)
    return (predictions, _observer("routing_reference", folder / _CHOICES))


def _most_entries(n_vocab: int) -> int:
    return n_vocab if n_vocab <= SMALL else TOP


def _observer(name: str, path: Path, *more: tuple[str, int | float]) -> ObserverOptions:
    return ObserverOptions(name, (("path", str(path)), *more))


def record(
    engine: TextEngine,
    windows: Windows,
    folder: Path,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> tuple[Reference, Evaluation]:
    """Measure a model loaded with `recorders`, and record it. Raises what `measure` does, and FileError."""
    gates = _gates(engine.info.path)
    per_token = 8 * _most_entries(engine.info.n_vocab) + (
        2 * gates.n_layers * (gates.n_experts + 16) if gates else 0
    )
    require_space(folder, windows.n_scored * per_token)
    result = measure(engine, windows, listen, stop)
    # Asked for, they are complete on the disk.
    engine.observe("reference")
    if gates is not None:
        engine.observe("routing_reference")
    reference = Reference(folder, name_of(engine), windows, gates)
    (folder / _TOKENS).write_bytes(np.array(windows.tokens, "<i4").tobytes())
    (folder / _ABOUT).write_text(json.dumps(_about(reference)), encoding="utf-8")
    return reference, result


def _about(reference: Reference) -> dict[str, Any]:
    windows, gates = reference.windows, reference.gates
    return {
        "version": _VERSION,
        "model": reference.model,
        "text": windows.text,
        "text_digest": windows.text_digest,
        "vocabulary": windows.vocabulary,
        "n_context": windows.n_context,
        "gates": list(gates) if gates else None,
    }


def compare(
    engine: TextEngine, reference: Reference, listen: Listener = ignore, stop: threading.Event | None = None
) -> Evaluation:
    """Measure a model loaded with `reference.observers`, beside the reference. Raises what `measure` does;
    UsageError if the models' tokens differ.
    """
    if engine.info.vocabulary != reference.windows.vocabulary:
        raise UsageError(
            f"{name_of(engine)} and {reference.model} have different vocabularies",
            remedy="only models with the same tokens can be compared",
        )
    result = measure(engine, reference.windows, listen, stop)
    seen = engine.observe("divergence")
    alike = reference.gates is not None and reference.gates == _gates(engine.info.path)
    routing = routing_of(engine.observe("routing_divergence")) if alike else None
    return replace(
        result, comparison=Comparison(reference.model, reference_of(seen), divergence_of(seen), routing)
    )


@contextmanager
def reserved(kept: Path) -> Iterator[None]:
    """Hold the right to write the new file `kept`. FileError if there is such a file, since hours of work are
    not written over; LockedError while another run has the right.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(kept))
        except OSError as error:
            raise _not_kept(error, kept) from error
        if os.path.lexists(kept):
            raise _is_there(kept)
        yield


def keep(reference: Reference, kept: Path) -> None:
    """Write the reference as one file: complete under its name, or not at all. Whoever calls it has the name
    `reserved`. FileError, also if there is such a file by now; FormatError if it cannot be read again.
    """
    names = [_ABOUT, _TOKENS, _PREDICTIONS, *([_CHOICES] if reference.gates else [])]
    # Nobody else writes under this name: one that is there is of a run that was killed.
    temporary = kept.with_name(f".{kept.name}.part")
    try:
        require_space(kept.absolute().parent, sum((reference.folder / name).stat().st_size for name in names))
        temporary.unlink(missing_ok=True)
        # It holds the text.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in names:
                    archive.write(reference.folder / name, name)
            file.flush()
            sync(file.fileno())
        _verify(temporary, kept)
        publish(temporary, kept)
    except FileExistsError as error:
        raise _is_there(kept) from error
    except OSError as error:
        raise _not_kept(error, kept) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _verify(temporary: Path, kept: Path) -> None:
    """FormatError unless what is on the disk is what was written."""
    try:
        with zipfile.ZipFile(temporary) as archive:
            damaged = archive.testzip()
    except _MALFORMED:
        damaged = "all of it"
    if damaged is not None:
        raise FormatError(
            f"what was written cannot be read again: {damaged}", where=kept, remedy="check the disk"
        )


def _is_there(kept: Path) -> FileError:
    if kept.is_dir():
        return FileError("this is a folder", where=kept, remedy="name a file to keep the reference in")
    return FileError("the file exists already", where=kept, remedy="remove it, or name another file")


def _not_kept(error: OSError, kept: Path) -> FileError:
    return FileError(f"the reference cannot be kept: {error.strerror}", where=kept)


def is_kept(path: Path) -> bool:
    """Whether a file is a kept reference rather than a model: also one that was cut short. FileError."""
    try:
        with path.open("rb") as file:
            return file.read(len(_ARCHIVE)) == _ARCHIVE
    except OSError as error:
        raise _unreadable(error, path) from error


def unpack(kept: Path, folder: Path, n_windows: int | None = None) -> Reference:
    """A kept reference, or its first `n_windows`. FileError, FormatError."""
    try:
        with zipfile.ZipFile(kept) as archive:
            about = json.loads(_small(archive, _ABOUT))
            if about["version"] != _VERSION:
                raise ValueError(f"version {about['version']} is not known")
            gates = Gates(*map(int, about["gates"])) if about["gates"] is not None else None
            require_space(folder, kept.stat().st_size)
            for name in (_TOKENS, _PREDICTIONS, *([_CHOICES] if gates else [])):
                _extract(archive, name, folder)
        ids = np.frombuffer((folder / _TOKENS).read_bytes(), "<i4").reshape(-1, int(about["n_context"]))
        windows = Windows(
            tuple(tuple(window) for window in ids[:n_windows].tolist()),
            *(safe_line(str(about[name]), 80) for name in ("text", "text_digest", "vocabulary")),
        )
        if not windows.tokens:
            raise ValueError("it has no windows")
        return Reference(folder, safe_line(str(about["model"]), 80), windows, gates)
    except OSError as error:
        raise _unreadable(error, kept) from error
    except _MALFORMED as error:
        what = "it is cut short or damaged" if isinstance(error, zipfile.BadZipFile) else error
        raise FormatError(
            f"not a usable reference: {what}",
            where=kept,
            remedy="make it again: dsmoe eval MODEL --keep FILE",
        ) from error


def _unreadable(error: OSError, kept: Path) -> FileError:
    return FileError(f"the reference cannot be read: {error.strerror}", where=kept)


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """What is stored as it is cannot be larger than the archive."""
    found = archive.getinfo(name)
    if found.flag_bits & _ENCRYPTED:
        raise ValueError(f"{name} is encrypted")
    if found.compress_type != zipfile.ZIP_STORED or found.file_size != found.compress_size:
        raise ValueError(f"{name} is compressed")
    return found


def _small(archive: zipfile.ZipFile, name: str) -> bytes:
    member = _member(archive, name)
    if member.file_size > _MOST_ABOUT:
        raise ValueError(f"{name} is too large")
    return archive.read(member)


def _extract(archive: zipfile.ZipFile, name: str, folder: Path) -> None:
    with archive.open(_member(archive, name)) as source, (folder / name).open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
