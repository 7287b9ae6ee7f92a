"""Input files as spans that can be read again: JSON lines, plain lines, CSV. Lines mean nothing here yet."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_local.base.content import refuse_other_kinds
from dsmoe_local.base.errors import FileError, FormatError, UsageError
from dsmoe_local.base.text import count
from dsmoe_local.batch import lines
from dsmoe_local.batch.lines import Line, LineError, decoded, field_of, id_of, strict_object
from dsmoe_local.batch.requests import without_foreign
from dsmoe_local.batch.template import LineTemplate

_BOM = b"\xef\xbb\xbf"
_SAMPLE = 1 << 16
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_CSV_FAULTS = {
    "unexpected end of data": "a quote is not closed, so that the rows behind it belong to its cell",
    "field larger than field limit": "a cell is too long; is a quote not closed?",
    "new-line character seen": "a carriage return outside of quotes",
    "expected after": "text behind the closing quote of a cell; is a quote not doubled?",
}


@dataclass(frozen=True, slots=True)
class InputForm:
    """How lines become prompts: `text` takes each as it is, `template` fills one from its fields; `chat`
    makes them a user's message. Neither: lines are requests.

    `id_field` is the field that holds a line's id (None: `id` or `custom_id`), `keep` the fields that its
    record carries along.
    """

    text: bool = False
    template: LineTemplate | None = None
    chat: bool = False
    id_field: str | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.chat and not (self.text or self.template):
            raise UsageError(
                "--chat is for --text and --template", remedy='without them, write {"messages": …} lines'
            )
        if self.text and (self.keep or self.id_field is not None):
            flag = "--keep" if self.keep else "--id-field"
            raise UsageError(f"{flag} is for lines with fields", remedy="leave out --text")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the options name, those of the template first."""
        own = (*self.keep, *([self.id_field] if self.id_field is not None else []))
        return (*(self.template.fields if self.template else ()), *own)


@dataclass(frozen=True, slots=True)
class Span:
    """Where one line (of CSV: one row) lies. `number` counts lines from 1."""

    number: int
    offset: int
    length: int


class Source:
    """An input file, called `shown` in messages, or only its first `n_bytes`. Lines are decoded one at a
    time: it may be of any size. Raises UsageError, FileError, FormatError if it is no text.
    """

    def __init__(self, path: Path, form: InputForm, shown: str = "", n_bytes: int | None = None) -> None:
        self.shown = shown or str(path)
        self._form = form
        self._delimiter = None if form.text else _DELIMITERS.get(path.suffix.lower())
        if self._delimiter and form.template is None:
            raise UsageError("CSV needs a template", remedy="add --template '…{column}…'")
        self._columns: list[str] = []
        with self._reading():
            self._file = path.open("rb")
            self.n_bytes = os.fstat(self._file.fileno()).st_size if n_bytes is None else n_bytes
            try:
                _check_text(self._file.read(_SAMPLE), self.shown)
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
            found = self._rows() if self._delimiter else self._raw_lines()
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
        kept: Mapping[str, Any] = dict.fromkeys(self._form.keep)
        name = f"line-{number}"
        try:
            values = self._values(raw)
            kept = {field: field_of(values, field) for field in self._form.keep}
            name = id_of(number, values, self._form.id_field)
            return Line(number, name, self._request_values(values), kept=kept)
        except LineError as error:
            return Line(number, name, {}, error, kept)

    def _values(self, raw: bytes) -> Mapping[str, Any]:
        """The fields of a line."""
        if len(raw) > lines.MAX_LINE:
            raise LineError(f"the line is longer than {lines.MAX_LINE >> 20} MiB", kind="too_long")
        if self._form.text:
            return {"text": decoded(raw)}
        return self._row_values(raw) if self._delimiter else strict_object(raw)

    def _request_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of the request that a line makes."""
        form = self._form
        if form.template is None and not form.text:
            return without_foreign(values, form.fields)
        prompt = values["text"] if form.template is None else form.template.fill(values)
        return {"messages": [{"role": "user", "content": prompt}]} if form.chat else {"prompt": prompt}

    def _read_header(self) -> list[str]:
        # A field may be as long as a line; the limit of the csv module is the process's.
        csv.field_size_limit(lines.MAX_LINE)
        first = next(self._rows(), None)
        try:
            names = [] if first is None else self._row(first[1])
        except LineError as error:
            raise FormatError(f"the header is {error.what}", where=f"{self.shown}, line 1") from error
        missing = [name for name in self._form.fields if name not in names]
        twice = [name for name, n in Counter(names).items() if n > 1]
        if missing or twice:
            fault = f"no column {missing[0]!r}" if missing else f"the column {twice[0]!r} twice"
            raise FormatError(
                f"the input has {fault}",
                where=self.shown,
                remedy=f"its columns are {', '.join(names)}" if names else "it is empty",
            )
        return names

    def _row_values(self, raw: bytes) -> dict[str, Any]:
        cells = self._row(raw)
        if len(cells) != len(self._columns):
            raise LineError(
                f"the row has {count(len(cells), 'cell')}, the header {len(self._columns)}", kind="not_csv"
            )
        return dict(zip(self._columns, cells, strict=True))

    def _row(self, raw: bytes) -> list[str]:
        # newline="\n": a row ends where the scan saw it end, whatever else its cells hold.
        text = io.StringIO(decoded(raw), newline="\n")
        try:
            return next(csv.reader(text, delimiter=self._delimiter or ",", strict=True), [])
        except csv.Error as error:
            fault = next((words for part, words in _CSV_FAULTS.items() if part in str(error)), str(error))
            raise LineError(f"not CSV: {fault}", kind="not_csv") from error

    def _rows(self) -> Iterator[tuple[Span, bytes]]:
        """Rows of CSV, header included; cells in quotes may hold line breaks."""
        # Of a row's lines, the first one's place and all bytes: where a quote is not closed they are many.
        begun: list[Span] = []
        raw = bytearray()

        def texts() -> Iterator[str]:
            for span, part in self._raw_lines():
                if not begun:
                    begun.append(span)
                raw.extend(part)
                yield part.decode("utf-8", "surrogateescape")

        reader = csv.reader(texts(), delimiter=self._delimiter or ",", strict=True)
        while True:
            begun.clear()
            raw.clear()
            try:
                next(reader)
            except StopIteration:
                return
            except csv.Error:
                # The row's own reading tells what is wrong with it.
                if not begun:
                    return
            yield Span(begun[0].number, begun[0].offset, len(raw)), bytes(raw)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(f"the input cannot be read: {error.strerror}", where=self.shown) from error

    def _raw_lines(self) -> Iterator[tuple[Span, bytes]]:
        """Lines split at b"\\n" alone."""
        self._file.seek(0)
        offset, number = 0, 0

        def readline(limit: int, begin: int) -> bytes:
            return self._file.readline(min(limit, self.n_bytes - begin))

        while raw := readline(lines.MAX_LINE + 1, offset):
            number += 1
            end = offset + len(raw)
            if len(raw) > lines.MAX_LINE:
                # What is kept is too long to be valid; the rest of the line is passed over.
                rest = raw
                while rest and not rest.endswith(b"\n"):
                    rest = readline(lines.MAX_LINE, end)
                    end += len(rest)
            n_skipped = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
            yield Span(number, offset + n_skipped, len(raw) - n_skipped), raw[n_skipped:]
            offset = end


def _check_text(sample: bytes, shown: str) -> None:
    """FormatError if a file that begins so is no text."""
    refuse_other_kinds(sample, "the input", shown)
    if b"\0" in sample:
        raise FormatError(
            "the input is a binary file, not text",
            where=f"{shown}, a zero byte at {sample.index(0) + 1:,}",
            remedy="it takes JSONL, CSV, or lines of text with --text",
        )
