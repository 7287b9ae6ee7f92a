"""Read the inputs of a batch: JSON lines, plain lines or CSV, one at a time, and again by offset."""

from __future__ import annotations

import csv
import errno
import io
import os
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Self

from dsmoe_local.base.errors import FileError, FormatError, NoSpaceError, UsageError
from dsmoe_local.base.text import count
from dsmoe_local.base.text_files import refuse_other_kinds
from dsmoe_local.batch import lines
from dsmoe_local.batch.input_form import InputForm
from dsmoe_local.batch.lines import Line, field_of, id_of, key_of
from dsmoe_local.batch.requests import request_values
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.strict_json import decoded, strict_object

_BOM = b"\xef\xbb\xbf"
_SAMPLE = 1 << 16
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Parts of the csv module's messages, and the messages shown instead.
_CSV_FAULTS = {
    "unexpected end of data": "a quote is not closed, so that the rows after it belong to its cell",
    "field larger than field limit": "a cell is too long; is a quote not closed?",
    "new-line character seen": "a carriage return outside of quotes",
    "expected after": "text after the closing quote of a cell; is a quote not doubled?",
}


@dataclass(frozen=True, slots=True)
class Span:
    """The place of a line, or of a row of CSV: offset and length in bytes. `number` counts lines from 1."""

    number: int
    offset: int
    length: int


class Source:
    """An input file of any size; lines are decoded one at a time."""

    def __init__(
        self,
        path: Path,
        form: InputForm,
        shown: str = "",
        n_bytes: int | None = None,
        *,
        file: BinaryIO | None = None,
        unit: str = "line",
    ) -> None:
        """Open the file and check its kind. Raises UsageError, FileError, or FormatError if it is not text.

        `shown` is its name in messages. `n_bytes` limits what is read of it. `file` has its content if there
        is none at `path`. `unit` is what a line was in the user's input: a line or a row.
        """
        self.shown = shown or str(path)
        self.unit = unit
        # Not the name of `path`: the copy of standard input has two.
        self._name = Path(self.shown).name
        self._is_only = True
        self._form = form
        self._delimiter = None if form.text else _DELIMITERS.get(path.suffix.lower())
        if self._delimiter and form.template is None:
            raise UsageError("CSV needs a template", remedy="add --template '…{column}…'")
        with reading(self.shown):
            self._file = file or path.open("rb")
            self.n_bytes = os.fstat(self._file.fileno()).st_size if n_bytes is None else n_bytes
            try:
                self._file.seek(0)
                _check_text(self._file.read(_SAMPLE), self.shown)
                self._columns = self._read_header() if self._delimiter else []
            except BaseException:
                self._file.close()
                raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def share(self) -> None:
        """Make the ids and places of lines name the file: it is one of several inputs."""
        self._is_only = False

    def spans(self) -> Iterator[tuple[Span, bytes]]:
        """Yield the place and the bytes of every line that is not empty."""
        with reading(self.shown):
            found = self._rows() if self._delimiter else self._raw_lines()
            header = bool(self._delimiter)
            for span, raw in found:
                if header:
                    header = False
                elif raw.strip():
                    yield span, raw

    def read(self, span: Span) -> bytes:
        """Return the bytes of a line."""
        with reading(self.shown):
            # Without the buffer, which a line elsewhere would fill in vain.
            return os.pread(self._file.fileno(), span.length, span.offset)

    def line(self, number: int, raw: bytes) -> Line:
        """Parse a line. If it is not valid, the result has an `error`."""
        kept: Mapping[str, Any] = dict.fromkeys(self._form.keep)
        name = f"{self.unit}-{number}" if self._is_only else f"{self._name}:{number}"
        place = f"{self.unit} {number}" if self._is_only else f"{self.shown}, {self.unit} {number}"
        request: Mapping[str, Any] = {}
        error = None
        try:
            values = self._values(raw)
            kept = {field: field_of(values, field) for field in self._form.keep}
            name = id_of(values, self._form.id_field, name)
            request = self._request_values(values)
        except RequestError as caught:
            error = caught
        return Line(number, place, name, key_of(name, raw, request, kept), request, error, kept)

    def _values(self, raw: bytes) -> Mapping[str, Any]:
        if len(raw) > lines.MAX_LINE:
            raise RequestError(f"the line is longer than {lines.MAX_LINE >> 20} MiB", kind="too_long")
        if self._form.text:
            return {"text": decoded(raw)}
        return self._row_values(raw) if self._delimiter else strict_object(raw)

    def _request_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields of the request that a line makes."""
        form = self._form
        if form.template is None and not form.text:
            return request_values(values, form.fields)
        prompt = values["text"] if form.template is None else form.template.fill(values)
        return {"messages": [{"role": "user", "content": prompt}]} if form.chat else {"prompt": prompt}

    def _read_header(self) -> list[str]:
        # A cell may be as long as a line. The csv module has one limit for the whole process.
        csv.field_size_limit(lines.MAX_LINE)
        first = next(self._rows(), None)
        try:
            names = [] if first is None else self._row(first[1])
        except RequestError as error:
            raise FormatError(f"the header is {error.what}", where=f"{self.shown}, line 1") from error
        missing = [name for name in self._form.fields if name not in names]
        twice = [name for name, n in Counter(names).items() if n > 1]
        if missing or twice:
            fault = f"no column {missing[0]!r}" if missing else f"the column {twice[0]!r} twice"
            raise FormatError(
                f"the input has {fault}",
                where=self.shown,
                remedy=f"its columns are {', '.join(names)}"
                if names
                else "write their names on its first line",
            )
        return names

    def _row_values(self, raw: bytes) -> dict[str, Any]:
        cells = self._row(raw)
        if len(cells) != len(self._columns):
            raise RequestError(
                f"the row has {count(len(cells), 'cell')}, the header {len(self._columns)}", kind="not_csv"
            )
        return dict(zip(self._columns, cells, strict=True))

    def _row(self, raw: bytes) -> list[str]:
        # newline="\n": other line breaks belong to the cells, as in `_rows`.
        text = io.StringIO(decoded(raw), newline="\n")
        try:
            return next(csv.reader(text, delimiter=self._delimiter or ",", strict=True), [])
        except csv.Error as error:
            fault = next((words for part, words in _CSV_FAULTS.items() if part in str(error)), str(error))
            raise RequestError(f"not CSV: {fault}", kind="not_csv") from error

    def _rows(self) -> Iterator[tuple[Span, bytes]]:
        """Yield the rows of CSV, the header first. A quoted cell may contain line breaks."""
        # The span of the row's first line only: with an unclosed quote, a row has a great many lines.
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
                # `_row` reports what is wrong with it.
                if not begun:
                    return
            yield Span(begun[0].number, begun[0].offset, len(raw)), bytes(raw)

    def _raw_lines(self) -> Iterator[tuple[Span, bytes]]:
        """Yield lines, split only at b"\\n"."""
        self._file.seek(0)
        offset, number = 0, 0

        def readline(limit: int, begin: int) -> bytes:
            return self._file.readline(min(limit, self.n_bytes - begin))

        while raw := readline(lines.MAX_LINE + 1, offset):
            number += 1
            end = offset + len(raw)
            if len(raw) > lines.MAX_LINE:
                # `_values` reports that the line is too long. Skip the rest of it.
                rest = raw
                while rest and not rest.endswith(b"\n"):
                    rest = readline(lines.MAX_LINE, end)
                    end += len(rest)
            n_skipped = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
            yield Span(number, offset + n_skipped, len(raw) - n_skipped), raw[n_skipped:]
            offset = end


class Sources:
    """The inputs of a batch, one after the other. The offsets of spans count through all of them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Take over the sources, in their order."""
        self._sources = sources
        self._begins = [0, *accumulate(source.n_bytes for source in sources)]
        if len(sources) > 1:
            for source in sources:
                source.share()

    @property
    def n_bytes(self) -> int:
        """The size of all inputs."""
        return self._begins[-1]

    @property
    def shown(self) -> str:
        """The name of the input in messages."""
        first, *others = self._sources
        return first.shown + (f" and {count(len(others), 'other input')}" if others else "")

    def lines(self) -> Iterator[tuple[Span, Line]]:
        """Yield every line that is not empty, with its place."""
        for source, begin in zip(self._sources, self._begins, strict=False):
            for span, raw in source.spans():
                yield replace(span, offset=begin + span.offset), source.line(span.number, raw)

    def line(self, span: Span) -> Line:
        """Read a line again."""
        source, within = self._find(span)
        return source.line(span.number, source.read(within))

    def place(self, span: Span) -> str:
        """Name a line in a message: its file and its number."""
        source, _ = self._find(span)
        return f"{source.shown}, {source.unit} {span.number}"

    def _find(self, span: Span) -> tuple[Source, Span]:
        """Return the source that a span lies in, and the span in it."""
        index = bisect(self._begins, span.offset) - 1
        return self._sources[index], replace(span, offset=span.offset - self._begins[index])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for source in self._sources:
            source.close()


@contextmanager
def reading(shown: str) -> Iterator[None]:
    """Raise OSError as FileError or NoSpaceError. `shown` is the name of the input."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                "no space for a temporary copy of the input",
                where=shown,
                remedy="free some space, or name an output on another disk",
            ) from error
        raise FileError(f"the input cannot be read: {error.strerror}", where=shown) from error


def _check_text(sample: bytes, shown: str) -> None:
    """FormatError if a file that starts with `sample` is not text."""
    refuse_other_kinds(sample, "the input", shown)
    if b"\0" in sample:
        raise FormatError(
            "the input is a binary file, not text",
            where=f"{shown}, a zero byte at {sample.index(0) + 1:,}",
            remedy="give JSONL or CSV, or plain text with --text",
        )
