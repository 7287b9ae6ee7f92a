"""Measures the perplexity of a model on windows of a text."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from dsmoe_local.base.progress import Finished, Listener, Started, ignore
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import MIN_CONTEXT, NO_TEMPLATE, PROMPTS_ONLY, ModelOptions, ObserverOptions
from dsmoe_local.evaluate.results import Evaluation, Perplexity, perplexity_of
from dsmoe_local.evaluate.windows import WindowReader, Windows
from dsmoe_local.model.split_name import model_stem

LOGPROBS = ObserverOptions("logprobs")

_REPORT_SECONDS = 1.0  # between updates of the perplexity so far


def options_for(options: ModelOptions, n_context: int, *observers: ObserverOptions) -> ModelOptions:
    """Return the options to load a model that reads windows of `n_context` tokens.

    As many windows are read at once as fit into a ubatch, so that ubatches are full. For windows of a ubatch
    or more, ubatches are the same in every run. The cache is unified, as routing observers require.
    """
    n_parallel = max(1, options.n_ubatch // n_context)
    return replace(
        options,
        n_context=max(MIN_CONTEXT, n_parallel * (n_context + 1)),
        n_parallel=n_parallel,
        unified=True,
        chat_template=NO_TEMPLATE,
        prompt_ratio=PROMPTS_ONLY,
        observers=(LOGPROBS, *observers),
    )


def name_of(engine: TextEngine) -> str:
    """Return the name of the model's file, since all quantizations have the same name in their metadata."""
    return safe_line(model_stem(engine.info.path), 80)


def measure(
    engine: TextEngine, windows: Windows, listen: Listener = ignore, stop: threading.Event | None = None
) -> Evaluation:
    """Score all windows with an engine loaded with `options_for`, and return the perplexity.

    Raises InterruptedRunError once `stop` is set, EngineError. After an EngineCrashError the measurement must
    start again, since the observers were in the engine's process.
    """
    began = time.perf_counter()
    stage = f"measuring {name_of(engine)}"
    listen(Started(stage, windows.n_tokens, unit="tokens"))
    running = _RunningPerplexity(engine)
    reader = WindowReader(engine, windows, windows.first, listen, stop or threading.Event(), running.text)
    try:
        reader.read(range(len(windows.tokens)))
    except EngineError as error:
        # Name the model that failed, since the reference has another one.
        error.where = error.where or name_of(engine)
        raise
    finally:
        running.close()
    listen(Finished(stage))
    return Evaluation(
        model=name_of(engine),
        text=windows.text,
        text_digest=windows.text_digest,
        n_context=windows.n_context,
        n_windows=len(windows.tokens),
        seconds=time.perf_counter() - began,
        perplexity=_final_perplexity(engine, windows),
    )


def _final_perplexity(engine: TextEngine, windows: Windows) -> Perplexity:
    perplexity = perplexity_of(engine.observe(LOGPROBS.name))
    if perplexity.n_scored != windows.n_scored:
        raise EngineError(
            f"the engine scored {perplexity.n_scored} of {windows.n_scored} tokens",
            remedy="its process may have been restarted: try again",
        )
    return perplexity


class _RunningPerplexity:
    """Asks the engine for the perplexity about once a second, in a separate thread.

    The engine answers only after its current step, and the caller must still react to `stop`.
    """

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(1, "dsmoe-perplexity")
        self._answer: Future[str] | None = None
        self._last = time.perf_counter()

    def text(self) -> str:
        """Return the latest perplexity as text if it is new, otherwise ""."""
        if self._answer is not None:
            if not self._answer.done():
                return ""
            answer, self._answer = self._answer.result(), None
            return answer
        if time.perf_counter() - self._last >= _REPORT_SECONDS:
            self._last = time.perf_counter()
            self._answer = self._executor.submit(self._ask)
        return ""

    def close(self) -> None:
        """Stop asking."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _ask(self) -> str:
        return f"perplexity {perplexity_of(self._engine.observe(LOGPROBS.name)).perplexity.value:.4g}"
