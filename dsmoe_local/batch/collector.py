"""Gather a request's events into its outcome. Runs in the engine's thread, so it does no more than that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsmoe_local.batch.requests import is_chat
from dsmoe_local.batch.responses import Choice, Reply
from dsmoe_local.engine.errors import PromptError, TemplateError
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    Request,
    TextEngine,
    TokenEvent,
    TokenLogprob,
    Usage,
)


@dataclass(slots=True)
class _Draft:
    """A reply as far as it came."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[tuple[TokenLogprob, tuple[TokenLogprob, ...]]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Collector:
    """Takes the events of one request; `finished` is called once, after the last.

    `kept` are the fields of its line that the record carries along. `alone`: nothing else ran beside it.
    """

    def __init__(
        self,
        position: int,
        request: Request,
        finished: Callable[[Collector], None],
        *,
        kept: Mapping[str, Any] | None = None,
        alone: bool = False,
    ) -> None:
        self.position = position
        self.request = request
        self.kept = kept or {}
        self.alone = alone
        self.error: BaseException | None = None
        self.n_tokens = 0
        self._finished = finished
        self._drafts = [_Draft() for _ in range(request.n)]
        self._seconds = 0.0

    def deliver(self, event: TokenEvent | BaseException | None) -> None:
        """Take what the engine delivers."""
        if not isinstance(event, TokenEvent):
            self.error = event
            self._finished(self)
            return
        draft = self._drafts[event.index]
        if event.text:
            draft.pieces.append(event.text)
        if event.token_id is not None and event.finish_reason is None:
            self.n_tokens += 1
            if self.request.logprobs:
                draft.tokens.append(_scored(event))
        if event.finish_reason is not None:
            draft.finish_reason, draft.usage = event.finish_reason, event.usage
            self._seconds = max(self._seconds, event.seconds)

    def reply(self, model: str, lead: str) -> Reply | None:
        """What was generated; None if it was cut short. `lead` is what `reply_lead` returns."""
        chat = is_chat(self.request)
        lead = "" if self.request.continue_final_message else lead
        choices: list[Choice] = []
        usages: list[Usage] = []
        for draft in self._drafts:
            reason, usage = draft.finish_reason, draft.usage
            if reason is None or usage is None or reason is FinishReason.CANCELLED:
                return None
            text = "".join(draft.pieces)
            text = text.removeprefix(lead) if chat else text
            choices.append(Choice(text, reason, tuple(draft.tokens) if self.request.logprobs else None))
            usages.append(usage)
        return Reply(self.request.id, model, chat, tuple(choices), tuple(usages), self._seconds, self.kept)


def reply_lead(engine: TextEngine) -> str:
    """The whitespace that the chat template puts before a reply it repeats, and not where it asks for one.

    DeepSeekMoE's asks with `Assistant:` and repeats `Assistant: …`, so the replies of its models begin with a
    space that is none of theirs.
    """
    if engine.info.template is None:
        return ""
    question, reply = Message("user", "question"), "reply"
    try:
        asked, repeated = (
            "".join(engine.decode(engine.encode(prompt)))
            for prompt in ((question,), (question, Message("assistant", reply), question))
        )
    except (PromptError, TemplateError):
        # A template that refuses these messages: nothing is known of it.
        return ""
    lead = repeated.removeprefix(asked).partition(reply)[0]
    return lead if repeated.startswith(asked) and lead.isspace() else ""


def _scored(event: TokenEvent) -> tuple[TokenLogprob, tuple[TokenLogprob, ...]]:
    """The token, and the likeliest beside it."""
    if event.alternatives:
        return event.alternatives[0], event.alternatives[1:]
    return TokenLogprob(event.token_id or 0, event.text, event.logprob or 0.0), ()
