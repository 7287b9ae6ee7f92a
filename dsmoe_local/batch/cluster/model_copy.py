"""A copy of a model that arrives in pieces. It gets its final name when it is complete and verified."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FormatError, file_errors
from dsmoe_local.model.identity import file_identity

_NOT_COPIED = "the model cannot be copied"


class ModelCopy:
    """Writes the files of a model to a folder, which appears when `finish` is called.

    It holds a lock until it is closed. Methods raise FileError, NoSpaceError, LockedError.
    """

    def __init__(self, folder: Path, n_bytes: int) -> None:
        """Begin a copy of `n_bytes`. What an earlier copy left unfinished is removed."""
        self._folder = folder
        # A fixed name, so that the next copy replaces what a kill leaves behind.
        self._temporary = folder.with_name(f".{folder.name}.part")
        self._name = ""
        self._file: BinaryIO | None = None
        self._digest = blake2b()
        self._stack = ExitStack()
        with file_errors(_NOT_COPIED, folder):
            durable.make_folders(folder.parent)
            self._stack.enter_context(durable.locked(folder))
            try:
                shutil.rmtree(self._temporary, ignore_errors=True)
                durable.require_space(folder.parent, n_bytes, "free some space on this node")
                self._temporary.mkdir()
            except BaseException:
                self._stack.close()
                raise

    def write(self, name: str, content: bytes) -> None:
        """Append to the file `name`. Files must be written one after the other."""
        with file_errors(_NOT_COPIED, self._folder):
            if name != self._name or self._file is None:
                self._end_file()
                self._name, self._file = name, (self._temporary / name).open("xb")
            self._file.write(content)
            self._digest.update(content)

    def finish(self, name: str, identity: str, digest: str) -> None:
        """Verify and publish the copy of the model whose first file is `name`. FormatError if it differs.

        `identity` is the model's `file_identity`, `digest` the BLAKE2b digest of all bytes.
        """
        with file_errors(_NOT_COPIED, self._folder):
            self._end_file()
            durable.sync_folder(self._temporary)
            written = file_identity(self._temporary / name)
            if written != identity or self._digest.hexdigest() != digest:
                raise FormatError("the copy of the model is not equal to it", where=self._folder)
            # A folder that exists has another content: otherwise there would be no copy.
            shutil.rmtree(self._folder, ignore_errors=True)
            durable.replace(self._temporary, self._folder)
        self.close()

    def close(self) -> None:
        """Remove a copy that is not finished, and release the lock."""
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._stack.close()

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            durable.sync(self._file.fileno())
            self._file.close()
            self._file = None
