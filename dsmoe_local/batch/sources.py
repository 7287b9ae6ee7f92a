"""Input files as spans that can be read again: JSON lines, plain lines, CSV. Lines mean nothing here yet."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dsmoe_local.base.errors import FileError, FormatError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.batch import lines
from dsmoe_local.batch.lines import Line, LineError, decoded, named_line, strict_object
from dsmoe_local.batch.template import LineTemplate

_BOM = b"\xef\xbb\xbf"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, slots=True)
class InputForm:
    """How lines become prompts: `text` takes each as it is, `template` fills one from its fields; `chat`
    makes them a user's message. Neither: lines are requests.
    """

    text: bool = False
    template: LineTemplate | None = None
    chat: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """Where one line (of CSV: one row) lies. `number` counts lines from 1."""

    number: int
    offset: int
    length: int


class Source:
    """An input file, called `shown` in messages. Lines are decoded one at a time: it may be of any size.
    Raises FileError.
    """

    def __init__(self, path: Path, form: InputForm, shown: str = "") -> None:
        self.shown = shown or str(path)
        self._form = form
        self._delimiter = None if form.text else _DELIMITERS.get(path.suffix.lower())
        if form.chat and not (form.text or form.template):
            raise UsageError("--chat is for --text and --template", remedy='write {"messages": …} lines')
        if self._delimiter and form.template is None:
            raise UsageError("CSV needs a template", remedy="add --template '…{column}…'")
        self._columns: list[str] = []
        with self._reading():
            self._file = path.open("rb")
            self.n_bytes = os.fstat(self._file.fileno()).st_size
            try:
                if self._delimiter:
                    self._columns = self._read_header()
            except BaseException:
                self._file.close()
                raise

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def spans(self) -> Iterator[tuple[Span, bytes]]:
        """Every line that is not empty, in order, with its bytes."""
        with self._reading():
            self._file.seek(0)
            found = self._rows() if self._delimiter else _raw_lines(self._file)
            header = bool(self._delimiter)
            for span, raw in found:
                if header:
                    header = False
                elif raw.strip():
                    yield span, raw

    def read(self, span: Span) -> bytes:
        """The bytes of one line."""
        with self._reading():
            self._file.seek(span.offset)
            return self._file.read(span.length)

    def line(self, number: int, raw: bytes) -> Line:
        """What a line says; a mistake in it is its `error`."""
        try:
            if len(raw) > lines.MAX_LINE:
                raise LineError(f"the line is longer than {lines.MAX_LINE >> 20} MiB")
            return self._parse(number, raw)
        except LineError as error:
            return Line(number, f"line-{number}", {}, error)

    def _parse(self, number: int, raw: bytes) -> Line:
        if self._form.text:
            values: Mapping[str, Any] = {"text": decoded(raw).rstrip("\r\n")}
        elif self._delimiter:
            values = self._row_values(raw)
        else:
            values = strict_object(raw)
        line = named_line(number, values)
        template = self._form.template
        if template is None and not self._form.text:
            return line
        try:
            prompt = values["text"] if template is None else template.fill(values)
        except LineError as error:
            return Line(number, line.id, {}, error)
        if self._form.chat:
            return Line(number, line.id, {"messages": [{"role": "user", "content": prompt}]})
        return Line(number, line.id, {"prompt": prompt})

    def _read_header(self) -> list[str]:
        # A field may be as long as a line; the limit of the csv module is the process's.
        csv.field_size_limit(lines.MAX_LINE)
        first = next(self._rows(), None)
        names = [] if first is None else self._row(first[1])
        wanted = self._form.template.fields if self._form.template else ()
        missing = [name for name in wanted if name not in names]
        if missing or len(set(names)) != len(names):
            fault = f"has no column {safe_line(missing[0], 40)!r}" if missing else "has a column twice"
            raise FormatError(
                f"the input {fault}",
                where=self.shown,
                remedy=f"its columns are {', '.join(names)}" if names else "it is empty",
            )
        return names

    def _row_values(self, raw: bytes) -> dict[str, Any]:
        cells = self._row(raw)
        if len(cells) != len(self._columns):
            raise LineError(f"the row has {len(cells)} fields, the header {len(self._columns)}")
        return dict(zip(self._columns, cells, strict=True))

    def _row(self, raw: bytes) -> list[str]:
        # newline="\n": a row ends where the scan saw it end, whatever else its cells hold.
        text = io.StringIO(decoded(raw), newline="\n")
        try:
            return next(csv.reader(text, delimiter=self._delimiter or ",", strict=True), [])
        except csv.Error as error:
            raise LineError(f"not CSV: {error}") from error

    def _rows(self) -> Iterator[tuple[Span, bytes]]:
        """Rows of CSV, header included; cells in quotes may hold line breaks."""
        parts: list[tuple[Span, bytes]] = []

        def texts() -> Iterator[str]:
            for part in _raw_lines(self._file):
                parts.append(part)
                yield part[1].decode("utf-8", "surrogateescape")

        reader = csv.reader(texts(), delimiter=self._delimiter or ",", strict=True)
        while True:
            parts.clear()
            try:
                next(reader)
            except StopIteration:
                return
            except csv.Error:
                # The row's own reading tells what is wrong with it.
                if not parts:
                    return
            first = parts[0][0]
            raw = b"".join(part for _, part in parts)
            yield Span(first.number, first.offset, len(raw)), raw

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(f"the input cannot be read: {error.strerror}", where=self.shown) from error


def _raw_lines(file: BinaryIO) -> Iterator[tuple[Span, bytes]]:
    """Lines split at b"\\n" alone."""
    offset, number = 0, 0
    readline: Callable[[int], bytes] = file.readline
    while raw := readline(lines.MAX_LINE + 1):
        number += 1
        n_read = len(raw)
        if len(raw) > lines.MAX_LINE:
            # What is kept is too long to be valid; the rest of the line is passed over.
            rest = raw
            while rest and not rest.endswith(b"\n"):
                rest = readline(lines.MAX_LINE)
                n_read += len(rest)
        n_skipped = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
        yield Span(number, offset + n_skipped, len(raw) - n_skipped), raw[n_skipped:]
        offset += n_read
