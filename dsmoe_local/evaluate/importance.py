"""Collects an importance matrix: a model reads windows of a text, and an observer sums its activations.

After every `save_every` windows, the importance matrix of all windows so far is saved in the partial file
`.NAME.part` beside the output. An interrupted run continues from it. The complete file is renamed to the
output.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsmoe_local.base import durable
from dsmoe_local.base.errors import DsmoeError, FileError, InterruptedRunError, file_errors
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started, ignore
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.observe.arrays import unpack
from dsmoe_local.engine.observe.logprobs import perplexity
from dsmoe_local.engine.types import Observation, ObserverOptions
from dsmoe_local.evaluate.measure import LOGPROBS, name_of
from dsmoe_local.evaluate.windows import WindowReader, Windows
from dsmoe_local.model.identity import file_identity
from dsmoe_quantize.imatrix import Imatrix, Statistics, merged
from dsmoe_quantize.imatrix_file import read_imatrix, write_imatrix

ACTIVATIONS = ObserverOptions("activations")
"""The observer to load the model with. Pass it to `measure.options_for`."""

SAVE_EVERY = 10
"""Windows between two saves."""

_LAYERS = "blk."


@dataclass(frozen=True, slots=True)
class ImportanceFile:
    """The output of a collection, reserved by `importance_file`."""

    out: Path

    @property
    def part(self) -> Path:
        """The partial file, which an interrupted run leaves."""
        return self.out.with_name(f".{self.out.name}.part")

    def resume(self, run: Mapping[str, object]) -> tuple[Imatrix | None, str]:
        """Return the partial file of an earlier run with the same `run`, or None, and why it is not used."""
        if not self.part.exists():
            return None, ""
        try:
            found = read_imatrix(self.part)
        except DsmoeError:
            return None, f"{safe_line(self.part.name, 80)} is damaged"
        changed = [name for name, value in run.items() if found.run.get(name) != value]
        return (None, _changed_since(changed)) if changed else (found, "")

    def save(self, imatrix: Imatrix) -> None:
        """Write the partial file, durably. Raises FileError."""
        with file_errors("the importance matrix cannot be written", self.out):
            write_imatrix(imatrix, self.part, lambda: reach("imatrix.written"))
            reach("imatrix.saved")

    def publish(self) -> None:
        """Rename the partial file to the output. Raises FileError."""
        with file_errors(
            "the importance matrix cannot be renamed",
            self.out,
            f"it is complete in {safe_line(self.part.name, 80)}: run the same command again",
        ):
            reach("imatrix.complete")
            durable.replace(self.part, self.out)


@contextmanager
def importance_file(out: Path, *, force: bool = False) -> Iterator[ImportanceFile]:
    """Lock an output file for one run.

    Raises FileError if it exists and `force` is not set, or if its folder does not exist; LockedError if
    another run has reserved it.
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
        with file_errors("the output cannot be written", out):
            held.enter_context(durable.locked(out.absolute()))
        yield ImportanceFile(out.absolute())


@dataclass(frozen=True, slots=True)
class Collected:
    """A complete matrix. This run read `n_windows` of its windows in `seconds` of wall time."""

    imatrix: Imatrix
    n_windows: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Reading speed of this run; 0 if no time passed."""
        return self.n_windows * self.imatrix.chunk_size / self.seconds if self.seconds > 0 else 0.0

    @property
    def perplexity(self) -> float:
        """Perplexity of all tokens but the first of each window, unlike that of `dsmoe eval`."""
        return collected_perplexity(self.imatrix.run)


def collected_perplexity(run: Mapping[str, object]) -> float:
    """Return the perplexity from `Imatrix.run` of a collection; NaN if no token was scored."""
    nll, n_scored = run.get("nll"), run.get("n_scored")
    if not isinstance(nll, float) or not isinstance(n_scored, int) or n_scored < 1:
        return math.nan
    return perplexity(nll / n_scored)


def collect(
    engine: TextEngine,
    windows: Windows,
    file: ImportanceFile,
    *,
    with_output: bool = False,
    save_every: int = SAVE_EVERY,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Collected:
    """Read all windows that an interrupted run with the same options has not read, and write the file.

    `with_output` includes the output matrix. Raises InterruptedRunError once `stop` is set, EngineError,
    FileError. After an error, the same call continues after the last saved window.
    """
    collection = _Collection(engine, windows, file, with_output, listen, stop or threading.Event())
    began = time.perf_counter()
    n_before = collection.n_done
    collection.finish(save_every)
    return Collected(collection.imatrix(), collection.n_done - n_before, time.perf_counter() - began)


class _Collection:
    """The sums of earlier runs, and those of this one."""

    def __init__(
        self,
        engine: TextEngine,
        windows: Windows,
        file: ImportanceFile,
        with_output: bool,
        listen: Listener,
        stop: threading.Event,
    ) -> None:
        self._engine = engine
        self._windows = windows
        self._file = file
        self._with_output = with_output
        self._listen = listen
        # Everything that the sums depend on. The keys are shown in messages.
        self._run: dict[str, object] = {
            "the model": file_identity(engine.info.path),
            "the active experts": engine.info.n_experts_per_token,
            "the text": windows.text_digest,
            "the windows": windows.n_context,
            "the output matrix": with_output,
        }
        self._before = self._resumed()
        self._n_before = self.n_done = self._before.n_chunks if self._before else 0
        self._seen: Imatrix | None = None
        self._detail = ""
        self._reader = WindowReader(engine, windows, 0, listen, stop, lambda: self._detail)

    def _resumed(self) -> Imatrix | None:
        found, reason = self._file.resume(self._run)
        if found is not None and found.n_chunks > len(self._windows.tokens):
            found, reason = None, _changed_since(["the number of windows"])
        if reason:
            self._listen(Note(f"starting over: {reason}"))
        if found is not None:
            done = f"{found.n_chunks} of {len(self._windows.tokens)} windows are done"
            self._listen(Note(f"continuing an interrupted run: {done}"))
        return found

    def finish(self, save_every: int) -> None:
        """Read and save the remaining windows, and rename the file to the output."""
        n_windows, n_context = len(self._windows.tokens), self._windows.n_context
        stage = f"reading with {name_of(self._engine)}"
        self._listen(Started(stage, n_windows * n_context, self.n_done * n_context, unit="tokens"))
        try:
            while self.n_done < n_windows:
                end = min(n_windows, self.n_done + save_every)
                self._reader.read(range(self.n_done, end))
                self._seen = self._observed(end - self._n_before)
                self.n_done = end
                self._file.save(self.imatrix())
                self._detail = f"perplexity {collected_perplexity(self.imatrix().run):.4g}"
        except InterruptedRunError as error:
            raise InterruptedRunError(
                f"interrupted: {self.n_done} of {n_windows} windows are kept",
                remedy="run the same command again to continue",
            ) from error
        self._listen(Advanced(0, self._detail))
        self._listen(Finished(stage))
        self._file.publish()

    def imatrix(self) -> Imatrix:
        """Return the matrix of all windows so far."""
        parts = [part for part in (self._before, self._seen) if part is not None]
        total = merged(parts)
        run = self._run | {name: sum(_number(part, name) for part in parts) for name in ("n_scored", "nll")}
        return Imatrix(total.entries, (self._windows.text,), self.n_done, self._windows.n_context, "", run)

    def _observed(self, n_windows: int) -> Imatrix:
        """Return the sums of this run, of `n_windows` windows. Raises EngineError if tokens are missing."""
        logprobs = self._engine.observe(LOGPROBS.name)
        entries = statistics_of(self._engine.observe(ACTIVATIONS.name), with_output=self._with_output)
        n_tokens = n_windows * self._windows.n_context
        for name, entry in entries.items():
            if len(entry.counts) == 1 and entry.counts[0] != n_tokens:
                raise EngineError(
                    f"the engine processed {entry.counts[0]} of {n_tokens} tokens",
                    where=name,
                    remedy="its process may have been restarted: run the same command again",
                )
            if not np.isfinite(entry.sums).all():
                raise EngineError(
                    "the model's activations are not finite",
                    where=name,
                    remedy="its weights may be damaged: download or convert it again",
                )
        run = {"n_scored": int(logprobs["tokens"]), "nll": float(logprobs["nll"])}
        return Imatrix(entries, (), n_windows, self._windows.n_context, "", run)


def statistics_of(seen: Observation, *, with_output: bool = False) -> dict[str, Statistics]:
    """Return the statistics from a summary of the observer `activations`, by tensor.

    They are those of the layers, as in llama.cpp's tool, and of the output matrix if `with_output`.
    """
    found = {}
    for entry in seen["inputs"]:
        counts = unpack(entry["counts"])
        # As in llama.cpp, the heads of one tensor are one row: they have one count.
        statistics = Statistics(unpack(entry["sums"]).reshape(len(counts), -1), counts)
        for name in entry["weights"]:
            if with_output or name.startswith(_LAYERS):
                found[name] = statistics
    return found


def _changed_since(names: Iterable[str]) -> str:
    return f"changed since the interrupted run: {', '.join(names)}"


def _number(part: Imatrix, name: str) -> float:
    value = part.run.get(name)
    return value if isinstance(value, int | float) else 0
