"""The turns of one conversation and the replies to them, with exact token ids. Draws nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from dsmoe_local.base.errors import UsageError
from dsmoe_local.chat.settings import ChatSettings
from dsmoe_local.engine.types import FinishReason, Message, Prompt, Request, TextEngine, TokenEvent, Usage


class Conversation:
    """Messages with a model, in order; each reply keeps its token ids, so the KV cache stays valid.

    A model without a chat template completes text instead: every message starts a new text, and an empty one
    goes on with the last.
    """

    def __init__(self, engine: TextEngine, settings: ChatSettings, system: str = "") -> None:
        self.engine = engine
        self.settings = settings
        self.system = system
        self.turns: list[Message] = []
        self.usage: Usage | None = None
        self.finish_reason: FinishReason | None = None
        self._numbers = itertools.count(1)
        self._running = ""
        self._cancelled = False

    @property
    def completes(self) -> bool:
        """Whether the model only completes text."""
        return self.engine.info.template is None

    @property
    def n_used(self) -> int:
        """Tokens of the context in use after the last reply."""
        return 0 if self.usage is None else self.usage.prompt_tokens + self.usage.completion_tokens

    def send(self, text: str) -> Iterator[TokenEvent]:
        """The reply to `text`. If none comes, because of an error or `cancel`, the message is not kept."""
        if self.completes:
            self.turns.clear()
        self.turns.append(Message("user", text))
        return self._reply()

    def regenerate(self) -> Iterator[TokenEvent]:
        """Another reply to the last message. UsageError without one."""
        if not any(turn.role == "user" for turn in self.turns):
            raise UsageError("there is nothing to answer again yet")
        while self.turns[-1].role != "user":
            self.turns.pop()
        return self._reply(keep_question=True)

    def go_on(self) -> Iterator[TokenEvent]:
        """The last reply, continued. UsageError without one."""
        if not self.turns or self.turns[-1].role != "assistant":
            raise UsageError("there is no reply to continue yet")
        return self._reply(keep_question=True)

    def undo(self) -> bool:
        """Forget the last message and its reply; False if there is none."""
        questions = [index for index, turn in enumerate(self.turns) if turn.role == "user"]
        if not questions:
            return False
        del self.turns[questions[-1] :]
        return True

    def clear(self) -> None:
        """Forget all turns; the system text stays."""
        self.turns.clear()
        self.usage = self.finish_reason = None

    def cancel(self) -> None:
        """End the reply that was asked for last; from any thread or a signal handler."""
        self._cancelled = True
        self.engine.cancel(self._running)

    def prompt(self) -> Prompt:
        """What the engine is given for the next reply."""
        if not self.completes:
            return (*([Message("system", self.system)] if self.system else []), *self.turns)
        text, *replies = self.turns
        if not replies:
            return text.content
        return (*self.engine.encode(text.content), *replies[-1].token_ids)

    def _reply(self, *, keep_question: bool = False) -> Iterator[TokenEvent]:
        self._cancelled = False
        return self._events(keep_question)

    def _events(self, keep_question: bool) -> Iterator[TokenEvent]:
        self._running = f"chat-{next(self._numbers)}"
        pieces: list[str] = []
        ids: list[int] = []
        try:
            request = Request(
                self._running,
                self.prompt(),
                self.settings.sampling,
                max_tokens=self.settings.max_tokens,
                stop=self.settings.stop,
            )
            events = self.engine.submit(request)
            if self._cancelled:
                # Before the engine knew of it.
                self.cancel()
            for event in events:
                pieces.append(event.text)
                if event.finish_reason is None and event.token_id is not None:
                    ids.append(event.token_id)
                if event.finish_reason is not None:
                    self.usage, self.finish_reason = event.usage, event.finish_reason
                    if event.finish_reason is FinishReason.STOP and event.token_id is None:
                        # A stop string ended it: the ids reach beyond the text.
                        ids.clear()
                yield event
        finally:
            # Also when the reader stops early, or an error breaks the stream: what was said is kept.
            self._running = ""
            self._keep("".join(pieces), tuple(ids), keep_question)

    def _keep(self, text: str, ids: tuple[int, ...], keep_question: bool) -> None:
        if not text and not ids:
            if not keep_question:
                self.turns.pop()
            return
        if self.turns[-1].role == "assistant":
            begun = self.turns.pop()
            exact = (*begun.token_ids, *ids) if begun.token_ids and ids else ()
            self.turns.append(replace(begun, content=begun.content + text, token_ids=exact))
        else:
            self.turns.append(Message("assistant", text, ids))
