"""An unfinished output: hidden files beside the final names, and the journal that makes it resumable.

The output NAME is written as `.NAME.part`, or as several hidden files if it is split. Line 1 of the journal
is the fingerprint of the run. Each further line names a tensor that is complete and synced. The last line,
which is written before the renames, holds the inodes of the files. `output` fills the files.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Listener, Note
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import Tensor
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_local.model.gguf_writer import GgufPlan, write_at
from dsmoe_local.model.split_name import SplitName, model_stem

JOURNAL_VERSION = 2


def journal_of(out: Path) -> Path:
    """Return the path of the journal of an unfinished `out`."""
    return out.with_name(f".{out.name}.part.journal")


def final_paths(out: Path, n_files: int) -> list[Path]:
    """Return the names of an output's files: `out`, or those of a split model with its name."""
    return [out] if n_files == 1 else SplitName(out.parent, model_stem(out), 1, n_files).paths


def existing_splits(out: Path) -> list[Path]:
    """Return the existing files of split models that have the name of `out`."""
    names = out.parent.glob(f"{glob.escape(model_stem(out))}-*-of-*.gguf")
    splits = sorted((path, SplitName.of(path)) for path in names)
    return [path for path, split in splits if split and split.name == model_stem(out)]


def unfinished_files(out: Path) -> list[Path]:
    """Return the hidden files of an unfinished `out`."""
    split = out.parent.glob(f"{glob.escape(f'.{out.name}')}.*-of-*.part")
    return [path for path in (out.with_name(f".{out.name}.part"), *split) if os.path.lexists(path)]


def exists_error(out: Path) -> FileError:
    """Return the error for an output that exists already."""
    return FileError("the output exists already", where=out, remedy="--force replaces it")


@dataclass(slots=True)
class _File:
    """One file of the output. It begins at `start` in the sequence of all files."""

    final: Path
    hidden: Path
    plan: GgufPlan
    start: int
    descriptor: int = -1
    inode: int | None = None

    def is_final(self) -> bool:
        """True if the final name is that of this file, not of another."""
        return _inode(self.final) == self.inode


class UnfinishedOutput:
    """The hidden files and the journal of one output. Use as a context manager while holding its lock.

    `publish` completes the output. `done` names the tensors that an earlier run finished; `is_verified` is
    True if that run had verified all files and begun to rename them.

    `offsets` has the position of each tensor in the sequence of all files.
    """

    def __init__(
        self,
        out: Path,
        plans: Sequence[GgufPlan],
        fingerprint: Mapping[str, object],
        listen: Listener,
        force: bool,
    ) -> None:
        self.out = out
        self.journal_path = journal_of(out)
        self.done: frozenset[str] = frozenset()
        self.is_verified = False
        self.size = 0
        self.offsets: dict[str, int] = {}
        self._files: list[_File] = []
        for final, plan in zip(final_paths(out, len(plans)), plans, strict=True):
            self._files.append(_File(final, self._hidden(final), plan, self.size))
            self.offsets |= {name: self.size + offset for name, offset in plan.offsets.items()}
            self.size += plan.size
        self._force = force
        self._listen = listen
        values = {
            "journal": JOURNAL_VERSION,
            "size": self.size,
            "metadata": hashlib.sha256(b"".join(plan.header for plan in plans)).hexdigest(),
            **fingerprint,
        }
        # Converted as by the journal, which would return a tuple as a list.
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(values))
        self.journal: durable.Journal
        self._open = ExitStack()

    def _hidden(self, final: Path) -> Path:
        split = SplitName.of(final)
        if final == self.out or split is None:
            return self.out.with_name(f".{self.out.name}.part")
        return self.out.with_name(f".{self.out.name}.{split.number:05}-of-{split.count:05}.part")

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            self._open = opening
            found = self._journal_of_earlier_run()
            self.is_verified = found is not None and self._was_verified(found)
            self._refuse_existing()
            if not self.is_verified:
                if found and self._continues(found):
                    self._resume()
                else:
                    self._start_over()
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def path(self) -> Path:
        """The name of the output, or of its first file."""
        return self._files[0].final

    def write(self, data: memoryview, position: int) -> None:
        """Write bytes of one tensor at a position in the sequence of all files. Raises OSError."""
        file = self._files[bisect_right(self._files, position, key=lambda file: file.start) - 1]
        write_at(file.descriptor, data, position - file.start)

    def sync(self) -> None:
        """Sync all files. Raises OSError."""
        for file in self._files:
            durable.sync(file.descriptor)

    def publish(self, tensors: Sequence[Tensor]) -> None:
        """Verify the synced files, give them their final names, and remove the journal.

        The first file of a split output, which is named to load it, gets its name last.
        """
        if not self.is_verified:
            self._verify(tensors)
            reach("output.verified")
            self._refuse_existing()
            for file in self._files:
                file.inode = os.fstat(file.descriptor).st_ino
            self.journal.append({"inodes": [file.inode for file in self._files]})
        first, *others = self._files
        if others:
            if not first.is_final():
                # With the file of an older output in its place, the others would look complete.
                first.final.unlink(missing_ok=True)
                durable.sync_folder(self.out.parent)
            for file in others:
                if not file.is_final():
                    file.hidden.replace(file.final)
                reach("split.renamed")
            durable.sync_folder(self.out.parent)
        if not first.is_final():
            durable.replace(first.hidden, first.final)
        reach("output.renamed")
        self.journal_path.unlink()
        durable.sync_folder(self.out.parent)

    def discard(self) -> None:
        """Remove hidden files and journal, after an error that makes them useless to a later run."""
        self.journal_path.unlink(missing_ok=True)
        for path in unfinished_files(self.out):
            path.unlink(missing_ok=True)

    def _journal_of_earlier_run(self) -> durable.Journal | None:
        """Open the journal that an interrupted run left; None if there is none or it is damaged."""
        if not self.journal_path.exists():
            return None
        try:
            return self._open_journal()
        except FileError:
            self._note("starting over: the journal of the interrupted run is damaged")
            return None

    def _open_journal(self) -> durable.Journal:
        self.journal = self._open.enter_context(durable.Journal(self.journal_path))
        return self.journal

    def _open_files(self, flags: int) -> None:
        for file in self._files:
            file.descriptor = os.open(file.hidden, os.O_RDWR | flags, 0o666)
            self._open.callback(os.close, file.descriptor)

    def _was_verified(self, journal: durable.Journal) -> bool:
        """True if an earlier run with the same fingerprint was killed after it had verified all files."""
        entries = journal.entries
        if len(entries) < 2 or entries[0] != self._fingerprint or not isinstance(entries[-1], dict):
            return False
        inodes = entries[-1].get("inodes")
        if not isinstance(inodes, list) or len(inodes) != len(self._files):
            return False
        for file, inode in zip(self._files, inodes, strict=True):
            if inode not in (_inode(file.hidden), _inode(file.final)):
                return False
        for file, inode in zip(self._files, inodes, strict=True):
            file.inode = inode
        return True

    def _continues(self, journal: durable.Journal) -> bool:
        """True if the hidden files can be completed by this run. Tell the user why if they cannot."""
        if not journal.entries:
            return False
        changed = self._changes(journal.entries[0])
        if changed:
            self._note(f"starting over: changed since the interrupted run: {', '.join(changed)}")
            return False
        whole = all(
            file.hidden.exists() and file.hidden.stat().st_size == file.plan.size for file in self._files
        )
        if not whole:
            self._note("starting over: the unfinished file is gone")
        return whole

    def _changes(self, earlier: Any) -> list[str]:  # noqa: ANN401 - whatever the journal holds
        if not isinstance(earlier, dict):
            return ["the journal's format"]
        names = [name for name in self._fingerprint if earlier.get(name) != self._fingerprint[name]]
        # Header and size follow from the rest, so they are named only if nothing else has changed.
        return [name for name in names if name not in ("size", "metadata")] or names

    def _resume(self) -> None:
        self.done = frozenset(name for name in self.journal.entries[1:] if isinstance(name, str))
        self._open_files(0)
        n_held = sum(os.fstat(file.descriptor).st_blocks * 512 for file in self._files)
        durable.require_space(self.out.parent, self.size - n_held)
        self._write_headers()
        self._note(f"continuing an interrupted run: {len(self.done)} of {len(self.offsets)} tensors are done")

    def _start_over(self) -> None:
        # The old journal must be durably gone before the files that it describes are removed.
        self.journal_path.unlink(missing_ok=True)
        durable.sync_folder(self.out.parent)
        self.discard()
        durable.require_space(self.out.parent, self.size)
        self._open_files(os.O_CREAT | os.O_EXCL)
        for file in self._files:
            os.ftruncate(file.descriptor, file.plan.size)
        self._open_journal()
        reach("output.created")
        self.journal.append(self._fingerprint)
        durable.sync_folder(self.out.parent)
        self._write_headers()
        reach("output.header")

    def _write_headers(self) -> None:
        for file in self._files:
            write_at(file.descriptor, file.plan.header, 0)

    def _refuse_existing(self) -> None:
        """Raise FileError if the output exists and may not be replaced."""
        for file in self._files:
            if file.final.exists() and not (file.is_final() or self._force):
                raise exists_error(file.final)
        # They would not be replaced, but remain as a second model of this name.
        finals = [file.final for file in self._files]
        others = [path for path in existing_splits(self.out) if path not in finals] if finals[1:] else []
        if others:
            raise FileError(
                "the name has a model that is split into another number of files",
                where=others[0],
                remedy="remove its files, or name another output",
            )

    def _verify(self, tensors: Sequence[Tensor]) -> None:
        """Compare what the strict reader finds in the files with the plan."""
        found = [
            (tensor.name, tensor.shape, tensor.type, file.start + tensor.offset)
            for file in self._files
            for tensor in read_gguf(file.hidden).tensors.values()
        ]
        if found != [(t.name, t.shape, t.type, self.offsets[t.name]) for t in tensors]:
            raise FileError(
                "the written file differs from the plan",
                where=self._files[0].hidden,
                remedy="the disk may be failing; remove the file and try again",
            )

    def _note(self, text: str) -> None:
        self._listen(Note(safe_line(text)))


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
