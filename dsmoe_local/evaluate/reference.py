"""References: the recorded predictions of a model for a text, to compare other models with.

Observers record a reference in a folder. It can be kept as one file, an uncompressed zip archive of the files
in the folder: `about.json`, `tokens` (int32, the windows in their order), `predictions`, and `choices` if the
model has routers.
"""

from __future__ import annotations

import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dsmoe_local.base.durable import locked, publish, require_space, sync
from dsmoe_local.base.errors import FileError, FormatError, UsageError, file_errors
from dsmoe_local.base.progress import Listener, ignore
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.evaluate.measure import measure, name_of
from dsmoe_local.evaluate.reference_files import Routers, routers_of
from dsmoe_local.evaluate.results import Comparison, Divergence, Evaluation, Perplexity, RoutingFidelity
from dsmoe_local.evaluate.windows import Windows
from dsmoe_local.model.gguf_model import read_any_model

MAX_ENTRIES = 2048
"""The largest number of entries of a prediction, for vocabularies above COMPLETE_VOCABULARY."""
COMPLETE_VOCABULARY = 4096
"""Up to this vocabulary size, predictions have entries for all tokens, and the divergence is exact."""

_MODULES = {
    "reference": "dsmoe_local.evaluate.prediction_observers",
    "divergence": "dsmoe_local.evaluate.prediction_observers",
    "routing_reference": "dsmoe_local.evaluate.routing_observers",
    "routing_divergence": "dsmoe_local.evaluate.routing_observers",
}
_VERSION = 1
_ABOUT, _TOKENS, _PREDICTIONS, _CHOICES = "about.json", "tokens", "predictions", "choices"
_MAX_ABOUT = 1 << 20
_ARCHIVE = b"PK\x03\x04"
_NOT_READ, _NOT_WRITTEN = "the reference cannot be read", "the reference cannot be written"
_ENCRYPTED = 1  # a flag of a zip member
# What zipfile, msgspec and numpy raise for a damaged or foreign file.
_MALFORMED = (
    zipfile.BadZipFile,
    ArithmeticError,
    EOFError,
    KeyError,
    NotImplementedError,
    RecursionError,
    ValueError,
)


class _About(msgspec.Struct):
    """The content of about.json."""

    version: int
    model: str
    text: str
    text_digest: str
    vocabulary: str
    n_context: int
    gates: Routers | None


@dataclass(frozen=True, slots=True)
class Reference:
    """A recorded reference in a folder. `routers` is None if no choices were recorded."""

    folder: Path
    model: str
    windows: Windows
    routers: Routers | None

    def observers(self, model: Path) -> tuple[ObserverOptions, ...]:
        """Return the observers that compare a model with the reference.

        Routing is compared if both have the same routers.
        """
        predictions = observer_options("divergence", self.folder / _PREDICTIONS)
        if not self.has_routers_of(model):
            return (predictions,)
        return (predictions, observer_options("routing_divergence", self.folder / _CHOICES))

    def has_routers_of(self, model: Path) -> bool:
        """Return True if the model in this file has the same routers."""
        return self.routers is not None and self.routers == routers_of(read_any_model(model)[1])


def recorders(folder: Path, model: Path) -> tuple[ObserverOptions, ...]:
    """Return the observers that record a reference in `folder`. Load the model with them before `record`."""
    outline = read_any_model(model)[1]
    mass = {"mass": 1.0} if outline.n_vocab <= COMPLETE_VOCABULARY else {}
    path = folder / _PREDICTIONS
    predictions = observer_options("reference", path, top=_max_entries(outline.n_vocab), **mass)
    if routers_of(outline) is None:
        return (predictions,)
    return (predictions, observer_options("routing_reference", folder / _CHOICES))


def _max_entries(n_vocab: int) -> int:
    return n_vocab if n_vocab <= COMPLETE_VOCABULARY else MAX_ENTRIES


def observer_options(name: str, path: Path, **parameters: float) -> ObserverOptions:
    """Return the options of one of the observers that docs/observers.md lists under "References"."""
    return ObserverOptions(name, (("path", str(path)), *parameters.items()), _MODULES[name])


def record(
    engine: TextEngine,
    windows: Windows,
    folder: Path,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> tuple[Reference, Evaluation]:
    """Measure and record a model loaded with `recorders`. Raises the errors of `measure`, and FileError."""
    routers = routers_of(read_any_model(engine.info.path)[1])
    bytes_per_token = 8 * _max_entries(engine.info.n_vocab)
    if routers is not None:
        bytes_per_token += 2 * routers.n_layers * (routers.n_experts + 16)
    require_space(folder, windows.n_scored * bytes_per_token)
    result = measure(engine, windows, listen, stop)
    # To return its summary, an observer completes its file.
    engine.observe("reference")
    if routers is not None:
        engine.observe("routing_reference")
    reference = Reference(folder, name_of(engine), windows, routers)
    about = _About(
        _VERSION,
        reference.model,
        windows.text,
        windows.text_digest,
        windows.vocabulary,
        windows.n_context,
        routers,
    )
    (folder / _TOKENS).write_bytes(np.array(windows.tokens, "<i4").tobytes())
    (folder / _ABOUT).write_bytes(msgspec.json.encode(about))
    return reference, result


def compare(
    engine: TextEngine, reference: Reference, listen: Listener = ignore, stop: threading.Event | None = None
) -> Evaluation:
    """Measure a model loaded with `reference.observers`, and compare it with the reference.

    Raises the errors of `measure`, and UsageError if the vocabularies differ.
    """
    if engine.info.vocabulary != reference.windows.vocabulary:
        raise UsageError(
            f"{name_of(engine)} and {reference.model} have different vocabularies",
            remedy="compare models with the same tokenizer",
        )
    result = measure(engine, reference.windows, listen, stop)
    seen = engine.observe("divergence")
    routing: Any = None
    if reference.has_routers_of(engine.info.path):
        routing = engine.observe("routing_divergence")["routing"]
    comparison = Comparison(
        reference.model,
        msgspec.convert(seen["reference"], Perplexity),
        msgspec.convert(seen["divergence"], Divergence),
        msgspec.convert(routing, RoutingFidelity | None),
    )
    return replace(result, comparison=comparison)


@contextmanager
def reserved(kept: Path) -> Iterator[None]:
    """Lock the name of a file to keep a reference in, before the model is measured.

    Raises FileError if the file exists, LockedError if another run has reserved it.
    """
    with ExitStack() as stack:
        with file_errors(_NOT_WRITTEN, kept):
            stack.enter_context(locked(kept))
        if os.path.lexists(kept):
            raise _exists(kept)
        yield


def keep(reference: Reference, kept: Path) -> None:
    """Write the reference to one file, atomically. The caller must have `reserved` its name.

    Raises FileError, also if the file exists; FormatError if it cannot be read back.
    """
    names = [_ABOUT, _TOKENS, _PREDICTIONS, *([_CHOICES] if reference.routers else [])]
    # Under the lock, a file of this name can only come from a killed run.
    temporary = kept.with_name(f".{kept.name}.part")
    with file_errors(_NOT_WRITTEN, kept):
        try:
            require_space(
                kept.absolute().parent, sum((reference.folder / name).stat().st_size for name in names)
            )
            temporary.unlink(missing_ok=True)
            # Private, since it contains the text.
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
            raise _exists(kept) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _verify(temporary: Path, kept: Path) -> None:
    """Raise FormatError unless all checksums in the file are correct."""
    try:
        with zipfile.ZipFile(temporary) as archive:
            damaged = archive.testzip()
    except _MALFORMED:
        damaged = "the archive"
    if damaged is not None:
        raise FormatError(
            f"the reference cannot be read back: {damaged} is damaged", where=kept, remedy="check the disk"
        )


def _exists(kept: Path) -> FileError:
    if kept.is_dir():
        return FileError("this is a folder", where=kept, remedy="name a file to keep the reference in")
    return FileError("the file exists already", where=kept, remedy="remove it, or name another file")


def is_kept(path: Path) -> bool:
    """Return True if a file begins like a kept reference, not like a model. Raises FileError."""
    with file_errors(_NOT_READ, path), path.open("rb") as file:
        return file.read(len(_ARCHIVE)) == _ARCHIVE


def unpack(kept: Path, folder: Path, n_windows: int | None = None) -> Reference:
    """Unpack a kept reference into `folder`. Return it with its first `n_windows` windows (None: all).

    Raises FileError, FormatError.
    """
    with file_errors(_NOT_READ, kept):
        try:
            with zipfile.ZipFile(kept) as archive:
                about = _read_about(archive)
                require_space(folder, kept.stat().st_size)
                for name in (_TOKENS, _PREDICTIONS, *([_CHOICES] if about.gates else [])):
                    with archive.open(_member(archive, name)) as source, (folder / name).open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
            ids = np.frombuffer((folder / _TOKENS).read_bytes(), "<i4").reshape(-1, about.n_context)
        except _MALFORMED as error:
            what = "it is truncated or damaged" if isinstance(error, zipfile.BadZipFile) else f"{error}"
            raise _unusable(kept, what) from error
    tokens = tuple(tuple(window) for window in ids[:n_windows].tolist())
    if not tokens:
        raise _unusable(kept, "it has no windows")
    texts = (safe_line(value, 80) for value in (about.text, about.text_digest, about.vocabulary))
    return Reference(folder, safe_line(about.model, 80), Windows(tokens, *texts), about.gates)


def _unusable(kept: Path, what: str) -> FormatError:
    return FormatError(
        f"not a usable reference: {what}", where=kept, remedy="make it again: dsmoe eval MODEL --keep FILE"
    )


def _read_about(archive: zipfile.ZipFile) -> _About:
    member = _member(archive, _ABOUT)
    if member.file_size > _MAX_ABOUT:
        raise ValueError(f"{_ABOUT} is too large")
    about = msgspec.json.decode(archive.read(member), type=_About)
    if about.version != _VERSION:
        raise ValueError(f"version {about.version} is not known")
    return about


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return a member. Raises ValueError if it is compressed, since it may be too large, or encrypted."""
    found = archive.getinfo(name)
    if found.flag_bits & _ENCRYPTED:
        raise ValueError(f"{name} is encrypted")
    if found.compress_type != zipfile.ZIP_STORED or found.file_size != found.compress_size:
        raise ValueError(f"{name} is compressed")
    return found
