"""Generating one reply: prefill what the KV cache lacks, then decode, sample, and turn tokens into text.

A `Session` is a loaded model with its one sequence; a `Generation` is one request's way through it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine import native
from dsmoe_local.engine.errors import NativeError, PromptError
from dsmoe_local.engine.prompt import PromptEncoder
from dsmoe_local.engine.stream import TextStream
from dsmoe_local.engine.types import (
    MAX_SEED,
    FinishReason,
    ModelInfo,
    PromptProgress,
    Request,
    SamplingParameters,
    TokenEvent,
    Usage,
)


@dataclass(slots=True)
class Session:
    """A loaded model and what its KV cache holds: `cached[i]` is the token at position i. Owned by one
    thread.
    """

    info: ModelInfo
    model: native.Model
    context: native.Context
    encoder: PromptEncoder
    cached: list[int] = field(default_factory=list)
    running: str | None = None

    def abort(self) -> None:
        """Interrupt the running decode step; from any thread."""
        self.context.abort()

    def clear_abort(self) -> None:
        """Allow decode steps again."""
        self.context.clear_abort()

    def log(self) -> tuple[str, ...]:
        """llama.cpp's latest log lines."""
        return native.log_lines()

    def keep_prefix_of(self, token_ids: Sequence[int]) -> int:
        """Drop what the cache holds beyond its common beginning with `token_ids`; returns that length.

        At least one token is left to decode, for its logits.
        """
        shared = 0
        for held, wanted in zip(self.cached, token_ids[:-1], strict=False):
            if held != wanted:
                break
            shared += 1
        if shared < len(self.cached):
            self.context.forget(shared)
            del self.cached[shared:]
        return shared

    def decode(self, token_ids: Sequence[int], *, logits: bool) -> bool:
        """Run tokens behind the cached ones. False if it was aborted; the cache is exact either way."""
        before = len(self.cached)
        try:
            status = self.context.decode(token_ids, before, logits=logits)
        except NativeError:
            self.cached = self.cached[: self.context.n_cached]
            raise
        if status == native.NO_SLOT:
            raise NativeError(
                "the KV cache has no room left", remedy="load the model with a larger context: -c"
            )
        done = len(token_ids) if status == native.DECODED else max(0, self.context.n_cached - before)
        self.cached += token_ids[:done]
        return status == native.DECODED

    def close(self) -> None:
        """Free everything native."""
        self.encoder.close()
        self.context.close()
        self.model.close()


class Generation:
    """One request. Iterate it once; the events are those of `TextEngine.submit`."""

    def __init__(
        self, session: Session, request: Request, submitted: float, cancelled: Callable[[], bool]
    ) -> None:
        self._session = session
        self._request = request
        self._cancelled = cancelled
        self._started = submitted
        self._stream = TextStream(request.stop)
        self._seed = _seed(request.sampling)
        self._n_prompt = self._n_cached = self._n_generated = 0
        self._prompt_read = 0.0

    def __iter__(self) -> Iterator[TokenEvent]:
        if self._cancelled():
            yield self._close(FinishReason.CANCELLED)
            return
        prompt = self._session.encoder.encode(self._request.prompt)
        self._n_prompt = len(prompt)
        room = self._session.info.n_context - len(prompt)
        if room < 1:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, the context holds {self._session.info.n_context}",
                remedy="shorten it, or load the model with a larger context: -c",
            )
        if not (yield from self._read(prompt)):
            yield self._close(FinishReason.CANCELLED)
            return
        self._prompt_read = self._now()
        # A reply that goes on may have been cut inside a character, which takes four bytes at most.
        self._stream.begin_after(b"".join(map(self._session.model.piece, prompt[-4:])))
        limit = min(room, self._request.max_tokens or room)
        full = FinishReason.LENGTH if limit == self._request.max_tokens else FinishReason.CONTEXT_FULL
        choose = _Chooser(self._session, self._request, self._seed, prompt)
        try:
            yield from self._write(choose, limit, full)
        finally:
            choose.close()

    def _read(self, prompt: Sequence[int]) -> Generator[TokenEvent, None, bool]:
        """Prefill; the generator's value says whether it came to the end."""
        self._n_cached = position = self._session.keep_prefix_of(prompt)
        step = self._session.context.n_ubatch
        while position < len(prompt):
            chunk = prompt[position : position + step]
            position += len(chunk)
            if self._cancelled() or not self._session.decode(chunk, logits=position == len(prompt)):
                return False
            if position < len(prompt):
                progress = PromptProgress(position, len(prompt))
                yield TokenEvent(self._request.id, "", self._now(), progress=progress)
        return True

    def _write(self, choose: _Chooser, limit: int, full: FinishReason) -> Iterator[TokenEvent]:
        """Decode, with the prompt's logits at hand."""
        model = self._session.model
        while True:
            token_id, logprob = choose()
            if model.ends(token_id):
                yield self._close(FinishReason.STOP, token_id, logprob)
                return
            self._n_generated += 1
            text = self._stream.feed(model.piece(token_id))
            yield TokenEvent(self._request.id, text, self._now(), token_id, logprob)
            if self._stream.stopped:
                yield self._close(FinishReason.STOP)
                return
            if self._n_generated >= limit:
                yield self._close(full)
                return
            if self._cancelled() or not self._session.decode([token_id], logits=True):
                yield self._close(FinishReason.CANCELLED)
                return

    def _close(
        self, reason: FinishReason, token_id: int | None = None, logprob: float | None = None
    ) -> TokenEvent:
        now = self._now()
        read = self._prompt_read or now
        usage = Usage(
            prompt_tokens=self._n_prompt,
            cached_tokens=self._n_cached,
            completion_tokens=self._n_generated,
            prompt_seconds=read,
            completion_seconds=now - read,
            seed=self._seed,
        )
        rest = self._stream.finish(cut=reason is not FinishReason.STOP)
        return TokenEvent(self._request.id, rest, now, token_id, logprob, finish_reason=reason, usage=usage)

    def _now(self) -> float:
        return time.perf_counter() - self._started


class _Chooser:
    """Chooses the next token from the last step's logits: argmax where that is all, else a sampler chain."""

    def __init__(self, session: Session, request: Request, seed: int | None, prompt: Sequence[int]) -> None:
        self._context = session.context
        self._logprobs = request.logprobs
        self._sampler: native.Sampler | None = None
        if not _plain_greedy(request.sampling):
            self._sampler = native.Sampler(session.context, request.sampling, seed or 0)
            n_seen = request.sampling.repeat_last_n
            self._sampler.accept(prompt[len(prompt) - min(n_seen, len(prompt)) :])

    def __call__(self) -> tuple[int, float | None]:
        logits = self._context.logits()
        best = int(logits.argmax())
        # argmax finds a NaN first, wherever it is.
        if not np.isfinite(logits[best]):
            raise NativeError("the model computes NaN or infinity", remedy="check the file: dsmoe inspect")
        token_id = best if self._sampler is None else self._sampler.sample()
        return token_id, _logprob(logits, token_id, float(logits[best])) if self._logprobs else None

    def close(self) -> None:
        """Free the chain."""
        if self._sampler is not None:
            self._sampler.close()


def _logprob(logits: npt.NDArray[np.float32], token_id: int, peak: float) -> float:
    total = float(np.exp(logits - np.float32(peak)).sum(dtype=np.float64))
    return float(logits[token_id]) - peak - float(np.log(total))


def _plain_greedy(sampling: SamplingParameters) -> bool:
    penalized = sampling.repeat_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    return sampling.temperature <= 0 and not (penalized and sampling.repeat_last_n)


def _seed(sampling: SamplingParameters) -> int | None:
    """The seed to use, and to report: None where nothing is random."""
    if sampling.temperature <= 0:
        return None
    return secrets.randbelow(MAX_SEED + 1) if sampling.seed is None else sampling.seed
