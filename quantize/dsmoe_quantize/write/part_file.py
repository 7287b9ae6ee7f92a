"""An unfinished output, `.NAME.part` beside the final name, and the journal that makes it resumable.

Line 1 of the journal is the fingerprint of the run. Each further line names a tensor that is complete and
synced. The last line, written before the rename, holds the file's inode. `output` fills the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Listener, Note
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import Tensor
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_local.model.gguf_writer import GgufPlan, write_at

JOURNAL_VERSION = 1


def journal_of(out: Path) -> Path:
    """Return the path of the journal of an unfinished `out`."""
    return out.with_name(f".{out.name}.part.journal")


def exists_error(out: Path) -> FileError:
    """Return the error for an output that exists already."""
    return FileError("the output exists already", where=out, remedy="--force replaces it")


class PartFile:
    """The temp file and journal of one output. Use as a context manager while holding the output's lock.

    `publish` completes the output. `done` names the tensors that an earlier run finished; `published` is True
    if that run had already renamed the file.
    """

    def __init__(
        self, out: Path, plan: GgufPlan, fingerprint: Mapping[str, object], listen: Listener, force: bool
    ) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.part")
        self.journal_path = journal_of(out)
        self.done: frozenset[str] = frozenset()
        self.published = False
        self._plan = plan
        self._force = force
        self._listen = listen
        values = {
            "journal": JOURNAL_VERSION,
            "size": plan.size,
            "metadata": hashlib.sha256(plan.header).hexdigest(),
            **fingerprint,
        }
        # Converted as by the journal, which would return a tuple as a list.
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(values))
        self.descriptor = -1
        self.journal: durable.Journal
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            self._open = opening
            found = self._journal_of_earlier_run()
            self.published = found is not None and self._was_published(found)
            if not self.published:
                self._refuse_existing()
                if found and self._continues(found):
                    self._resume()
                else:
                    self._start_over()
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def publish(self, tensors: Sequence[Tensor]) -> None:
        """Verify the synced file, give it its final name, and remove the journal."""
        if not self.published:
            self._verify(tensors)
            reach("output.verified")
            self._refuse_existing()
            self.journal.append({"inode": os.fstat(self.descriptor).st_ino})
            durable.replace(self.path, self.out)
            reach("output.renamed")
        self.journal_path.unlink()
        durable.sync_folder(self.out.parent)

    def discard(self) -> None:
        """Remove temp file and journal, after an error that makes them useless to a later run."""
        self.journal_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

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

    def _open_file(self, flags: int) -> None:
        self.descriptor = os.open(self.path, os.O_RDWR | flags, 0o666)
        self._open.callback(os.close, self.descriptor)

    def _was_published(self, journal: durable.Journal) -> bool:
        """True if an earlier run with the same fingerprint was killed between its rename and its end."""
        entries = journal.entries
        if len(entries) < 2 or entries[0] != self._fingerprint or not isinstance(entries[-1], dict):
            return False
        try:
            return not self.path.exists() and self.out.stat().st_ino == entries[-1].get("inode")
        except FileNotFoundError:
            return False

    def _continues(self, journal: durable.Journal) -> bool:
        """True if the temp file can be completed by this run. Tell the user why if it cannot."""
        if not journal.entries:
            return False
        changed = self._changes(journal.entries[0])
        if changed:
            self._note(f"starting over: changed since the interrupted run: {', '.join(changed)}")
            return False
        try:
            whole = self.path.stat().st_size == self._plan.size
        except FileNotFoundError:
            whole = False
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
        self._open_file(0)
        n_held = os.fstat(self.descriptor).st_blocks * 512
        durable.require_space(self.out.parent, self._plan.size - n_held)
        write_at(self.descriptor, self._plan.header, 0)
        self._note(
            f"continuing an interrupted run: {len(self.done)} of {len(self._plan.offsets)} tensors are done"
        )

    def _start_over(self) -> None:
        # The old journal must be durably gone before the file that it describes is removed.
        self.journal_path.unlink(missing_ok=True)
        durable.sync_folder(self.out.parent)
        self.path.unlink(missing_ok=True)
        durable.require_space(self.out.parent, self._plan.size)
        self._open_file(os.O_CREAT | os.O_EXCL)
        os.ftruncate(self.descriptor, self._plan.size)
        self._open_journal()
        reach("output.created")
        self.journal.append(self._fingerprint)
        durable.sync_folder(self.out.parent)
        write_at(self.descriptor, self._plan.header, 0)
        reach("output.header")

    def _refuse_existing(self) -> None:
        if self.out.exists() and not self._force:
            raise exists_error(self.out)

    def _verify(self, tensors: Sequence[Tensor]) -> None:
        """Compare what the strict reader finds in the file with the plan."""
        found = read_gguf(self.path)
        expected = [(t.name, t.shape, t.type, self._plan.offsets[t.name]) for t in tensors]
        if [(t.name, t.shape, t.type, t.offset) for t in found.tensors.values()] != expected:
            raise FileError(
                "the written file differs from the plan",
                where=self.path,
                remedy="the disk may be failing; remove the file and try again",
            )

    def _note(self, text: str) -> None:
        self._listen(Note(safe_line(text)))
