"""One conversation: its turns with exact token ids, and the replies to them. Without display or storage."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, UsageError
from dsmoe_local.chat import context
from dsmoe_local.chat.context import MadeRoom
from dsmoe_local.chat.partial_reply import CallBlocks, PartialReply
from dsmoe_local.chat.remote.connection import ServerError
from dsmoe_local.chat.settings import ChatSettings, OnFull
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.errors import EngineCrashError, EngineError
from dsmoe_local.engine.interface import ReloadableEngine
from dsmoe_local.engine.reasoning import template_variables
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    ReplyStart,
    Request,
    TokenEvent,
    Tools,
    Usage,
    ends_with_reply,
)


@dataclass(frozen=True, slots=True)
class Asked:
    """The first event of a reply: its message is in the transcript now and can be saved."""


Event: TypeAlias = Asked | MadeRoom | TokenEvent
"""The events of a reply: Asked, then the others. Several may have a finish reason, since a reply continues
after MadeRoom: the last one counts.
"""
Reply: TypeAlias = Generator[Event, None, None]
"""The events of a running reply. If it is closed early, the text so far becomes a turn."""


@dataclass(frozen=True, slots=True)
class _State:
    """Everything that a reply changes. An empty reply restores it."""

    transcript: Transcript
    n_used: int = 0
    usage: Usage | None = None
    finish_reason: FinishReason | None = None


class Conversation:
    """A conversation with a model. Replies keep their token ids, so that the KV cache stays valid.

    A reply is an iterator, and starts with its first event. If it ends without text, the conversation is what
    it was before; only a new message stays as an unanswered one, unless it can never be answered.
    """

    def __init__(self, engine: ReloadableEngine, settings: ChatSettings, system: str = "") -> None:
        self.engine = engine
        self.settings = settings
        self.json_schema: str | None = None
        """A JSON schema that all replies must match, or None."""
        self.tools: Tools | None = None
        """Tools that the model may call, or None. Replies show the calls, and nothing runs them."""
        self._state = _State(Transcript(system=system))
        # The transcript to save while a turn is being replaced.
        self._replaced: Transcript | None = None
        self._partial: PartialReply | None = None
        self._numbers = itertools.count(1)
        self._cancelled = False

    @property
    def completes(self) -> bool:
        """Whether the model is a base model, which completes text."""
        return context.completes(self.engine)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns, including those that are not in the context any more."""
        return self._state.transcript.turns

    @property
    def system(self) -> str:
        """The system text, or empty."""
        return self._state.transcript.system

    @property
    def n_used(self) -> int:
        """The number of tokens in the context, as far as known. Increases during a reply."""
        return self._state.n_used

    @property
    def usage(self) -> Usage | None:
        """Tokens and time of the last reply."""
        return self._state.usage

    @property
    def finish_reason(self) -> FinishReason | None:
        """The reason why the last reply ended."""
        return self._state.finish_reason

    @property
    def unanswered(self) -> bool:
        """Whether the last message has no reply, because it was stopped or failed before its first word."""
        return bool(self.turns) and self.turns[-1].role is Role.USER

    @property
    def transcript(self) -> Transcript:
        """The transcript to save. A reply that is being replaced stays in it until the new one ends."""
        return self._replaced or self._state.transcript

    @property
    def partial_transcript(self) -> Transcript | None:
        """The transcript with the running reply so far; None if there is no text yet."""
        reply = None if self._partial is None else self._partial.exact()
        if reply is None or not (reply.ids or reply.text or reply.reasoning):
            return None
        turns = reply.added_to(self.turns, FinishReason.CANCELLED, None)
        return replace(self._state.transcript, turns=turns)

    def restore(self, transcript: Transcript) -> None:
        """Continue a stored conversation."""
        usages = [turn.usage for turn in transcript.turns if turn.usage is not None]
        ending = transcript.turns[-1].ending if transcript.turns else None
        self._state = _State(transcript, 0, usages[-1] if usages else None, ending)
        self._recount()

    def set_system(self, text: str) -> None:
        """Change the system text; empty removes it."""
        self._change(transcript=replace(self._state.transcript, system=text))
        self._recount()

    def send(self, text: str) -> Reply:
        """Return the reply to a new message, which replaces an unanswered one."""
        turns = self.turns[:-1] if self.unanswered else self.turns
        return self._reply((*turns, Turn(Role.USER, text)), new=True)

    def regenerate(self) -> Reply:
        """Return another reply to the last message. UsageError without a message."""
        return self._reply(self._up_to_question("there is no message to answer yet"))

    def edit(self, text: str) -> Reply:
        """Return the reply to `text`, which replaces the last message. UsageError without a message."""
        turns = self._up_to_question("there is no message to edit yet")
        return self._reply((*turns[:-1], Turn(Role.USER, text)))

    def continue_reply(self) -> Reply:
        """Continue the last reply, or answer an unanswered message.

        UsageError without turns, or if the model ended the reply itself.
        """
        if not self.turns:
            raise UsageError("there is no reply to continue yet")
        if not self.completes and self.turns[-1].ending is FinishReason.STOP:
            raise UsageError("the reply is complete", remedy="/regen generates another one; or ask for more")
        return self._reply(self.turns)

    def undo(self, n: int = 1) -> tuple[Turn, ...]:
        """Remove at most `n` messages and their replies from the end, and return them."""
        questions = [index for index, turn in enumerate(self.turns) if turn.role is Role.USER]
        start = questions[-min(n, len(questions))] if questions else len(self.turns)
        transcript, removed = self._state.transcript, self.turns[start:]
        if start <= transcript.n_left_out:
            transcript = replace(transcript, n_left_out=0, n_shifted=0)
        self.restore(
            replace(transcript, turns=transcript.turns[:start], undone=(*removed, *transcript.undone))
        )
        return removed

    def redo(self, n: int = 1) -> tuple[Turn, ...]:
        """Restore at most `n` messages that `undo` removed, with their replies, and return them.

        A new message or reply discards what was removed.
        """
        transcript = self._state.transcript
        ends = [place for place, turn in enumerate(transcript.undone) if place and turn.role is Role.USER]
        end = [*ends, len(transcript.undone)][min(n, len(ends) + 1) - 1]
        restored = transcript.undone[:end]
        if restored:
            self.restore(
                replace(transcript, turns=(*transcript.turns, *restored), undone=transcript.undone[end:])
            )
        return restored

    def clear(self) -> None:
        """Remove all turns. The system text stays."""
        self.restore(Transcript(system=self.system))

    def cancel(self) -> None:
        """Stop the running reply. May be called from any thread and from signal handlers."""
        self._cancelled = True
        # cancel_all also cancels a reload of the engine after a crash.
        self.engine.cancel_all()

    def last(self, role: Role) -> Turn | None:
        """Return the last turn of a role, or None."""
        return next((turn for turn in reversed(self.turns) if turn.role is role), None)

    def messages(self) -> tuple[Message, ...]:
        """Return the messages in the context, including tokens that were shifted out."""
        return context.messages(self._state.transcript)

    def context_ids(self) -> tuple[int, ...]:
        """Return the token ids in the context; none without turns."""
        return context.token_ids(self._state.transcript, self.encoder())

    def encoder(self) -> context.Encoder:
        """Return an encoder of prompts with the current settings."""
        settings = self.settings
        return context.Encoder(
            self.engine,
            template_variables(settings.chat_template_kwargs, settings.budget),
            () if self.tools is None else self.tools.tools,
        )

    def _up_to_question(self, error: str) -> tuple[Turn, ...]:
        questions = [index for index, turn in enumerate(self.turns) if turn.role is Role.USER]
        if not questions:
            raise UsageError(error)
        return self.turns[: questions[-1] + 1]

    def _change(
        self, *, transcript: Transcript | None = None, turns: tuple[Turn, ...] | None = None, n_used: int = -1
    ) -> None:
        transcript = transcript or self._state.transcript
        if turns is not None:
            transcript = replace(transcript, turns=turns, undone=())
        used = self._state.n_used if n_used < 0 else n_used
        self._state = replace(self._state, transcript=transcript, n_used=used)

    def _recount(self) -> None:
        """Count the tokens in the context. Without a running engine, the next reply counts them."""
        n_used = 0
        if self.engine.alive:
            with suppress(EngineError):
                n_used = len(self.context_ids())
        self._change(n_used=n_used)

    def _reply(self, turns: tuple[Turn, ...], *, new: bool = False) -> Reply:
        self._cancelled = False
        return self._events(turns, new=new)

    def _events(self, asked: tuple[Turn, ...], *, new: bool) -> Reply:
        """Yield the events of the reply to `asked`. `new`: its last message stays even without a reply."""
        before, stays = self._state, new
        if not new and asked != before.transcript.turns:
            self._replaced = before.transcript
        self._change(turns=asked)
        try:
            yield Asked()
            encoder = self.encoder()
            if not self.engine.info.server:
                yield from self._make_room(encoder)
            yield from self._run(encoder)
            while (room := self._room_to_continue(encoder)) is not None:
                yield room
                yield from self._run(encoder)
        except (EngineCrashError, ServerError, InterruptedRunError):
            # Keep a new message: it can be answered next time.
            raise
        except DsmoeError:
            stays = False
            raise
        finally:
            self._replaced = None
            if self.turns == asked and stays:
                transcript = replace(before.transcript, turns=asked)
                self._state = replace(self._state, transcript=transcript)
            elif self.turns == asked:
                self._state = before

    def _make_room(self, encoder: context.Encoder) -> Reply:
        """Make room for the reply, if the setting `on_full` allows it."""
        transcript, room = context.fitted(
            self._state.transcript,
            encoder,
            self.settings.on_full,
            self.settings.max_tokens,
            lambda: self._cancelled,
        )
        self._change(transcript=transcript)
        if room is not None:
            yield room

    def _room_to_continue(self, encoder: context.Encoder) -> MadeRoom | None:
        """Remove old messages if a full context cut the reply. Return None if nothing was removed."""
        compacts = self.settings.on_full is OnFull.COMPACT and not self.completes
        if not compacts or self._cancelled or self.finish_reason is not FinishReason.CONTEXT_FULL:
            return None
        found = context.compacted(self._state.transcript, encoder, lambda: self._cancelled)
        if found is None:
            return None
        self._change(transcript=found[0])
        return found[1]

    def _run(self, encoder: context.Encoder) -> Reply:
        """Run one request. Its reply becomes a turn even if an error or the caller ends it early."""
        reply = PartialReply()
        if self._cancelled:
            # `cancel` was called while `fitted` or `compacted` made room.
            self._add_reply(reply, None)
            with suppress(EngineError):
                # In most cases the encoder has these ids already.
                self._change(n_used=len(context.token_ids(self._state.transcript, encoder)))
            yield TokenEvent("", "", 0.0, finish_reason=FinishReason.CANCELLED)
            return
        is_remote = bool(self.engine.info.server)
        request = self._remote_request() if is_remote else self._request(encoder)
        self._partial = reply
        end: TokenEvent | None = None
        try:
            events = map(CallBlocks().shown, self.engine.submit(request))
            if self._cancelled:
                # `cancel` was called before the engine knew the request.
                self.cancel()
            if not is_remote:
                self._change(n_used=len(request.prompt))
            for event in events:
                if event.dropped:
                    yield self._shift(event.dropped)
                reply.add(event)
                if event.finish_reason is not None:
                    end = event
                    if is_remote and event.usage is not None:
                        self._change(n_used=event.usage.prompt_tokens + event.usage.completion_tokens)
                elif event.token_id is not None:
                    self._change(n_used=self.n_used + 1)
                yield event
        finally:
            self._partial = None
            self._add_reply(reply, end)

    def _shift(self, n_tokens: int) -> MadeRoom:
        transcript = self._state.transcript
        self._change(
            transcript=replace(transcript, n_shifted=transcript.n_shifted + n_tokens),
            n_used=self.n_used - n_tokens,
        )
        return MadeRoom(n_tokens=n_tokens)

    def _request(self, encoder: context.Encoder) -> Request:
        shift = self.settings.on_full is OnFull.SHIFT and not self.completes
        transcript = self._state.transcript
        if self.tools is not None and self.completes:
            raise UsageError(
                "the model has no chat template, so it cannot call tools", remedy="leave out --tools"
            )
        return Request(
            f"chat-{next(self._numbers)}",
            # Token ids, not messages: the engine would only tokenize them again.
            context.token_ids(transcript, encoder),
            self.settings.sampling,
            max_tokens=self.settings.max_tokens,
            stop=self.settings.stop,
            json_schema=self.json_schema,
            tools=self.tools,
            context_shift=shift,
            n_keep=context.n_never_shifted(transcript, encoder) if shift else 0,
            reply_start=self._reply_start(),
            reasoning_budget=self.settings.budget,
        )

    def _remote_request(self) -> Request:
        """Return the request for a server, which tokenizes the messages itself."""
        settings, prompt = self.settings, self.messages()
        return Request(
            f"chat-{next(self._numbers)}",
            prompt,
            settings.sampling,
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            json_schema=self.json_schema,
            tools=self.tools,
            continue_final_message=ends_with_reply(prompt),
            reasoning_budget=settings.budget,
            chat_template_kwargs=template_variables(settings.chat_template_kwargs, settings.budget),
        )

    def _reply_start(self) -> ReplyStart:
        """Return what the next reply, or the rest of the last one, may begin with."""
        last = self.turns[-1]
        if self.completes or (last.role is Role.ASSISTANT and last.content):
            return ReplyStart.ANSWER
        return ReplyStart.REASONING if last.reasoning else ReplyStart.DETECT

    def _add_reply(self, reply: PartialReply, end: TokenEvent | None) -> None:
        """Add the reply to the turns. `end` is None if it ended early."""
        usage = None if end is None else end.usage
        ending = FinishReason.CANCELLED if end is None else end.finish_reason
        reply = reply.exact() if end is None else reply
        self._state = replace(self._state, usage=usage, finish_reason=ending)
        if reply.text or reply.reasoning or reply.ids or ending is FinishReason.STOP:
            self._change(turns=reply.added_to(self.turns, ending, usage))
