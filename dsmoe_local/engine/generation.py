"""Generating one reply: prefill what the KV cache lacks, then decode, sample, and turn tokens into text.

A `Session` is a loaded model with its one sequence; a `Generation` is one request's way through it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from dsmoe_local.engine import native
from dsmoe_local.engine.errors import NativeError, PromptError
from dsmoe_local.engine.prompts.encoder import PromptEncoder
from dsmoe_local.engine.sampling import Chooser, choose_seed
from dsmoe_local.engine.stream import TextStream
from dsmoe_local.engine.types import (
    FinishReason,
    ModelInfo,
    PromptProgress,
    Request,
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
            self.context.forget(0, shared)
            del self.cached[shared:]
        return shared

    def decode(self, token_ids: Sequence[int], *, logits: bool) -> bool:
        """Run tokens behind the cached ones. False if it was aborted; the cache is exact either way."""
        before = len(self.cached)
        try:
            status = self.context.decode([native.Row(0, before, token_ids, int(logits))])
        except NativeError:
            self.cached = self.cached[: self.context.n_cached(0)]
            raise
        if status == native.NO_SLOT:
            raise NativeError(
                "the KV cache has no room left", remedy="load the model with a larger context: -c"
            )
        done = len(token_ids) if status == native.DECODED else max(0, self.context.n_cached(0) - before)
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
        self._seed = choose_seed(request.sampling)
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
        choose = Chooser(self._session.model, self._session.context, self._request, self._seed, prompt)
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

    def _write(self, choose: Chooser, limit: int, full: FinishReason) -> Iterator[TokenEvent]:
        """Decode, with the prompt's logits at hand."""
        model = self._session.model
        while True:
            token_id, logprob = choose(-1, self._session.context.logits()[0])
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
