"""The folder of KV states: which files in it are ours, and taking them away. Nothing else is ever touched."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

DIGEST_BYTES = 32
_FOLDER = "states"
_NAME = re.compile(r"[0-9a-f]{16}\.state")
_WRITING = ".part"
_CHUNK = 1 << 20


def states_folder(sessions: Path) -> Path:
    """Where the states of the sessions in a folder are."""
    return sessions / _FOLDER


def new_name() -> str:
    """A name for a state's file."""
    return f"{secrets.token_hex(8)}.state"


def is_name(value: object) -> bool:
    """Whether a value, of a database that may be damaged, is a state's name: no path, no other file's."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def writing_of(final: Path) -> Path:
    """What a state's file is called while it is written."""
    return final.with_name(final.name + _WRITING)


def present(folder: Path) -> dict[str, str]:
    """The files in the folder that are ours: states, what becomes one, and locks, each with its state's
    name.
    """
    try:
        found = {path.name: _final_of(path.name) for path in folder.iterdir()}
    except OSError:
        return {}
    return {name: final for name, final in found.items() if is_name(final)}


def remove(folder: Path, names: Iterable[object]) -> None:
    """Remove states, and what was to become one; other names are passed over. What cannot be removed now is
    found as an orphan later.
    """
    for name in names:
        if isinstance(name, str) and is_name(name.removesuffix(_WRITING)):
            try:
                (folder / name).unlink(missing_ok=True)
            except OSError:
                continue


def digest_of(path: Path) -> tuple[int, bytes]:
    """A file's size and digest."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    n_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            n_bytes += len(chunk)
    return n_bytes, digest.digest()


def _final_of(name: str) -> str:
    """The state that a file is, becomes, or is the lock of."""
    if name.startswith(".") and name.endswith(".lock"):
        return name.removeprefix(".").removesuffix(".lock")
    return name.removesuffix(_WRITING)
