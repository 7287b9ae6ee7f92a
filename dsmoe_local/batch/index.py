"""Where every line of an input lies and what it is known by, in about 70 bytes each. Keeps no text."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left

from dsmoe_local.base.errors import DsmoeError, FormatError, InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.batch.lines import Key, Line, key_of
from dsmoe_local.batch.order import cost_of, prefix_signature
from dsmoe_local.batch.requests import BatchDefaults, model_named, request_of
from dsmoe_local.batch.sources import Source, Span
from dsmoe_local.batch.workload import WorkloadMeter

_REPORT = 1 << 20


class Index:
    """The lines of an input, by position from 0. `model_named` is one that a line asks for;
    `workload` sums up all of them.
    """

    def __init__(self) -> None:
        self._numbers = array("Q")
        self._offsets = array("Q")
        self.lengths = array("I")
        self._ids = array("Q")
        self._contents = array("Q")
        self._sorted_ids = array("Q")
        self._by_id = array("I")
        self.signatures = array("Q")
        self.costs = array("I")
        self.done = bytearray()
        self.model_named = ""
        self.workload = WorkloadMeter()

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, span: Span, key: Key, signature: int, cost: int) -> None:
        """Append a line."""
        self._numbers.append(span.number)
        self._offsets.append(span.offset)
        self.lengths.append(span.length)
        self._ids.append(key.id)
        self._contents.append(key.content)
        self.signatures.append(signature)
        self.costs.append(cost)
        self.done.append(0)

    def sort(self) -> None:
        """Make `find` possible, after the last `add`."""
        self._by_id = array("I", sorted(range(len(self)), key=self._ids.__getitem__))
        self._sorted_ids = array("Q", (self._ids[position] for position in self._by_id))

    def span(self, position: int) -> Span:
        """Where a line lies."""
        return Span(self._numbers[position], self._offsets[position], self.lengths[position])

    def key(self, position: int) -> Key:
        """What a line is known by."""
        return Key(self._ids[position], self._contents[position])

    def find(self, id_hash: int) -> list[int]:
        """The lines whose ids have this hash: none, one, or by a rare chance two."""
        found = []
        at = bisect_left(self._sorted_ids, id_hash)
        while at < len(self._sorted_ids) and self._sorted_ids[at] == id_hash:
            found.append(self._by_id[at])
            at += 1
        return found

    def equal_hashes(self) -> list[list[int]]:
        """Lines whose ids have one hash, in input order."""
        ids, positions = self._sorted_ids, self._by_id
        return [
            sorted((positions[at - 1], positions[at])) for at in range(1, len(ids)) if ids[at] == ids[at - 1]
        ]


def build_index(source: Source, defaults: BatchDefaults, listen: Listener, stop: threading.Event) -> Index:
    """Read the input once.

    FormatError if two lines have one id, since their records could not be told apart; if no line can be read;
    or if no line has a field that records should carry along.
    """
    index = Index()
    listen(Started("reading", source.n_bytes))
    reported = 0
    readable = _Readable()
    for span, raw in source.spans():
        line = source.line(span.number, raw)
        readable.add(line)
        signature, cost = _shape(line, defaults, index.workload)
        index.add(span, key_of(line, raw), signature, cost)
        index.model_named = index.model_named or model_named(line)
        if span.offset + span.length - reported >= _REPORT:
            listen(Advanced(span.offset + span.length - reported))
            reported = span.offset + span.length
            if stop.is_set():
                raise InterruptedRunError("interrupted: the input was not read to its end")
    readable.check(source, len(index))
    index.sort()
    _check_ids(source, index)
    listen(Finished("reading"))
    return index


class _Readable:
    """Notices that an input is of a wrong kind as a whole, which then is one error, not one for each line."""

    def __init__(self) -> None:
        self._first: Line | None = None
        self._any = False
        self._missing: set[str] = set()

    def add(self, line: Line) -> None:
        if self._first is None:
            self._first = line
            self._missing = set(line.kept)
        self._any = self._any or line.error is None
        if self._missing:
            self._missing -= {name for name, value in line.kept.items() if value is not None}

    def check(self, source: Source, n_lines: int) -> None:
        if self._first is not None and self._first.error is not None and not self._any:
            error = self._first.error
            raise FormatError(
                f"no line of the input can be read: {error.what}",
                where=f"{source.shown}, line {self._first.number} of {count(n_lines, 'line')}",
                remedy="--text takes each line as a prompt" if error.kind == "not_json" else error.remedy,
            )
        if self._missing:
            raise FormatError(
                f"no line has the field {min(self._missing)!r}, which --keep names", where=source.shown
            )


def _shape(line: Line, defaults: BatchDefaults, workload: WorkloadMeter) -> tuple[int, int]:
    """What the order of work depends on; a bad line takes no work."""
    try:
        request = request_of(line, defaults)
    except DsmoeError:
        return 0, 0
    workload.add(request)
    return prefix_signature(request.prompt), cost_of(request)


def _check_ids(source: Source, index: Index) -> None:
    for first, second in index.equal_hashes():
        spans = index.span(first), index.span(second)
        one, other = (source.line(span.number, source.read(span)) for span in spans)
        if one.id == other.id:
            raise FormatError(
                f"the id {safe_line(one.id, 60)!r} occurs twice",
                where=f"{source.shown}, lines {one.number} and {other.number}",
                remedy="give every line an id of its own, or none",
            )
