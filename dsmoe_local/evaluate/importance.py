"""Collects an importance matrix: windows of a text through a model whose activations are observed.

Every so many windows all that are on their way are waited for, so that sums and windows agree, and the sums
are kept: a run that is killed goes on from there. What is made of the sums is dsmoe_quantize.imatrix's.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started, ignore
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.observe.arrays import unpack
from dsmoe_local.engine.observe.logprobs import perplexity
from dsmoe_local.engine.types import Observation, ObserverOptions, TextEngine
from dsmoe_local.evaluate.importance_file import ImportanceFile
from dsmoe_local.evaluate.measure import LOGPROBS, name_of
from dsmoe_local.evaluate.windows import WindowReader, Windows
from dsmoe_local.model.identity import file_identity
from dsmoe_quantize.imatrix import Imatrix, Statistics, merged

ACTIVATIONS = ObserverOptions("activations")
"""Load the model with this one, by way of `measure.options_for`."""

SAVE_EVERY = 10
"""Windows from one part that is kept to the next."""

_LAYERS = "blk."


@dataclass(frozen=True, slots=True)
class Collected:
    """A finished matrix. `seconds` of wall time were spent on `n_windows` of them, the others were there."""

    imatrix: Imatrix
    n_windows: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """How fast this run read."""
        return self.n_windows * self.imatrix.chunk_size / self.seconds if self.seconds > 0 else 0.0

    @property
    def perplexity(self) -> float:
        """Of all tokens but the first of each window: `dsmoe eval` scores the second half alone."""
        return perplexity_of(self.imatrix.run)


def perplexity_of(run: Mapping[str, object]) -> float:
    """From what a collector says of itself; NaN if nothing was scored."""
    nll, n_scored = run.get("nll"), run.get("n_scored")
    if not isinstance(nll, float) or not isinstance(n_scored, int) or n_scored < 1:
        return math.nan
    return perplexity(nll / n_scored)


def collect(
    engine: TextEngine,
    windows: Windows,
    place: ImportanceFile,
    *,
    with_output: bool = False,
    save_every: int = SAVE_EVERY,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Collected:
    """Read all windows, but for those that an interrupted run of the same kind has read, and write the file.

    `with_output` also keeps what the output matrix is multiplied with. Raises InterruptedRunError once `stop`
    is set, EngineError, FileError; what was saved is kept, and the same call goes on from there.
    """
    run = _Run(engine, windows, place, with_output, listen, stop or threading.Event())
    began = time.perf_counter()
    n_before = run.n_done
    run.until_done(save_every)
    return Collected(run.imatrix(), run.n_done - n_before, time.perf_counter() - began)


class _Run:
    """The state of one collection: what was there before, and what the observers have seen since."""

    def __init__(
        self,
        engine: TextEngine,
        windows: Windows,
        place: ImportanceFile,
        with_output: bool,
        listen: Listener,
        stop: threading.Event,
    ) -> None:
        self._engine = engine
        self._windows = windows
        self._place = place
        self._with_output = with_output
        self._listen = listen
        self._about = _about(engine, windows, with_output)
        self._before = self._resumed()
        self._n_before = self.n_done = self._before.n_chunks if self._before else 0
        self._seen: Imatrix | None = None
        self._detail = ""
        self._reader = WindowReader(engine, windows, 0, listen, stop, lambda: self._detail)

    def _resumed(self) -> Imatrix | None:
        found, changed = self._place.resume(self._about)
        if found is not None and found.n_chunks > len(self._windows.tokens):
            found, changed = None, ["the number of windows"]
        if changed:
            self._listen(Note(f"starting over: changed since the interrupted run: {', '.join(changed)}"))
        if found is not None:
            done = f"{found.n_chunks} of {len(self._windows.tokens)} windows are done"
            self._listen(Note(f"continuing an interrupted run: {done}"))
        return found

    def until_done(self, save_every: int) -> None:
        """Read, save, and give the file its name."""
        n_windows, n_context = len(self._windows.tokens), self._windows.n_context
        stage = f"reading with {name_of(self._engine)}"
        self._listen(Started(stage, n_windows * n_context, self.n_done * n_context, unit="tokens"))
        try:
            while self.n_done < n_windows:
                until = min(n_windows, self.n_done + save_every)
                self._reader.read(range(self.n_done, until))
                self._seen = self._look(until)
                self.n_done = until
                self._place.save(self.imatrix())
                self._detail = f"perplexity {perplexity_of(self.imatrix().run):.4g}"
        except InterruptedRunError as error:
            raise InterruptedRunError(
                f"interrupted: {self.n_done} of {n_windows} windows are kept",
                remedy="run the same command again to continue",
            ) from error
        self._listen(Advanced(0, self._detail))
        self._listen(Finished(stage))
        self._place.publish()

    def imatrix(self) -> Imatrix:
        """All so far."""
        parts = [part for part in (self._before, self._seen) if part is not None]
        total = merged(parts)
        run = self._about | {name: sum(_number(part, name) for part in parts) for name in ("n_scored", "nll")}
        return Imatrix(total.entries, (self._windows.text,), self.n_done, self._windows.n_context, "", run)

    def _look(self, until: int) -> Imatrix:
        """What the observers have seen: the windows that this run has read, and nothing else."""
        n_windows = until - self._n_before
        logprobs = self._engine.observe(LOGPROBS.name)
        entries = statistics_of(self._engine.observe(ACTIVATIONS.name), with_output=self._with_output)
        wanted = n_windows * self._windows.n_context
        for name, entry in entries.items():
            if len(entry.counts) == 1 and entry.counts[0] != wanted:
                raise EngineError(
                    f"the engine saw {entry.counts[0]} of {wanted} tokens",
                    where=name,
                    remedy="run the same command again; its process may have been replaced",
                )
            if not np.isfinite(entry.sums).all():
                raise EngineError("the model's activations are not finite", where=name)
        run = {"n_scored": int(logprobs["tokens"]), "nll": float(logprobs["nll"])}
        return Imatrix(entries, (), n_windows, self._windows.n_context, "", run)


def statistics_of(seen: Observation, *, with_output: bool = False) -> dict[str, Statistics]:
    """What the observer `activations` has seen, by tensor: of the layers, as llama.cpp's tool keeps it."""
    found = {}
    for entry in seen["inputs"]:
        statistics = Statistics(unpack(entry["sums"]), unpack(entry["counts"]))
        for name in entry["weights"]:
            if with_output or name.startswith(_LAYERS):
                found[name] = statistics
    return found


def _about(engine: TextEngine, windows: Windows, with_output: bool) -> dict[str, object]:
    """What decides the sums, by names that a person understands."""
    return {
        "the model": file_identity(engine.info.path),
        "the active experts": engine.info.n_experts_per_token,
        "the text": windows.text_digest,
        "the windows": windows.n_context,
        "the output matrix": with_output,
    }


def _number(part: Imatrix, name: str) -> float:
    value = part.run.get(name)
    return value if isinstance(value, int | float) else 0
