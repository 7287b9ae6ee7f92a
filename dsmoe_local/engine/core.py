"""Runs the steps of an engine: decodes the batch that the scheduler planned and samples the next tokens.

Used by the engine's thread only, except for `interrupt`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine import idle_operations, native
from dsmoe_local.engine.errors import EngineError, NativeError, too_long
from dsmoe_local.engine.load.loaded_model import LoadedModel
from dsmoe_local.engine.observe.observer import Scored, StepLogits
from dsmoe_local.engine.reply import Job, Reply
from dsmoe_local.engine.schedule import plan
from dsmoe_local.engine.schedule.scheduler import Scheduler
from dsmoe_local.engine.types import FinishReason, ObserverOptions

_PADDING_TOKEN = 0  # any token will do: its logits are never read


@dataclass(frozen=True, slots=True)
class _Placed:
    """A row of a step with its index in the batch and the index of its last output."""

    row: plan.StepRow
    row_index: int
    output_index: int


class Core:
    """Runs requests on a loaded model, one step after another.

    `finished` is called after the last event of each request, with the error that ended it, or None. `lost`
    is set if the context is gone, after which no step can run.
    """

    def __init__(self, loaded: LoadedModel, finished: Callable[[Job, Exception | None], None]) -> None:
        self._loaded = loaded
        self._finished = finished
        self.scheduler = Scheduler(loaded.limits)
        self.lost: Exception | None = None
        self._replies: dict[plan.Sequence, Reply] = {}
        self._lock = threading.RLock()
        self._computing: dict[Job, bool] = {}
        self._shifting = False
        self._alone = False

    @property
    def idle(self) -> bool:
        """True if no request is waiting or running."""
        return self.scheduler.idle

    @property
    def reads_prompts(self) -> bool:
        """True if the next step may include a prefill, which may take long."""
        return bool(self.scheduler.waiting) or any(s.prefilling for s in self.scheduler.running)

    def add(self, job: Job, prompt: tuple[int, ...]) -> None:
        """Schedule a request. Raises PromptError if it is too long, UsageError if it is not supported."""
        n_context = self._loaded.info.n_context
        if len(prompt) >= n_context:
            raise too_long(f"{len(prompt):,} tokens", n_context, self._loaded.info.n_context_trained)
        if job.request.context_shift and not self._loaded.context.can_shift:
            raise UsageError(
                "context_shift: the KV cache of this model cannot be shifted",
                remedy="set it to false; in a chat: /set on_full compact",
            )
        if job.request.score_from is not None and not self._loaded.observers.reads_logits:
            raise UsageError(
                "score_from: no observer reads logits", remedy="load the model with one, such as logprobs"
            )
        replies: list[Reply] = []
        try:
            for index in range(job.request.n):
                encoder = self._loaded.encoder
                reply = Reply(
                    job, index, prompt, self._loaded.context, n_context, encoder.reasoning, encoder.tools
                )
                replies.append(reply)
        except BaseException:
            for reply in replies:
                reply.close()
            raise
        job.n_open = len(replies)
        for reply in replies:
            self._replies[reply.sequence] = reply
            self.scheduler.add(reply.sequence)

    def cancel(self, job: Job) -> None:
        """End the replies of a request with the reason CANCELLED."""
        for reply in self._of(job):
            self._end(reply.sequence, FinishReason.CANCELLED)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a request with an error. Its replies get no further events."""
        for reply in self._of(job):
            self._take_out(reply)
        self._finished(job, error)

    def interrupt(self, job: Job) -> None:
        """Abort the running step if it is a prefill of the cancelled `job`, or contains no other request.

        Any thread may call it. A decoding step with other requests is not aborted, since it is short.
        """
        with self._lock:
            if self._computing.get(job) or (self._alone and job in self._computing):
                self._loaded.context.abort()

    def step(self) -> None:
        """Compute one step and deliver its events."""
        step = self.scheduler.plan()
        for operation in step.operations:
            self._perform(operation)
        for sequence in step.full:
            self._end(sequence, FinishReason.CONTEXT_FULL)
        context = self._loaded.context
        incomplete = [each for each in step.reused if not context.can_continue(each.slot, each.n_cached)]
        for sequence in incomplete:
            self.scheduler.restart(sequence)
        # The other rows are planned again, since restarting changes what fits.
        if step.rows and not incomplete:
            self._decode(step)

    # Only while idle.

    def save_cache(self, path: Path, token_ids: list[int], start: int) -> int:
        """See TextEngine. The file is not synced."""
        if not self._can_move_cache():
            return 0
        self._apply_operations()
        return idle_operations.save_cache(self._loaded, self.scheduler.cache, path, token_ids, start)

    def load_cache(self, path: Path, token_ids: list[int]) -> int:
        if not self._can_move_cache():
            return 0
        self._apply_operations()
        return idle_operations.load_cache(
            self._loaded, self.scheduler.cache, self._apply_operations, path, token_ids
        )

    def _can_move_cache(self) -> bool:
        return self.idle and not self._loaded.limits.deterministic and self._loaded.model.has_plain_cache

    def set_observers(self, options: tuple[ObserverOptions, ...]) -> None:
        """See TextEngine. Sets `lost` if the context is closed and a new one cannot be created."""
        if not self.idle:
            raise EngineError(
                "observers cannot be changed while requests are running", remedy="wait, or cancel them first"
            )
        try:
            idle_operations.exchange_observers(
                self._loaded, self.scheduler.cache, self._apply_operations, options
            )
        except Exception as error:
            if not self._loaded.context.handle:
                self.lost = error
            raise
        n_outputs = self._loaded.context.options.n_outputs
        self.scheduler.limits = replace(self.scheduler.limits, n_outputs=n_outputs)

    def _apply_operations(self) -> None:
        for operation in self.scheduler.cache.take_operations():
            self._perform(operation)

    def _of(self, job: Job) -> list[Reply]:
        return [reply for reply in self._replies.values() if reply.job is job]

    def _perform(self, operation: plan.Operation) -> None:
        if isinstance(operation, plan.Copy):
            self._loaded.context.copy(operation.source, operation.target, operation.n_tokens)
        elif isinstance(operation, plan.Forget):
            self._loaded.context.forget(operation.sequence, operation.start)
        else:
            end = operation.start + operation.n_tokens
            self._loaded.context.forget(operation.sequence, operation.start, end)
            self._loaded.context.shift(operation.sequence, end, operation.n_tokens)
            self._shifting = True

    def _decode(self, step: plan.Step) -> None:
        placed, rows = self._place(step)
        observers = self._loaded.observers
        if not self._begin(placed):
            return
        try:
            observers.before_step(rows)
            status = self._loaded.context.decode(rows)
            if status == native.NO_SLOT:
                raise NativeError(
                    "the KV cache has no room left", remedy="load the model with a larger context: -c"
                )
        except Exception as error:  # noqa: BLE001 - delivered to the requests of the step
            self._lose(step, error)
            return
        finally:
            with self._lock:
                self._computing = {}
                self._loaded.context.clear_abort()
        self._shifting = False
        for padding in step.padding:
            if self._loaded.context.n_cached(padding.slot) > padding.position:
                self._loaded.context.forget(padding.slot, padding.position)
        if status == native.ABORTED:
            for row in step.rows:
                self.scheduler.resync(row.sequence, self._loaded.context.n_cached(row.sequence.slot))
            return
        self.scheduler.commit(step)
        logits = self._loaded.context.logits()
        try:
            scored = self._scored(placed, len(rows)) if observers.reads_logits else ()
            observers.after_step(rows, logits, scored)
        except Exception as error:  # noqa: BLE001 - delivered to the requests of the step
            self._lose(step, error)
            return
        self._advance(placed, logits)

    def _place(self, step: plan.Step) -> tuple[list[_Placed], list[native.Row]]:
        """Return the rows and padding of a step as a batch, sorted by slot if the cache is not unified."""
        placed: list[_Placed] = []
        rows: list[native.Row] = []
        n_outputs = 0
        parts: list[plan.StepRow | plan.Padding] = [*step.rows, *step.padding]
        if not self.scheduler.limits.unified:
            parts.sort(key=lambda part: part.slot if isinstance(part, plan.Padding) else part.sequence.slot)
        for part in parts:
            if isinstance(part, plan.Padding):
                row = native.Row(part.slot, part.position, (_PADDING_TOKEN,), 1)
            else:
                tokens = part.sequence.tokens[part.start : part.start + part.n_tokens]
                row = native.Row(part.sequence.slot, part.start, tokens, part.n_outputs)
            n_outputs += row.n_outputs
            rows.append(row)
            if isinstance(part, plan.StepRow):
                placed.append(_Placed(part, len(rows) - 1, n_outputs - 1))
        return placed, rows

    def _begin(self, placed: Sequence[_Placed]) -> bool:
        """Enable `interrupt` for a step. Returns False if one of its requests is already cancelled."""
        with self._lock:
            computing: dict[Job, bool] = {}
            for place in placed:
                job = self._replies[place.row.sequence].job
                computing[job] = computing.get(job, False) or place.row.n_tokens > 1
            if any(job.cancelled for job in computing):
                return False
            # llama.cpp shifts cells at the start of the next step. After an abort it would shift some again.
            self._computing = {} if self._shifting else computing
            self._alone = len(computing) == 1
        return True

    def _scored(self, placed: Sequence[_Placed], n_rows: int) -> list[Scored | None]:
        """Return, for each row of the batch, the prompt tokens that its outputs are scored against."""
        scored: list[Scored | None] = [None] * n_rows
        for place in placed:
            sequence, start, n_tokens, n_outputs = place.row
            if sequence.score_from is None or start >= sequence.n_prompt:
                continue
            first = start + n_tokens - n_outputs + 1
            targets = sequence.tokens[first : min(start + n_tokens + 1, sequence.n_prompt)]
            scored[place.row_index] = Scored(self._replies[sequence].job.request.id, first, targets)
        return scored

    def _advance(self, placed: Sequence[_Placed], logits: StepLogits) -> None:
        """Sample the next token of every sequence whose prompt is complete."""
        for place in placed:
            sequence = place.row.sequence
            reply = self._replies.get(sequence)
            if reply is None:  # its request failed in this step
                continue
            _, start, n_tokens, n_outputs = place.row
            end = place.output_index + 1
            try:
                reply.score(start + n_tokens - n_outputs + 1, logits[end - n_outputs : end])
                if sequence.n_cached < len(sequence.tokens):
                    reply.progress(sequence.n_cached, len(sequence.tokens))
                    continue
                choice = reply.choose(logits[place.output_index])
                reason = reply.take(choice)
            except Exception as error:  # noqa: BLE001 - delivered to the request that caused it
                self._fail(reply.job, error)
                continue
            if reason is None:
                self.scheduler.append(sequence, choice.token_id)
            else:
                self._remove(reply)

    def _lose(self, step: plan.Step, error: Exception) -> None:
        """End the requests of a failed step with the error, and drop their cells."""
        for padding in step.padding:
            self._loaded.context.forget(padding.slot, padding.position)
        for row in step.rows:
            self.scheduler.lose(row.sequence)
        for job in {self._replies[row.sequence].job for row in step.rows}:
            self._fail(job, error)

    def _end(self, sequence: plan.Sequence, reason: FinishReason) -> None:
        reply = self._replies.get(sequence)
        if reply is None:  # its request has failed
            return
        try:
            reply.end(reason)
        except Exception as error:  # noqa: BLE001 - delivered to the request that caused it
            self._fail(reply.job, error)
        else:
            self._remove(reply)

    def _remove(self, reply: Reply) -> None:
        """Remove a reply after its last event."""
        self._take_out(reply)
        if reply.job.n_open == 0:
            self._finished(reply.job, None)

    def _take_out(self, reply: Reply) -> None:
        reply.close()
        del self._replies[reply.sequence]
        self.scheduler.finish(reply.sequence)
        reply.job.n_open -= 1
