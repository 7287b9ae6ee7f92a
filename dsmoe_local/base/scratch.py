"""Scratch folders in the cache folder, for temporary files.

The next run removes the folders of killed runs.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dsmoe_local.base.durable import locked, make_folders
from dsmoe_local.base.errors import FileError, LockedError
from dsmoe_local.base.paths import cache_folder

# The name of a folder, or of its lock file.
_NAME = re.compile(r"(?P<folder>[0-9a-f]{16})|\.(?P<locked>[0-9a-f]{16})\.lock")


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Create an empty folder in the folder `purpose` of the cache, removed at the end. Raises FileError."""
    with ExitStack() as stack:
        try:
            parent = cache_folder() / purpose
            make_folders(parent, 0o700)
            _remove_stale(parent)
            folder = parent / secrets.token_hex(8)
            stack.enter_context(locked(folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir(0o700)
        except OSError as error:
            raise FileError(
                f"a scratch folder cannot be created: {error.strerror}", where=str(error.filename)
            ) from error
        yield folder


def _remove_stale(parent: Path) -> None:
    for path in parent.iterdir():
        found = _NAME.fullmatch(path.name)
        if found is None:
            continue
        folder = parent / (found["folder"] or found["locked"])
        # A running process holds the lock of its folder.
        with suppress(LockedError, OSError), locked(folder):
            shutil.rmtree(folder, ignore_errors=True)
