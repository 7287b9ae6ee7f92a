"""Scores windows with a model, and gives its perplexity. What else is made of it is `results`' concern."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from dsmoe_local.base.progress import Finished, Listener, Started, ignore
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.types import ModelOptions, ObserverOptions, TextEngine
from dsmoe_local.evaluate.reading import WindowReader
from dsmoe_local.evaluate.results import Evaluation, Perplexity, perplexity_of
from dsmoe_local.evaluate.windows import Windows

LOGPROBS = ObserverOptions("logprobs")

_REPORT = 1.0  # seconds between two looks at the perplexity so far
_LEAST_CELLS = 32  # the smallest cache that an engine takes


def options_for(options: ModelOptions, n_context: int, *observers: ObserverOptions) -> ModelOptions:
    """How to load a model that reads windows of `n_context` tokens.

    As many windows at once as fill a step: a step is then always full, and with windows of a step or more the
    same in every run. The cache is unified: routing is told apart in one only.
    """
    n_parallel = max(1, options.n_ubatch // n_context)
    return replace(
        options,
        n_context=max(_LEAST_CELLS, n_parallel * (n_context + 1)),
        n_parallel=n_parallel,
        unified=True,
        observers=(LOGPROBS, *observers),
    )


def name_of(engine: TextEngine) -> str:
    """The model's file: all quantizations of a model call themselves the same."""
    return safe_line(engine.info.path.stem, 80)


def measure(
    engine: TextEngine, windows: Windows, listen: Listener = ignore, stop: threading.Event | None = None
) -> Evaluation:
    """Score all windows with an engine loaded as `options_for` says, and give its perplexity.

    Setting `stop` raises InterruptedRunError. Raises EngineError; after an EngineCrashError nothing is left:
    what was seen died with the process.
    """
    began = time.perf_counter()
    stage = f"measuring {name_of(engine)}"
    listen(Started(stage, windows.n_tokens, unit="tokens"))
    so_far = _SoFar(engine)
    reader = WindowReader(engine, windows, windows.first, listen, stop or threading.Event(), so_far.tell)
    try:
        reader.read(range(len(windows.tokens)))
    except EngineError as error:
        # Of a model and its reference, only one is to blame.
        error.where = error.where or name_of(engine)
        raise
    finally:
        so_far.close()
    listen(Finished(stage))
    return Evaluation(
        model=name_of(engine),
        text=windows.text,
        text_digest=windows.text_digest,
        n_context=windows.n_context,
        n_windows=len(windows.tokens),
        seconds=time.perf_counter() - began,
        perplexity=_complete(engine, windows),
    )


def _complete(engine: TextEngine, windows: Windows) -> Perplexity:
    perplexity = perplexity_of(engine.observe(LOGPROBS.name))
    if perplexity.n_scored != windows.n_scored:
        raise EngineError(
            f"the engine scored {perplexity.n_scored} of {windows.n_scored} tokens",
            remedy="try again; its process may have been replaced",
        )
    return perplexity


class _SoFar:
    """The perplexity so far, when it has been told again."""

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine
        # An answer waits for the end of a step: meanwhile a stop must be noticed.
        self._asker = ThreadPoolExecutor(1, "dsmoe-perplexity")
        self._asked: Future[str] | None = None
        self._reported = time.perf_counter()

    def tell(self) -> str:
        """What to say beside the progress."""
        if self._asked is not None:
            if not self._asked.done():
                return ""
            told, self._asked = self._asked.result(), None
            return told
        if time.perf_counter() - self._reported >= _REPORT:
            self._reported = time.perf_counter()
            self._asked = self._asker.submit(self._ask)
        return ""

    def close(self) -> None:
        """Ask no more."""
        self._asker.shutdown(wait=False, cancel_futures=True)

    def _ask(self) -> str:
        return f"perplexity {perplexity_of(self._engine.observe(LOGPROBS.name)).perplexity.value:.4g}"
