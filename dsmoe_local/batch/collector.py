"""Collect the events of a request into its reply. `deliver` runs in the engine's thread and must be fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dsmoe_local.batch.lines import Line
from dsmoe_local.batch.responses import Choice, Reply
from dsmoe_local.engine.errors import PromptError, TemplateError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import FinishReason, Message, Request, TokenEvent, TokenLogprob, Usage


@dataclass(slots=True)
class _Draft:
    """A reply that is not finished."""

    pieces: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tokens: list[tuple[TokenLogprob, tuple[TokenLogprob, ...]]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Collector:
    """Collects the events of one request. `finished` is called once, after the last event.

    `line` is the input line of `task`. `alone`: no other request runs at the same time.
    """

    def __init__(
        self,
        task: int,
        line: Line,
        request: Request,
        finished: Callable[[Collector], None],
        *,
        alone: bool = False,
    ) -> None:
        self.task = task
        self.line = line
        self.request = request
        self.alone = alone
        self.error: BaseException | None = None
        self.n_tokens = 0
        self._finished = finished
        self._drafts = [_Draft() for _ in range(request.n)]
        self._seconds = 0.0

    def deliver(self, event: TokenEvent | BaseException | None) -> None:
        """Add an event; None or an exception ends the request."""
        if not isinstance(event, TokenEvent):
            self.error = event
            self._finished(self)
            return
        draft = self._drafts[event.index]
        if event.text:
            draft.pieces.append(event.text)
        if event.reasoning:
            draft.reasoning.append(event.reasoning)
        if event.token_id is not None and event.finish_reason is None:
            self.n_tokens += 1
            if event.in_reasoning:
                # The tokens so far are the marker before the reasoning.
                draft.tokens.clear()
            elif self.request.logprobs:
                draft.tokens.append(_scored(event))
        if event.finish_reason is not None:
            draft.finish_reason, draft.usage = event.finish_reason, event.usage
            self._seconds = max(self._seconds, event.seconds)

    def reply(self, model: str, lead: str) -> Reply | None:
        """Return the reply; None if it was cancelled. `lead` is what `reply_lead` returned."""
        prompt = self.request.prompt
        chat = not isinstance(prompt, str) and isinstance(prompt[0], Message)
        lead = "" if self.request.continue_final_message else lead
        choices: list[Choice] = []
        usages: list[Usage] = []
        for draft in self._drafts:
            reason, usage = draft.finish_reason, draft.usage
            if reason is None or usage is None or reason is FinishReason.CANCELLED:
                return None
            text = "".join(draft.pieces)
            text = text.removeprefix(lead) if chat else text
            tokens = tuple(draft.tokens) if self.request.logprobs else None
            choices.append(Choice(text, reason, tokens, "".join(draft.reasoning).rstrip()))
            usages.append(usage)
        return Reply(
            self.request.id, model, chat, tuple(choices), tuple(usages), self._seconds, self.line.kept
        )


def reply_lead(engine: TextEngine) -> str:
    """Return the white space that the model generates at the start of a reply because of the chat template.

    DeepSeekMoE's template ends a prompt with `Assistant:` but renders a reply as `Assistant: …`. Its models
    therefore start every reply with a space that does not belong to the text.
    """
    if engine.info.template is None:
        return ""
    question, reply = Message("user", "question"), "reply"
    try:
        prompt, conversation = (
            "".join(engine.decode(engine.encode(messages)))
            for messages in ((question,), (question, Message("assistant", reply), question))
        )
    except (PromptError, TemplateError):
        # The template does not take these messages.
        return ""
    lead = conversation.removeprefix(prompt).partition(reply)[0]
    return lead if conversation.startswith(prompt) and lead.isspace() else ""


def _scored(event: TokenEvent) -> tuple[TokenLogprob, tuple[TokenLogprob, ...]]:
    """Return the token and its alternatives. The first alternative is the token itself."""
    if event.alternatives:
        return event.alternatives[0], event.alternatives[1:]
    return TokenLogprob(event.token_id or 0, event.text, event.logprob or 0.0), ()
