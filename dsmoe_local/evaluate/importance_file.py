"""Where an importance matrix is to be, and the part of it that an interrupted run has left. Collects nothing.

The part is an importance matrix itself, of the windows read so far: `.NAME.part` beside the file. The last
part becomes the file by its renaming.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base import durable
from dsmoe_local.base.errors import DsmoeError, FileError
from dsmoe_local.base.faults import reach
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.imatrix_file import read_imatrix, write_imatrix


@dataclass(frozen=True, slots=True)
class ImportanceFile:
    """The right to write `out`, for one run at a time."""

    out: Path

    @property
    def part(self) -> Path:
        """What an interrupted run leaves."""
        return self.out.with_name(f".{self.out.name}.part")

    def resume(self, about: Mapping[str, object]) -> tuple[Imatrix | None, list[str]]:
        """The part of an earlier run whose `run` agrees with `about` in all that this names, and else the
        names of what differs.
        """
        if not self.part.exists():
            return None, []
        try:
            found = read_imatrix(self.part)
        except DsmoeError:
            return None, ["the part is damaged"]
        changed = [name for name, value in about.items() if found.run.get(name) != value]
        return (None, changed) if changed else (found, [])

    def save(self, imatrix: Imatrix) -> None:
        """Make this the part, durably. FileError."""
        try:
            write_imatrix(imatrix, self.part, lambda: reach("imatrix.written"))
            reach("imatrix.saved")
        except OSError as error:
            raise FileError(
                f"the importance matrix cannot be written: {error.strerror}", where=self.out
            ) from error

    def publish(self) -> None:
        """Give the part its final name. FileError."""
        try:
            reach("imatrix.complete")
            durable.replace(self.part, self.out)
        except OSError as error:
            raise FileError(
                f"the importance matrix cannot get its name: {error.strerror}", where=self.out
            ) from error


@contextmanager
def importance_file(out: Path, *, force: bool = False) -> Iterator[ImportanceFile]:
    """Hold the right to write `out`. FileError if it exists, without `force`, or its folder does not;
    LockedError while another run has it.
    """
    if not out.absolute().parent.is_dir():
        raise FileError("the output's folder does not exist", where=out.parent, remedy="create it first")
    if out.is_dir():
        raise FileError("the output is a folder", where=out, remedy="name a file in it with -o")
    if out.exists() and not (force and out.is_file()):
        raise FileError(
            "the output exists already", where=out, remedy="name another with -o, or replace it with --force"
        )
    with ExitStack() as held:
        try:
            held.enter_context(durable.locked(out.absolute()))
        except OSError as error:
            raise FileError(f"the output cannot be written: {error.strerror}", where=out) from error
        yield ImportanceFile(out.absolute())
