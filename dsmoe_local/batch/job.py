"""One batch, prepared: its input read once, its output open, what is finished known. `run` does the work."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, FormatError, UsageError
from dsmoe_local.base.progress import Listener, Note, ignore
from dsmoe_local.base.text import count
from dsmoe_local.batch.index import Index, build_index
from dsmoe_local.batch.journal import Output, journal_path
from dsmoe_local.batch.lines import Key, Line, key_of
from dsmoe_local.batch.order import shared_bytes, work_order
from dsmoe_local.batch.requests import BatchDefaults, request_of
from dsmoe_local.batch.responses import FORMATS
from dsmoe_local.batch.sources import InputForm, Source
from dsmoe_local.batch.spool import spool_path, spooled
from dsmoe_local.batch.summary import BatchSummary
from dsmoe_local.batch.workload import BYTES_A_TOKEN
from dsmoe_local.engine.load.parallel import Workload
from dsmoe_local.engine.types import ModelInfo, Request

STDIN = Path("-")
REQUESTS = InputForm()
_SEEDS = 2**31
_SUFFIXES = frozenset({".jsonl", ".csv", ".tsv", ".txt"})


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What to read, where to write, and how.

    `settings` is whatever else a reply depends on (the model, its options): records of other settings are not
    continued. `names` are what people call those whose values mean nothing to them: the model's digest.
    `deterministic`: the engine is; requests that sample without a seed then get one of their own,
    always the same. `max_errors`: give up once more lines than this have failed.
    """

    source: Path
    out: Path
    defaults: BatchDefaults
    form: str = "openai"
    input: InputForm = REQUESTS
    settings: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    ordered: bool = False
    deterministic: bool = False
    restart: bool = False
    max_errors: int | None = None


@dataclass(slots=True)
class Job:
    """A batch that can be run. `order`: the positions of the lines that are left, in the order of work."""

    options: BatchOptions
    source: Source
    index: Index
    output: Output
    summary: BatchSummary
    order: array[int]

    def line(self, position: int) -> Line:
        """Read a line again. FormatError if it is not what it was."""
        span = self.index.span(position)
        raw = self.source.read(span)
        line = self.source.line(span.number, raw)
        if key_of(line, raw) != self.index.key(position):
            raise FormatError(
                "the input was changed while the batch ran", where=f"{self.source.shown}, line {span.number}"
            )
        return line

    def request(self, line: Line, position: int) -> Request:
        """The request that a line makes. Raises LineError, UsageError."""
        request = request_of(line, self.options.defaults)
        sampling = request.sampling
        if self.options.deterministic and sampling.seed is None and sampling.temperature > 0:
            key = self.index.key(position)
            request = replace(request, sampling=replace(sampling, seed=(key.id ^ key.content) % _SEEDS))
        return request

    @property
    def workload(self) -> Workload:
        """What is left, about; prompt tokens that the line before in the order of work begins with, once."""
        index = self.index
        n_shared = shared_bytes(self.order, index.signatures, index.lengths) // BYTES_A_TOKEN
        return index.workload.left(len(self.order), len(index), n_shared)

    def hold_to(self, info: ModelInfo) -> None:
        """Texts that must not differ need a model that was loaded alike. FileError if it was not."""
        if not self.options.deterministic:
            return
        longest = self.index.workload.n_longest
        enough = info.n_context >= (info.n_context_trained if longest is None else longest)
        context = "what the lines need" if enough else f"{info.n_context} tokens"
        self.output.require(
            {"context of a request": context, "threads": str(info.n_threads), "kernels": info.kernels}
        )

    def finish(self) -> None:
        """Every record is there: remove what is needed no longer."""
        if self.options.source == STDIN:
            spool_path(self.options.out).unlink(missing_ok=True)


def check_paths(options: BatchOptions) -> None:
    """Look for what is wrong at first sight. Raises UsageError (input is output), FileError."""
    folder = options.out.absolute().parent
    if not folder.is_dir():
        raise FileError("the output's folder does not exist", where=folder, remedy="make it, or name another")
    if options.out.is_dir():
        raise FileError("the output is a folder", where=options.out, remedy="name a file in it")
    if options.out == STDIN or (options.out.exists() and not options.out.is_file()):
        raise FileError(
            "the output is not a regular file",
            where=options.out,
            remedy="name a file: the next run goes on in it",
        )
    if options.source == STDIN:
        return
    for path in (options.out, journal_path(options.out)):
        if durable.same_file(options.source, path):
            raise UsageError("input and output are the same file", where=str(path))
    if options.source.is_dir():
        inside = next((path for path in sorted(options.source.iterdir()) if path.suffix in _SUFFIXES), None)
        raise FileError(
            "the input is a folder",
            where=options.source,
            remedy=f"name a file, such as {inside}" if inside else "name a file of requests, one a line",
        )
    if not options.source.exists():
        raise FileError("the input does not exist", where=options.source)
    if not options.source.is_file():
        raise FileError(
            "the input is not a regular file, and it is read more than once",
            where=options.source,
            remedy="name -, and pipe the lines in",
        )


@contextmanager
def prepared(
    options: BatchOptions, listen: Listener = ignore, stop: threading.Event | None = None
) -> Iterator[Job]:
    """The job that `options` describe, held until the block ends: nobody else can write its output.

    Everything that needs no model is checked here. Raises UsageError, FileError (the input, the output, other
    settings than those of the records that are there), LockedError, FormatError (ids), InterruptedRunError.
    """
    stop = stop or threading.Event()
    check_paths(options)
    if options.out.is_symlink():
        # The journal and the lock belong to the file, not to one of its names.
        options = replace(options, out=options.out.resolve())
    with ExitStack() as stack:
        stack.enter_context(durable.locked(options.out))
        spool = stack.enter_context(spooled(options.out, stop)) if options.source == STDIN else None
        source = Source(options.source, options.input) if spool is None else spool.source(options.input)
        stack.enter_context(closing(source))
        index = build_index(source, options.defaults, listen, stop)
        summary = BatchSummary(n_requests=len(index))
        known = _Known(index, summary)
        output = stack.enter_context(
            Output(options.out, _settings(options), known.mark, names=options.names, restart=options.restart)
        )
        known.tell(source, listen, ordered=options.ordered)
        if spool:
            spool.keep()
        left = (position for position in range(len(index)) if not index.done[position])
        order = work_order(left, index.signatures, index.costs, ordered=options.ordered)
        yield Job(options, source, index, output, summary, order)


class _Known:
    """Takes the finished records' keys from the journal."""

    def __init__(self, index: Index, summary: BatchSummary) -> None:
        self._index = index
        self._summary = summary
        self._n_foreign = 0
        self._changed: int | None = None
        self._last = -1
        self._in_order = True

    def mark(self, key: Key, failure: str) -> None:
        """One record is finished."""
        self._summary.n_records += 1
        self._summary.n_resumed += 1
        if failure:
            self._summary.failures[failure] += 1
        positions = self._index.find(key.id)
        same = [position for position in positions if self._index.key(position) == key]
        if same:
            self._index.done[same[0]] = 1
            self._in_order = self._in_order and same[0] > self._last
            self._last = max(self._last, same[0])
        elif positions:
            self._changed = positions[0]
        else:
            self._n_foreign += 1

    def tell(self, source: Source, listen: Listener, *, ordered: bool) -> None:
        """Say what was found, and whether `ordered` cannot be had any more. FileError if a finished line asks
        for something else now.
        """
        if self._changed is not None:
            raise FileError(
                "a line has changed since its record was written",
                where=f"{source.shown}, line {self._index.span(self._changed).number}",
                remedy="give the new line an id of its own, or start over: --restart",
            )
        if self._summary.n_resumed:
            listen(Note(f"{count(self._summary.n_resumed, 'record')} from earlier runs"))
        if self._n_foreign:
            listen(Note(f"{count(self._n_foreign, 'record')} of lines that are no longer in the input"))
        first_left = self._index.done.find(0)
        if ordered and not (self._in_order and (first_left < 0 or first_left > self._last)):
            listen(
                Note("earlier records are not in the input's order; --ordered puts only new ones in order")
            )


def _settings(options: BatchOptions) -> dict[str, str]:
    """All that a record depends on beside its line, as words."""
    if options.form not in FORMATS:
        raise UsageError(f"{options.form!r} is no output format", remedy=f"known are {', '.join(FORMATS)}")
    template = options.input.template
    own = {
        "format": options.form,
        "max_tokens": options.defaults.max_tokens,
        "stop": list(options.defaults.stop),
        "text": options.input.text,
        "template": template.text if template else None,
        "chat": options.input.chat,
        "id_field": options.input.id_field,
        "keep": list(options.input.keep) or None,
        "deterministic": options.deterministic,
    }
    chosen = {**options.settings, **asdict(options.defaults.sampling), **own}
    return {name: str(value) for name, value in chosen.items()}
