"""Files that people ask for by name, written as a whole: exports, pictures. Knows no format."""

from __future__ import annotations

from pathlib import Path

from dsmoe_local.base.durable import write_file
from dsmoe_local.base.errors import FileError
from dsmoe_local.base.text import safe_line


def write_output(path: Path, content: str, what: str) -> None:
    """Write a file that only its owner can read, in place of what is there. FileError, which calls it `what`,
    if it cannot be.
    """
    try:
        # Through links: the file that a link leads to is replaced, not the link.
        final = path.resolve()
        if final.exists() and not final.is_file():
            raise FileError("this is no ordinary file", where=safe_line(str(path)))
        write_file(final, content.encode(), 0o600)
    except (OSError, ValueError, RuntimeError) as error:
        # Beside what the system says: a NUL in the name, a circle of links.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FileError(f"{what} cannot be written: {reason}", where=safe_line(str(path))) from error
