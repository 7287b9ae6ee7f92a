"""A running request and its replies: detokenization, reasoning, limits, stop strings and events."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dsmoe_local.engine import native
from dsmoe_local.engine.interface import Deliver
from dsmoe_local.engine.observe.observer import StepLogits
from dsmoe_local.engine.reasoning import ReasoningFormat, ReasoningGuide
from dsmoe_local.engine.sampling import Choice, CompiledGrammar, TokenSampler, choose_seed
from dsmoe_local.engine.sampling.likeliest import Logits
from dsmoe_local.engine.schedule.plan import Sequence
from dsmoe_local.engine.text_stream import TextStream
from dsmoe_local.engine.tools.support import ToolSupport
from dsmoe_local.engine.types import (
    MAX_SEED,
    FinishReason,
    PromptProgress,
    Request,
    TokenEvent,
    TokenLogprob,
    Usage,
)


@dataclass(slots=True, eq=False)
class Job:
    """A submitted request. `n_open` is the number of its replies that have not ended.

    `grammar` is set when the request is checked, if it has a grammar or a JSON schema.
    """

    request: Request
    deliver: Deliver
    grammar: CompiledGrammar | None = None
    submitted: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    n_open: int = 0

    @property
    def seconds(self) -> float:
        """Seconds since it was submitted."""
        return time.perf_counter() - self.submitted

    def drop(self) -> None:
        """Deliver the last events of a request that was cancelled before it was scheduled."""
        for index in range(self.request.n):
            usage = Usage(0, 0, 0, self.seconds, 0.0, choose_seed(self.request.sampling))
            event = TokenEvent(
                self.request.id,
                "",
                self.seconds,
                finish_reason=FinishReason.CANCELLED,
                usage=usage,
                index=index,
            )
            self.deliver(event)


class Reply:
    """One reply of a request. Delivers the events that TokenEvent describes."""

    def __init__(
        self,
        job: Job,
        index: int,
        prompt: tuple[int, ...],
        context: native.Context,
        n_context: int,
        reasoning: ReasoningFormat | None,
        tools: ToolSupport | None,
    ) -> None:
        """Create the sampler. `prompt` are the token ids, `n_context` the context length of a request.

        `reasoning` is that of the model, if it reasons. `tools` says how the model writes tool calls.
        """
        request = job.request
        self.job = job
        self.index = index
        self._model = context.model
        self._seed = choose_seed(request.sampling)
        if self._seed is not None:
            self._seed = (self._seed + index) % (MAX_SEED + 1)
        self._sampler = TokenSampler(self._model, context, request, self._seed, prompt, job.grammar)
        self._guide: ReasoningGuide | None = None
        if reasoning is not None:
            constrained = job.grammar is not None
            self._guide = reasoning.guide(
                request.start, prompt, budget=request.reasoning_budget, constrained=constrained
            )
        self._tools = tools if request.tools is not None else None
        self._stream = TextStream(
            request.stop,
            None if self._guide is None else self._guide.parser,
            None if self._tools is None else self._tools.parser(request),
        )
        # A continued reply may end in an incomplete character, which is at most four bytes long.
        self._stream.begin_after(b"".join(map(self._model.piece, prompt[-4:])))
        left = None if request.context_shift else n_context - len(prompt)
        limits = [limit for limit in (left, request.max_tokens) if limit is not None]
        self._limit = min(limits, default=None)
        self._limit_reason = (
            FinishReason.LENGTH if self._limit == request.max_tokens else FinishReason.CONTEXT_FULL
        )
        self._n_generated = 0
        score_from = 0 if request.scores_prompt else request.score_from
        self._prompt_read: float | None = None
        self.sequence = Sequence(
            list(prompt),
            n_most=None if request.max_tokens is None else len(prompt) + request.max_tokens,
            n_reusable=score_from,
            score_from=score_from,
            can_shift=request.context_shift,
            n_keep=request.n_keep,
        )

    def choose(self, logits: Logits) -> Choice:
        """Sample the next token. `logits` are those of the latest token."""
        if self._prompt_read is None:
            self._prompt_read = self.job.seconds
            if self.job.request.echo:
                self._echo()
        if self._guide is None:
            return self._sampler.choose(logits)
        return self._sampler.choose(logits, self._guide.replace)

    def _echo(self) -> None:
        """Deliver the text of the prompt."""
        prompt = self.job.request.prompt
        if not isinstance(prompt, str):
            prompt = self._model.text_of_all(self.sequence.tokens)
        self.job.deliver(TokenEvent(self.job.request.id, prompt, self.job.seconds, index=self.index))

    def score(self, start: int, logits: StepLogits) -> None:
        """Deliver the log-probabilities of the prompt's tokens from index `start` on, if they are wanted.

        Row j of `logits` predicts the token at index `start` + j.
        """
        if not self.job.request.scores_prompt or start > self.sequence.n_prompt:
            return
        tokens = self.sequence.tokens[start : min(start + len(logits), self.sequence.n_prompt)]
        scored = [self._sampler.score(row, token) for row, token in zip(logits, tokens, strict=False)]
        if start == 1:
            first = self.sequence.tokens[0]
            # The text of a prompt lacks the BOS that encoding adds.
            is_added = isinstance(self.job.request.prompt, str) and self._model.adds_bos
            text = "" if is_added else self._model.text_of(first)
            scored.insert(0, (TokenLogprob(first, text, 0.0),))
            start = 0
        self.job.deliver(
            TokenEvent(
                self.job.request.id,
                "",
                self.job.seconds,
                index=self.index,
                prompt_tokens=tuple(scored),
                prompt_start=start,
            )
        )

    def take(self, choice: Choice) -> FinishReason | None:
        """Deliver a sampled token. Returns the finish reason if the reply has ended, otherwise None."""
        if self._limit == 0:
            return self.end(self._limit_reason)
        if self._model.ends(choice.token_id):
            self.end(FinishReason.STOP, choice)
            return FinishReason.STOP
        self._n_generated += 1
        piece, in_reasoning = self._model.piece(choice.token_id), False
        if self._guide is not None:
            piece, in_reasoning = self._guide.take(choice.token_id)
        if self._tools is not None and not in_reasoning:
            piece = self._tools.pieces.get(choice.token_id, piece)
        parts = self._stream.feed(piece)
        dropped, dropped_from = self._take_dropped()
        self.job.deliver(
            TokenEvent(
                self.job.request.id,
                parts.answer,
                self.job.seconds,
                choice.token_id,
                choice.logprob,
                index=self.index,
                alternatives=choice.alternatives,
                dropped=dropped,
                dropped_from=dropped_from,
                held=self._stream.holds,
                reasoning=parts.reasoning,
                in_reasoning=in_reasoning,
                calls=parts.calls,
            )
        )
        if self._stream.stopped:
            return self.end(FinishReason.STOP)
        if self._n_generated == self._limit:
            return self.end(self._limit_reason)
        return None

    def progress(self, done: int, total: int) -> None:
        """Deliver the progress of the prompt, except when it is processed again after a preemption."""
        if self._prompt_read is not None:
            return
        self.job.deliver(
            TokenEvent(
                self.job.request.id,
                "",
                self.job.seconds,
                progress=PromptProgress(done, total),
                index=self.index,
            )
        )

    def end(self, reason: FinishReason, choice: Choice | None = None) -> FinishReason:
        """Free the sampler and deliver the last event. `choice` is the end token, if there is one."""
        self.close()
        now = self.job.seconds
        dropped, dropped_from = self._take_dropped()
        read = now if self._prompt_read is None else self._prompt_read
        usage = Usage(
            prompt_tokens=self.sequence.n_prompt,
            cached_tokens=self.sequence.n_reused or 0,
            completion_tokens=self._n_generated,
            prompt_seconds=read,
            completion_seconds=now - read,
            seed=self._seed,
            reasoning_tokens=0 if self._guide is None else self._guide.n_tokens,
        )
        parts = self._stream.finish(cut=reason is not FinishReason.STOP)
        self.job.deliver(
            TokenEvent(
                self.job.request.id,
                parts.answer,
                now,
                None if choice is None else choice.token_id,
                None if choice is None else choice.logprob,
                finish_reason=reason,
                usage=usage,
                index=self.index,
                alternatives=() if choice is None else choice.alternatives,
                dropped=dropped,
                dropped_from=dropped_from,
                reasoning=parts.reasoning,
                calls=parts.calls,
                stop=self._stream.stopped_by,
            )
        )
        return reason

    def _take_dropped(self) -> tuple[int, int]:
        dropped, self.sequence.dropped = self.sequence.dropped, (0, 0)
        return dropped

    def close(self) -> None:
        """Free the sampler."""
        self._sampler.close()
