"""Prepare a batch: read its input, lock and read its output, and find out which lines are left."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, FormatError, UsageError
from dsmoe_local.base.progress import Listener, Note, ignore
from dsmoe_local.base.text import count
from dsmoe_local.batch.index import Index, Plan, build_index
from dsmoe_local.batch.input_form import InputForm
from dsmoe_local.batch.inputs import STDIN, opened
from dsmoe_local.batch.journal import compare, journal_path
from dsmoe_local.batch.lines import Key, Line
from dsmoe_local.batch.output import Output
from dsmoe_local.batch.parquet_input import needs_pyarrow
from dsmoe_local.batch.parquet_output import interrupted, mark_of, write_parquet
from dsmoe_local.batch.records import FORMATS
from dsmoe_local.batch.requests import request_of
from dsmoe_local.batch.sources import Sources, Span
from dsmoe_local.batch.spool import spool_path, spooled
from dsmoe_local.batch.summary import BatchSummary
from dsmoe_local.batch.urls import Url, check_upload, upload
from dsmoe_local.batch.workload import BYTES_PER_TOKEN
from dsmoe_local.engine.load.parallel import Workload
from dsmoe_local.engine.types import ModelInfo, Request
from dsmoe_local.model.identity import has_identity
from dsmoe_local.protocol.requests import RequestDefaults

REQUESTS = InputForm()
_SEEDS = 2**31
_SUFFIXES = frozenset({".jsonl", ".csv", ".tsv", ".txt", ".parquet"})


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What to read, where to write, and how.

    `out` gets the records as they finish. When all are there, they are written to the Parquet file `parquet`,
    and that file or `out` is uploaded to `address`.

    `settings` are the other things that a reply depends on, such as the model: a run with different settings
    cannot continue an output. `names` gives the text that messages show for a setting whose value is a
    digest. `model` is the file whose `file_identity` is the setting of that name. `deterministic`: the engine
    is deterministic, and requests that sample without a seed get one that depends on the line only.
    `max_errors`: stop when more lines than this have failed.
    """

    sources: Sequence[Path | Url]
    out: Path
    defaults: RequestDefaults
    form: str = "openai"
    parquet: Path | None = None
    address: Url | None = None
    input: InputForm = REQUESTS
    settings: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    model: Path | None = None
    ordered: bool = False
    deterministic: bool = False
    restart: bool = False
    max_errors: int | None = None


@dataclass(slots=True)
class Job:
    """A batch that can be run. `plan` is the work that is left."""

    options: BatchOptions
    sources: Sources
    index: Index
    output: Output
    summary: BatchSummary
    plan: Plan

    def line(self, task: int) -> Line:
        """Read the line of a task again; `Index.entry` numbers tasks. FormatError if the line has changed."""
        return self.line_at(*self.index.entry(task))

    def line_at(self, span: Span, key: Key) -> Line:
        """Read a line again whose place and key are known. FormatError if it has changed."""
        line = self.sources.line(span)
        if line.key != key:
            raise FormatError("the input has changed since the batch started", where=self.sources.place(span))
        return line

    @property
    def workload(self) -> Workload:
        """An estimate of the work that is left. Shared prefixes count once."""
        return self.index.workload.remaining(self.plan.n_lines, len(self.index), self._n_shared)

    @property
    def prompt_ratio(self) -> float:
        """An estimate of the prompt tokens for each token of a reply, as in `ModelOptions`."""
        workload = self.index.workload
        return max(0, workload.n_prompt_tokens - self._n_shared) / max(1, workload.n_reply_tokens)

    @property
    def _n_shared(self) -> int:
        return self.plan.shared_bytes // BYTES_PER_TOKEN

    def require(self, info: ModelInfo) -> None:
        """With `deterministic`: FileError unless the model is loaded as it was for the existing records."""
        if self.options.deterministic:
            self.output.require(self.loaded(info))

    def check_model(self) -> None:
        """Raise FileError if another file has the model's name by now: records would be of two models."""
        model = self.options.model
        if model is not None and not has_identity(model, self.options.settings["model"]):
            raise FileError(
                "the model was replaced or removed while the batch ran",
                where=model,
                remedy="put it back and run the same command again, or start over: --restart",
            )

    def loaded(self, info: ModelInfo) -> Mapping[str, str]:
        """Return what replies depend on with `deterministic` and that is known once the model is loaded."""
        longest = self.index.workload.n_longest
        enough = info.n_context >= (info.n_context_trained if longest is None else longest)
        context = "enough for every line" if enough else f"{info.n_context} tokens"
        return {"context of a request": context, "threads": str(info.n_threads), "kernels": info.kernels}

    def finish(self, listen: Listener = ignore, stop: threading.Event | None = None) -> None:
        """Write the Parquet file, upload the output, and remove the copy of standard input.

        Must be called only when every line has a record. Raises FileError, InterruptedRunError.
        """
        options, stop = self.options, stop or threading.Event()
        if options.parquet:
            mark = self.output.fingerprint
            if not options.parquet.exists() or mark_of(options.parquet) != mark:
                records = self._records_in_order(stop)
                write_parquet(options.out, records, options.parquet, options.input.keep, mark, listen, stop)
        if options.address:
            upload(options.parquet or options.out, options.address, listen, stop)
        if STDIN in options.sources:
            spool_path(options.out).unlink(missing_ok=True)

    def _records_in_order(self, stop: threading.Event) -> Iterator[tuple[int, int]]:
        """Return the offset and the size of each record in the output, in the order of the input."""
        self.index.forget_records()
        with self.options.out.open("rb") as output:
            sizes = map(len, output)

            def visit(key: Key, failure: str) -> None:
                if stop.is_set():
                    raise interrupted()
                self.index.add_record(key, failure, next(sizes))

            compare(self.options.out, visit)
        self.index.resume()
        return self.index.records()


def request_for(line: Line, options: BatchOptions) -> Request:
    """Return the request that a line asks for. Raises RequestError, UsageError."""
    request = request_of(line, options.defaults)
    sampling = request.sampling
    if options.deterministic and sampling.seed is None and sampling.temperature > 0:
        seed = (line.key.id ^ line.key.content) % _SEEDS
        request = replace(request, sampling=replace(sampling, seed=seed))
    return request


def check_paths(options: BatchOptions, stop: threading.Event) -> None:
    """Check the paths of inputs and outputs. Raises UsageError if two are the same file, FileError."""
    _check_output(options, stop)
    for source in options.sources:
        if source == options.address:
            raise UsageError(
                "input and output are the same URL", where=str(source), remedy="name another output"
            )
        if isinstance(source, Path) and source != STDIN:
            _check_input(source, options)


def _check_output(options: BatchOptions, stop: threading.Event) -> None:
    folder = options.out.absolute().parent
    if not folder.is_dir():
        raise FileError(
            "the output's folder does not exist", where=folder, remedy="create it, or name another"
        )
    if options.out.is_dir():
        raise FileError("the output is a folder", where=options.out, remedy="name a file in it")
    if options.out == STDIN or (options.out.exists() and not options.out.is_file()):
        raise FileError(
            "the output is not a regular file",
            where=options.out,
            remedy="name a file, so that the next run can continue it",
        )
    if options.address and check_upload(options.address, stop):
        _check_begun(options, str(options.address))
    if options.parquet:
        with needs_pyarrow():
            import pyarrow  # noqa: F401 - before anything is answered
    if options.parquet and options.parquet.exists():
        if mark_of(options.parquet) is None:
            raise FileError(
                "the output exists, and it is not the output of a batch",
                where=options.parquet,
                remedy="name another, or remove it yourself",
            )
        _check_begun(options, str(options.parquet))


def _check_begun(options: BatchOptions, existing: str) -> None:
    """FileError if there is an output, but no records to continue."""
    if not options.restart and not journal_path(options.out).exists():
        raise FileError(
            f"the output exists, but the journal {journal_path(options.out).name} does not",
            where=existing,
            remedy="run where the batch was begun, or replace the output: --restart",
        )


def _check_input(source: Path, options: BatchOptions) -> None:
    for path in filter(None, (options.out, journal_path(options.out), options.parquet)):
        if durable.same_file(source, path):
            raise UsageError(
                "input and output are the same file", where=str(path), remedy="name another output"
            )
    if source.is_dir():
        inside = next((path for path in sorted(source.iterdir()) if path.suffix in _SUFFIXES), None)
        raise FileError(
            "the input is a folder",
            where=source,
            remedy=f"name a file, such as {inside}" if inside else "name a file with one request per line",
        )
    if not source.exists():
        raise FileError("the input does not exist", where=source)
    if not source.is_file():
        raise FileError(
            "the input is not a regular file, which can be read more than once",
            where=source,
            remedy="use - as the input, and pipe the lines in",
        )


@contextmanager
def prepared(
    options: BatchOptions, listen: Listener = ignore, stop: threading.Event | None = None
) -> Iterator[Job]:
    """Prepare a batch and lock its output until the block ends. Checks everything that needs no model.

    Raises UsageError, FileError (input, output, or settings that differ from those of existing records),
    LockedError, FormatError (the input), InterruptedRunError.
    """
    stop = stop or threading.Event()
    check_paths(options, stop)
    if options.out.is_symlink():
        # The journal and the lock belong to the file that the link points to.
        options = replace(options, out=options.out.resolve())
    with ExitStack() as stack:
        with durable.output_errors(options.out):
            stack.enter_context(durable.locked(options.out))
        spool = stack.enter_context(spooled(options.out, stop)) if STDIN in options.sources else None
        sources = stack.enter_context(
            opened(
                options.sources,
                options.input,
                spool,
                options.out.absolute().parent,
                listen,
                stop,
                options.address,
            )
        )
        index = stack.enter_context(closing(build_index(sources, options.defaults, listen, stop)))
        summary = BatchSummary(n_requests=len(index))

        def visit(key: Key, failure: str) -> None:
            index.add_record(key, failure)
            summary.n_records += 1
            summary.n_resumed += 1

        output = stack.enter_context(
            Output(options.out, _settings(options), visit, names=options.names, restart=options.restart)
        )
        _resume(index, summary, sources, listen, options)
        if spool:
            spool.keep()
        yield Job(options, sources, index, output, summary, index.plan(ordered=options.ordered))


def _resume(
    index: Index, summary: BatchSummary, sources: Sources, listen: Listener, options: BatchOptions
) -> None:
    """Mark the lines that have a record. FileError if one of them has changed since."""
    if not summary.n_resumed:
        return
    resumed = index.resume()
    if resumed.changed_line is not None:
        raise FileError(
            "a line has changed since its record was written",
            where=sources.place(resumed.changed_line),
            remedy="give the new line its own id, or start over: --restart",
        )
    if resumed.n_foreign and options.address:
        # Outputs at two URLs may have the same name here.
        raise FileError(
            f"{options.out.name} has {count(resumed.n_foreign, 'record')} for lines that the input lacks",
            where=options.out,
            remedy="run each batch in a folder of its own, or start over: --restart",
        )
    summary.failures.update(resumed.failures)
    listen(Note(f"{count(summary.n_resumed, 'record')} from earlier runs"))
    if resumed.n_foreign:
        listen(Note(f"{count(resumed.n_foreign, 'record')} for lines that are no longer in the input"))
    if options.ordered and not resumed.in_order:
        listen(Note("earlier records are not in the order of the input; --ordered applies to new ones only"))


def _settings(options: BatchOptions) -> dict[str, str]:
    """Return what a record depends on besides its line, as text."""
    if options.form not in FORMATS:
        raise UsageError(f"{options.form!r} is not an output format", remedy=f"use {' or '.join(FORMATS)}")
    template = options.input.template
    own = {
        "format": options.form,
        "max_tokens": options.defaults.max_tokens,
        "stop": list(options.defaults.stop),
        "reasoning_budget": options.defaults.reasoning_budget,
        "chat_template_kwargs": dict(options.defaults.chat_template_kwargs) or None,
        "text": options.input.text,
        "template": template.text if template else None,
        "chat": options.input.chat,
        "id_field": options.input.id_field,
        "keep": list(options.input.keep) or None,
        "deterministic": options.deterministic,
    }
    chosen = {**options.settings, **asdict(options.defaults.sampling), **own}
    return {name: str(value) for name, value in chosen.items()}
