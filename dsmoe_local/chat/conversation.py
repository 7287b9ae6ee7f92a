"""The turns of one conversation and the replies to them, with exact token ids. Draws and stores nothing.

What of it is in the context, and what leaves when that is full, is `context`'s concern.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, UsageError
from dsmoe_local.chat import context
from dsmoe_local.chat.context import MadeRoom
from dsmoe_local.chat.settings import ChatSettings, OnFull
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.errors import EngineCrashError, EngineError
from dsmoe_local.engine.interface import ReloadableEngine
from dsmoe_local.engine.types import FinishReason, Message, Request, TokenEvent, Usage


@dataclass(frozen=True, slots=True)
class Asked:
    """A reply begins; what it answers is in the transcript now, and may be made durable."""


Event: TypeAlias = Asked | MadeRoom | TokenEvent
"""What a reply consists of: Asked, then the others. Several of them may finish it: after making room it goes
on, so the last one counts.
"""
Reply: TypeAlias = Generator[Event, None, None]
"""A reply in the making. Close it, where it is not read to its end: what came is a turn then."""


@dataclass(slots=True)
class _Growing:
    """What came of the running reply. Its first `n_pieces` are exactly the text of its first `n_ids`."""

    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    n_pieces: int = 0
    n_ids: int = 0

    def add(self, event: TokenEvent) -> None:
        self.pieces.append(event.text)
        if event.finish_reason is FinishReason.STOP and event.token_id is None:
            # A stop string ended it: the ids reach beyond the text.
            self.ids.clear()
        elif event.finish_reason is None and event.token_id is not None:
            self.ids.append(event.token_id)
        if not event.held:
            self.n_pieces, self.n_ids = len(self.pieces), len(self.ids)

    def exact(self) -> tuple[str, tuple[int, ...]]:
        """Text and ids from where it can go on, without what is held back at its end."""
        return "".join(self.pieces[: self.n_pieces]), tuple(self.ids[: self.n_ids])


@dataclass(frozen=True, slots=True)
class _Books:
    """All that changes with a reply, to go back to if nothing comes of it."""

    transcript: Transcript
    n_used: int = 0
    usage: Usage | None = None
    finish_reason: FinishReason | None = None


class Conversation:
    """Messages with a model, in order; each reply keeps its token ids, so the KV cache stays valid.

    Replies are iterators that do nothing before they are begun. If nothing comes of one, the conversation is
    what it was before; but a new message stays, unanswered, unless it can have no answer.
    """

    def __init__(self, engine: ReloadableEngine, settings: ChatSettings, system: str = "") -> None:
        self.engine = engine
        self.settings = settings
        self.json_schema: str | None = None
        """What replies are constrained to."""
        self._books = _Books(Transcript(system=system))
        # While a turn is being replaced: what is to be kept until there is another.
        self._replaced: Transcript | None = None
        self._growing: _Growing | None = None
        self._numbers = itertools.count(1)
        self._cancelled = False

    @property
    def completes(self) -> bool:
        """Whether the model only completes text."""
        return context.completes(self.engine)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns, also those that left the context."""
        return self._books.transcript.turns

    @property
    def system(self) -> str:
        """The system text; empty for none."""
        return self._books.transcript.system

    @property
    def n_used(self) -> int:
        """Tokens of the context in use, as far as is known; counts on during a reply."""
        return self._books.n_used

    @property
    def usage(self) -> Usage | None:
        """What the last reply took."""
        return self._books.usage

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the last reply ended."""
        return self._books.finish_reason

    @property
    def unanswered(self) -> bool:
        """Whether the last message has no reply, since that was stopped or failed before its first word."""
        return bool(self.turns) and self.turns[-1].role is Role.USER

    @property
    def transcript(self) -> Transcript:
        """What is to be kept of it. A reply that is being replaced stays in it until there is another."""
        return self._replaced or self._books.transcript

    @property
    def growing(self) -> Transcript | None:
        """What would be kept if the running reply broke off here; None if nothing would."""
        reply = self._growing
        if reply is None or not reply.n_ids:
            return None
        turns = self._turns_with(*reply.exact(), FinishReason.CANCELLED, None)
        return replace(self._books.transcript, turns=turns)

    def restore(self, transcript: Transcript) -> None:
        """Go on with a kept conversation."""
        usages = [turn.usage for turn in transcript.turns if turn.usage is not None]
        ending = transcript.turns[-1].ending if transcript.turns else None
        self._books = _Books(transcript, 0, usages[-1] if usages else None, ending)
        self._recount()

    def set_system(self, text: str) -> None:
        """Change the system text; empty for none."""
        self._change(transcript=replace(self._books.transcript, system=text))
        self._recount()

    def send(self, text: str) -> Reply:
        """The reply to `text`. A message that was not answered gives way to it."""
        turns = self.turns[:-1] if self.unanswered else self.turns
        return self._reply((*turns, Turn(Role.USER, text)), new=True)

    def regenerate(self) -> Reply:
        """Another reply to the last message. UsageError without one."""
        return self._reply(self._up_to_question("there is nothing to answer again yet"))

    def edit(self, text: str) -> Reply:
        """The reply to `text` in place of the last message. UsageError without one."""
        turns = self._up_to_question("there is no message to edit yet")
        return self._reply((*turns[:-1], Turn(Role.USER, text)))

    def go_on(self) -> Reply:
        """The last reply, continued, or the reply to a message that has none.

        UsageError without either, or if the model has ended the reply itself.
        """
        if not self.turns:
            raise UsageError("there is no reply to continue yet")
        last = self.turns[-1]
        if not self.completes and last.token_ids and last.ending is FinishReason.STOP:
            raise UsageError("the reply is complete", remedy="/regen answers again; or ask for more")
        return self._reply(self.turns)

    def undo(self, n: int = 1) -> tuple[Turn, ...]:
        """Take back the last `n` messages and their replies; returns them, perhaps fewer."""
        questions = [index for index, turn in enumerate(self.turns) if turn.role is Role.USER]
        start = questions[-min(n, len(questions))] if questions else len(self.turns)
        kept, gone = self._books.transcript, self.turns[start:]
        if start <= kept.n_left_out:
            kept = replace(kept, n_left_out=0, n_shifted=0)
        self.restore(replace(kept, turns=kept.turns[:start], undone=(*gone, *kept.undone)))
        return gone

    def redo(self, n: int = 1) -> tuple[Turn, ...]:
        """Bring back the next `n` messages that were undone, with their replies; returns them, perhaps fewer.
        Whatever else is said after an undo ends this.
        """
        kept = self._books.transcript
        ends = [place for place, turn in enumerate(kept.undone) if place and turn.role is Role.USER]
        end = [*ends, len(kept.undone)][min(n, len(ends) + 1) - 1]
        back = kept.undone[:end]
        if back:
            self.restore(replace(kept, turns=(*kept.turns, *back), undone=kept.undone[end:]))
        return back

    def clear(self) -> None:
        """Forget all turns; the system text stays."""
        self.restore(Transcript(system=self.system))

    def cancel(self) -> None:
        """End the reply that was asked for last; from any thread or a signal handler."""
        self._cancelled = True
        # All: also a load that a crash made necessary, whoever waits for it.
        self.engine.cancel_all()

    def last(self, role: Role) -> Turn | None:
        """The last turn of that role."""
        return next((turn for turn in reversed(self.turns) if turn.role is role), None)

    def messages(self) -> tuple[Message, ...]:
        """What of the conversation is in the context, but for tokens that were shifted out."""
        return context.messages(self._books.transcript)

    def context_ids(self) -> tuple[int, ...]:
        """The exact ids of the conversation so far; none without turns."""
        return context.token_ids(self._books.transcript, context.Encoder(self.engine))

    def _up_to_question(self, complaint: str) -> tuple[Turn, ...]:
        questions = [index for index, turn in enumerate(self.turns) if turn.role is Role.USER]
        if not questions:
            raise UsageError(complaint)
        return self.turns[: questions[-1] + 1]

    def _change(
        self, *, transcript: Transcript | None = None, turns: tuple[Turn, ...] | None = None, n_used: int = -1
    ) -> None:
        transcript = transcript or self._books.transcript
        if turns is not None:
            transcript = replace(transcript, turns=turns, undone=())
        used = self._books.n_used if n_used < 0 else n_used
        self._books = replace(self._books, transcript=transcript, n_used=used)

    def _recount(self) -> None:
        """Count what is in the context; with the next reply, if the engine is not there to ask."""
        n_used = 0
        if self.engine.alive:
            with suppress(EngineError):
                n_used = len(self.context_ids())
        self._change(n_used=n_used)

    def _reply(self, turns: tuple[Turn, ...], *, new: bool = False) -> Reply:
        self._cancelled = False
        return self._events(turns, new=new)

    def _events(self, asked: tuple[Turn, ...], *, new: bool) -> Reply:
        """Answer `asked`. `new`: its last message is kept even without an answer."""
        before, stays = self._books, new
        if not new and asked != before.transcript.turns:
            self._replaced = before.transcript
        self._change(turns=asked)
        try:
            yield Asked()
            encoder = context.Encoder(self.engine)
            kept, room = context.fitted(
                self._books.transcript,
                encoder,
                self.settings.on_full,
                self.settings.max_tokens,
                lambda: self._cancelled,
            )
            self._change(transcript=kept)
            if room is not None:
                yield room
            yield from self._run(encoder)
            while (room := self._room_to_go_on(encoder)) is not None:
                yield room
                yield from self._run(encoder)
        except (EngineCrashError, InterruptedRunError):
            # What was asked may well be answered next time.
            raise
        except DsmoeError:
            stays = False
            raise
        finally:
            self._replaced = None
            if self.turns == asked and stays:
                kept = replace(before.transcript, turns=asked)
                self._books = replace(self._books, transcript=kept)
            elif self.turns == asked:
                self._books = before

    def _room_to_go_on(self, encoder: context.Encoder) -> MadeRoom | None:
        """Where a reply was cut by the context and older messages may leave it: what does."""
        compacts = self.settings.on_full is OnFull.COMPACT and not self.completes
        if not compacts or self._cancelled or self.finish_reason is not FinishReason.CONTEXT_FULL:
            return None
        found = context.compacted(self._books.transcript, encoder, lambda: self._cancelled)
        if found is None:
            return None
        self._change(transcript=found[0])
        return found[1]

    def _run(self, encoder: context.Encoder) -> Reply:
        """One request, and what came of it as a turn, also when an error or the reader ends it early."""
        reply = _Growing()
        if self._cancelled:
            # While room was made for it.
            self._keep(reply, None)
            with suppress(EngineError):
                # The encoder knows it already where room was looked for.
                self._change(n_used=len(context.token_ids(self._books.transcript, encoder)))
            yield TokenEvent("", "", 0.0, finish_reason=FinishReason.CANCELLED)
            return
        request = self._request(encoder)
        self._growing = reply
        end: TokenEvent | None = None
        try:
            events = self.engine.submit(request)
            if self._cancelled:
                # Before the engine knew of it.
                self.cancel()
            self._change(n_used=len(request.prompt))
            for event in events:
                if event.dropped:
                    yield self._shift(event.dropped)
                reply.add(event)
                if event.finish_reason is not None:
                    end = event
                elif event.token_id is not None:
                    self._change(n_used=self.n_used + 1)
                yield event
        finally:
            self._growing = None
            self._keep(reply, end)

    def _shift(self, n_tokens: int) -> MadeRoom:
        kept = self._books.transcript
        self._change(
            transcript=replace(kept, n_shifted=kept.n_shifted + n_tokens), n_used=self.n_used - n_tokens
        )
        return MadeRoom(n_tokens=n_tokens)

    def _request(self, encoder: context.Encoder) -> Request:
        shift = self.settings.on_full is OnFull.SHIFT and not self.completes
        kept = self._books.transcript
        return Request(
            f"chat-{next(self._numbers)}",
            # The very ids that were counted: the engine need not find them again.
            context.token_ids(kept, encoder),
            self.settings.sampling,
            max_tokens=self.settings.max_tokens,
            stop=self.settings.stop,
            json_schema=self.json_schema,
            context_shift=shift,
            n_keep=context.n_never_shifted(kept, encoder) if shift else 0,
        )

    def _keep(self, reply: _Growing, end: TokenEvent | None) -> None:
        """Make what came a turn. `end` None: the stream broke off."""
        usage = None if end is None else end.usage
        ending = FinishReason.CANCELLED if end is None else end.finish_reason
        text, ids = reply.exact() if end is None else ("".join(reply.pieces), tuple(reply.ids))
        self._books = replace(self._books, usage=usage, finish_reason=ending)
        if text or ids or ending is FinishReason.STOP:
            self._change(turns=self._turns_with(text, ids, ending, usage))

    def _turns_with(
        self, text: str, ids: tuple[int, ...], ending: FinishReason | None, usage: Usage | None
    ) -> tuple[Turn, ...]:
        """The turns with a reply to the last message, or more of the last reply."""
        *before, last = self.turns
        if last.role is Role.USER:
            return (*self.turns, Turn(Role.ASSISTANT, text, ids, ending, usage))
        exact = (*last.token_ids, *ids) if last.token_ids and (ids or not text) else ()
        more = replace(last, content=last.content + text, token_ids=exact, ending=ending, usage=usage)
        return (*before, more)
