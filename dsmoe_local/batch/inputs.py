"""Open the inputs of a batch: files, URLs and standard input, with lines of text or rows of Parquet.

Lines are read again while the batch runs, in another order. So the rows of a Parquet file, and the content at
a URL, are copied to unnamed temporary files in the folder of the output.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, cast

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.progress import Listener
from dsmoe_local.batch.input_form import InputForm
from dsmoe_local.batch.parquet_input import is_parquet, write_rows
from dsmoe_local.batch.sources import Source, Sources, reading
from dsmoe_local.batch.spool import Spool
from dsmoe_local.batch.urls import Url, download, expand

STDIN = Path("-")
_N_BEGINNING = 64
_WEB_PAGE = (b"<!doctype html", b"<html")


@contextmanager
def opened(
    named: Sequence[Path | Url],
    form: InputForm,
    spool: Spool | None,
    folder: Path,
    listen: Listener,
    stop: threading.Event,
    output: Url | None = None,
) -> Iterator[Sources]:
    """Open inputs until the block ends. `spool` has the content of standard input.

    `output` is not an input even if a pattern matches it. Temporary files are in `folder`. Raises UsageError,
    FileError, FormatError, MissingExtraError, InterruptedRunError.
    """
    with ExitStack() as stack:
        opener = _Opener(form, folder, stack, listen, stop)
        names = [
            name
            for location in named
            for name in (expand(location, output, stop) if isinstance(location, Url) else [location])
        ]
        sources = []
        for name in names:
            source = spool.source(form) if spool is not None and name == STDIN else opener.source(name)
            sources.append(stack.enter_context(closing(source)))
        yield Sources(sources)


class _Opener:
    """Opens inputs. `stack` closes the temporary files."""

    def __init__(
        self, form: InputForm, folder: Path, stack: ExitStack, listen: Listener, stop: threading.Event
    ) -> None:
        self._form = form
        self._folder = folder
        self._stack = stack
        self._listen = listen
        self._stop = stop

    def source(self, name: Path | Url) -> Source:
        """Open a file or a URL."""
        return self._of_file(name) if isinstance(name, Path) else self._of_url(name)

    def _of_file(self, path: Path) -> Source:
        with reading(str(path)), path.open("rb") as file:
            if is_parquet(path, file.read(_N_BEGINNING)):
                return self._of_rows(path, file, str(path))
        return Source(path, self._form)

    def _of_url(self, url: Url) -> Source:
        path = Path(url.name)
        copy = self._temporary()
        download(url, copy, self._folder, self._listen, self._stop)
        copy.seek(0)
        beginning = copy.read(_N_BEGINNING)
        if beginning.lstrip().lower().startswith(_WEB_PAGE):
            raise FormatError(
                "the URL leads to a web page, not to a file",
                where=str(url),
                remedy="use the address of the file itself; on huggingface.co: …/resolve/main/…",
            )
        if is_parquet(path, beginning):
            source = self._of_rows(path, copy, str(url))
            copy.close()  # it may be large
            return source
        return Source(path, self._form, str(url), file=copy)

    def _of_rows(self, path: Path, file: BinaryIO, shown: str) -> Source:
        lines = self._temporary()
        with reading(shown):
            write_rows(file, shown, self._form, lines, self._listen, self._stop)
        return Source(path, self._form, shown, file=lines, unit="row")

    def _temporary(self) -> BinaryIO:
        with reading("a temporary file"):
            return self._stack.enter_context(cast(BinaryIO, TemporaryFile(dir=self._folder)))
