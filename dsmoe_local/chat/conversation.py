"""The turns of one conversation and the replies to them, with exact token ids. Draws and stores nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, UsageError
from dsmoe_local.chat.settings import ChatSettings
from dsmoe_local.chat.turns import OnFull, Role, Transcript, Turn
from dsmoe_local.engine.errors import EngineCrashError, EngineError
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    Prompt,
    ReloadableEngine,
    Request,
    TokenEvent,
    Usage,
)


@dataclass(frozen=True, slots=True)
class MadeRoom:
    """The context was full: `turns` left it (compact), or the oldest `n_tokens` behind the system text."""

    turns: tuple[Turn, ...] = ()
    n_tokens: int = 0


Event: TypeAlias = TokenEvent | MadeRoom


class Conversation:
    """Messages with a model, in order; each reply keeps its token ids, so the KV cache stays valid.

    A reply's events may hold several that finish it: after making room it goes on. The last one counts, which
    `finish_reason` and `usage` are of.

    A model without a chat template completes text instead: every message is a new text, and only the last one
    and what came of it are in the context.
    """

    def __init__(self, engine: ReloadableEngine, settings: ChatSettings, system: str = "") -> None:
        self.engine = engine
        self.settings = settings
        self.system = system
        self.turns: list[Turn] = []
        self.usage: Usage | None = None
        self.finish_reason: FinishReason | None = None
        self.json_schema: str | None = None
        """What replies are constrained to."""
        self.n_used = 0
        """Tokens of the context in use, as far as is known; counts on during a reply."""
        self._n_left_out = 0
        self._n_shifted = 0
        self._numbers = itertools.count(1)
        self._running = ""
        self._cancelled = False

    @property
    def completes(self) -> bool:
        """Whether the model only completes text."""
        return self.engine.info.template is None

    @property
    def unanswered(self) -> bool:
        """Whether the last message has no reply, since that was stopped or failed before its first word."""
        return bool(self.turns) and self.turns[-1].role is Role.USER

    @property
    def transcript(self) -> Transcript:
        """What is to be kept of it."""
        return Transcript(tuple(self.turns), self.system, self._n_left_out, self._n_shifted)

    def restore(self, transcript: Transcript) -> None:
        """Go on with a kept conversation."""
        self.turns = list(transcript.turns)
        self.system = transcript.system
        self._n_left_out, self._n_shifted = transcript.n_left_out, transcript.n_shifted
        usages = [turn.usage for turn in self.turns if turn.usage is not None]
        self.usage = usages[-1] if usages else None
        self.finish_reason = self.turns[-1].ending if self.turns else None
        self._recount()

    def send(self, text: str) -> Iterator[Event]:
        """The reply to `text`. A message that was not answered gives way to it."""
        turns = self.turns[:-1] if self.unanswered else list(self.turns)
        return self._reply([*turns, Turn(Role.USER, text)], keeps_question=True)

    def regenerate(self) -> Iterator[Event]:
        """Another reply to the last message. UsageError without one."""
        return self._reply(self._up_to_question("there is nothing to answer again yet"))

    def edit(self, text: str) -> Iterator[Event]:
        """The reply to `text` in place of the last message. UsageError without one."""
        turns = self._up_to_question("there is no message to edit yet")
        return self._reply([*turns[:-1], Turn(Role.USER, text)], keeps_question=True)

    def go_on(self) -> Iterator[Event]:
        """The last reply, continued, or the reply to a message that has none. UsageError without either."""
        if not self.turns:
            raise UsageError("there is no reply to continue yet")
        return self._reply(list(self.turns))

    def undo(self, n: int = 1) -> tuple[Turn, ...]:
        """Forget the last `n` messages and their replies; returns what is forgotten, perhaps less."""
        questions = [index for index, turn in enumerate(self.turns) if turn.role is Role.USER]
        start = questions[-min(n, len(questions))] if questions else len(self.turns)
        gone = tuple(self.turns[start:])
        del self.turns[start:]
        if len(self.turns) <= self._n_left_out:
            self._n_left_out = self._n_shifted = 0
        self._recount()
        return gone

    def clear(self) -> None:
        """Forget all turns; the system text stays."""
        self.restore(Transcript(system=self.system))

    def cancel(self) -> None:
        """End the reply that was asked for last; from any thread or a signal handler."""
        self._cancelled = True
        self.engine.cancel(self._running)

    def last(self, role: Role) -> Turn | None:
        """The last turn of that role."""
        return next((turn for turn in reversed(self.turns) if turn.role is role), None)

    def messages(self) -> tuple[Message, ...]:
        """What of the conversation is in the context, but for tokens that were shifted out."""
        system = [Message("system", self.system)] if self.system else []
        return (*system, *(turn.message for turn in self.turns[self._n_left_out :]))

    def prompt(self) -> Prompt:
        """What the engine is given for the next reply."""
        if self.completes:
            return self._text_to_complete()
        messages = self.messages()
        return self._without_shifted(self.engine.encode(messages)) if self._n_shifted else messages

    def context_ids(self) -> tuple[int, ...]:
        """The exact ids of the conversation so far."""
        return self.engine.encode(self.prompt())

    def _text_to_complete(self) -> Prompt:
        index = max(index for index, turn in enumerate(self.turns) if turn.role is Role.USER)
        text, *replies = self.turns[index:]
        if not replies:
            return text.content
        if not replies[-1].token_ids:
            return text.content + replies[-1].content
        return (*self.engine.encode(text.content), *replies[-1].token_ids)

    def _up_to_question(self, complaint: str) -> list[Turn]:
        questions = [index for index, turn in enumerate(self.turns) if turn.role is Role.USER]
        if not questions:
            raise UsageError(complaint)
        return self.turns[: questions[-1] + 1]

    def _recount(self) -> None:
        try:
            self.n_used = len(self.context_ids()) if self.turns else 0
        except EngineError:
            # It is counted again with the next reply.
            self.n_used = 0

    def _reply(self, turns: list[Turn], *, keeps_question: bool = False) -> Iterator[Event]:
        """Answer `turns`. If nothing comes, the conversation is what it was before; with `keeps_question`
        what was asked stays, unless it can have no answer.
        """
        before = self.turns
        self.turns = turns
        self._cancelled = False
        return self._events(before, keeps_question=keeps_question)

    def _events(self, before: list[Turn], *, keeps_question: bool) -> Iterator[Event]:
        asked, n_used = list(self.turns), self.n_used
        keeps = keeps_question
        try:
            if not self.completes:
                yield from self._fit()
            yield from self._run()
            while self.finish_reason is FinishReason.CONTEXT_FULL and self._compacts and not self._cancelled:
                room = self._leave_out()
                if room is None:
                    return
                yield room
                yield from self._run()
        except (EngineCrashError, InterruptedRunError):
            # What was asked may well be answered next time.
            raise
        except DsmoeError:
            keeps = False
            raise
        finally:
            if self.turns == asked and not keeps:
                self.turns, self.n_used = before, n_used

    def _run(self) -> Iterator[Event]:
        """One request, and what came of it as a turn, also when an error or the reader ends it early."""
        request = self._request()
        pieces: list[str] = []
        ids: list[int] = []
        ending: FinishReason | None = FinishReason.CANCELLED
        usage: Usage | None = None
        last = False
        try:
            events = self.engine.submit(request)
            if self._cancelled:
                # Before the engine knew of it.
                self.cancel()
            # While the prompt is being read, which takes longer.
            self.n_used = len(self.engine.encode(request.prompt))
            for event in events:
                pieces.append(event.text)
                self._n_shifted += event.dropped
                if event.dropped:
                    yield MadeRoom(n_tokens=event.dropped)
                if event.finish_reason is None and event.token_id is not None:
                    ids.append(event.token_id)
                    self.n_used += 1 - event.dropped
                if event.finish_reason is not None:
                    ending, usage, last = event.finish_reason, event.usage, True
                    if event.finish_reason is FinishReason.STOP and event.token_id is None:
                        # A stop string ended it: the ids reach beyond the text.
                        ids.clear()
                    self._take_end(event)
                yield event
        finally:
            self._running = ""
            self._keep("".join(pieces), tuple(ids), ending, usage, complete=last)

    def _request(self) -> Request:
        self._running = f"chat-{next(self._numbers)}"
        shift = self.settings.on_full is OnFull.SHIFT and not self.completes
        return Request(
            self._running,
            self.prompt(),
            self.settings.sampling,
            max_tokens=self.settings.max_tokens,
            stop=self.settings.stop,
            json_schema=self.json_schema,
            context_shift=shift,
            n_keep=self._n_kept() if shift else 0,
        )

    def _take_end(self, event: TokenEvent) -> None:
        self.usage, self.finish_reason = event.usage, event.finish_reason
        if event.usage is not None and event.usage.prompt_tokens:
            shifted = event.usage.prompt_tokens + event.usage.completion_tokens > self.engine.info.n_context
            if not shifted:
                self.n_used = event.usage.prompt_tokens + event.usage.completion_tokens

    def _keep(
        self,
        text: str,
        ids: tuple[int, ...],
        ending: FinishReason | None,
        usage: Usage | None,
        *,
        complete: bool,
    ) -> None:
        nothing = not text and not ids
        if nothing and not (complete and ending is FinishReason.STOP):
            return
        if self.turns[-1].role is Role.ASSISTANT:
            begun = self.turns[-1]
            exact = (*begun.token_ids, *ids) if begun.token_ids and (ids or nothing) else ()
            turn = replace(begun, content=begun.content + text, token_ids=exact, ending=ending, usage=usage)
            self.turns = [*self.turns[:-1], turn]
        else:
            self.turns = [*self.turns, Turn(Role.ASSISTANT, text, ids, ending, usage)]

    # When the context is full.

    @property
    def _compacts(self) -> bool:
        return self.settings.on_full is OnFull.COMPACT and not self.completes

    def _fit(self) -> Iterator[MadeRoom]:
        """Make room for a reply, where that is asked for."""
        if self.settings.on_full is OnFull.STOP:
            return
        n_context = self.engine.info.n_context
        if self._n_shifted and len(self.engine.encode(self.messages())) <= self._n_kept() + self._n_shifted:
            # Undone to before what was shifted out.
            self._n_shifted = 0
        if len(self.context_ids()) <= n_context - min(self.settings.max_tokens or n_context, n_context // 4):
            return
        room = self._leave_out() if self._compacts else self._shift_out()
        if room is not None:
            yield room

    def _leave_out(self) -> MadeRoom | None:
        """Leave the oldest messages and their replies out of the context until half of it is free; the last
        message stays. None if there is no other.
        """
        start, turns = self._n_left_out, self.turns
        for index in range(start + 1, len(turns)):
            if turns[index].role is Role.USER:
                # Tokens that were shifted out are of these turns.
                self._n_left_out, self._n_shifted = index, 0
                if len(self.context_ids()) <= self.engine.info.n_context // 2:
                    break
        gone = tuple(turns[start : self._n_left_out])
        return MadeRoom(turns=gone) if gone else None

    def _shift_out(self) -> MadeRoom | None:
        """Leave out what is oldest behind the system text until half of the context is free; the last message
        stays. None if there is nothing else.
        """
        n_ids, kept = len(self.engine.encode(self.messages())), self._n_kept()
        most = self._length_before_question() - kept - self._n_shifted
        count = min(n_ids - self._n_shifted - self.engine.info.n_context // 2, most)
        if count < 1:
            return None
        self._n_shifted += count
        return MadeRoom(n_tokens=count)

    def _length_before_question(self) -> int:
        messages = self.messages()
        index = max(index for index, message in enumerate(messages) if message.role == Role.USER)
        return len(self.engine.encode(messages[:index])) if index > 0 else 0

    def _n_kept(self) -> int:
        """Tokens at the beginning that are never shifted out: the start token, and the system text."""
        if not self.system:
            return 1
        messages = self.messages()
        return max(1, _n_common(self.engine.encode(messages[:1]), self.engine.encode(messages)))

    def _without_shifted(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        kept = self._n_kept()
        return (*ids[:kept], *ids[kept + self._n_shifted :])


def _n_common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
