"""Collect the events of a request into the replies to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeAlias

from dsmoe_local.engine.errors import PromptError, TemplateError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import (
    CallDelta,
    FinishReason,
    Message,
    Request,
    TokenEvent,
    TokenLogprob,
    Usage,
)

ScoredToken: TypeAlias = tuple[TokenLogprob, tuple[TokenLogprob, ...]]
"""A token, and its most likely alternatives. The log-probability of an echoed prompt's first token is NaN."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One reply to a prompt. `tokens` are those of `text` and `calls`; None without log-probabilities. For a
    completion they include the end token, if there is one.

    `stop` is the stop string that ended it.
    """

    text: str
    finish_reason: FinishReason
    tokens: tuple[ScoredToken, ...] | None = None
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    stop: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """The replies to a request. `chat`: it had messages, not a prompt. `usages` has one item for each choice.
    `seconds` is the wall time from submission to the last event. If there are several prompts, each has the
    same number of choices.
    """

    id: str
    model: str
    chat: bool
    choices: tuple[Choice, ...]
    usages: tuple[Usage, ...]
    seconds: float
    n_prompts: int = 1

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        """What the model wrote before the text of the first choice."""
        return self.choices[0].reasoning

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def message(self) -> dict[str, str]:
        """The first choice as a message, to continue the conversation with."""
        message = {"role": "assistant", "content": self.text}
        return message | ({"reasoning_content": self.reasoning} if self.reasoning else {})

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of the prompts. All choices of a prompt share it."""
        return sum(usage.prompt_tokens for usage in self._first_usages)

    @property
    def n_cached_tokens(self) -> int:
        """Prompt tokens that were in the KV cache."""
        return sum(usage.cached_tokens for usage in self._first_usages)

    @property
    def _first_usages(self) -> tuple[Usage, ...]:
        """The usage of the first choice of each prompt."""
        return self.usages[:: len(self.usages) // self.n_prompts]

    @property
    def n_completion_tokens(self) -> int:
        """Generated tokens of all choices."""
        return sum(usage.completion_tokens for usage in self.usages)

    @property
    def n_reasoning_tokens(self) -> int:
        """Tokens of reasoning in all choices."""
        return sum(usage.reasoning_tokens for usage in self.usages)


@dataclass(frozen=True, slots=True)
class Delta:
    """What the reply `index` has gained since the last delta. The last one has a `finish_reason`.

    `calls` are parts of tool calls. Those of one call are joined.
    """

    index: int
    text: str
    reasoning: str
    calls: tuple[CallDelta, ...]
    tokens: tuple[ScoredToken, ...]
    finish_reason: FinishReason | None


@dataclass(slots=True)
class _Draft:
    """A reply that is not finished. `lead` is white space at its start that does not belong to the text.

    The numbers count what deltas have already taken. `held` is white space that ends the reasoning so far:
    it is dropped if no more reasoning follows.
    """

    lead: str
    pieces: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    calls: list[CallDelta] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str = ""
    usage: Usage | None = None
    n_pieces: int = 0
    n_reasoning: int = 0
    n_tokens: int = 0
    n_calls: int = 0
    held: str = ""
    finished: bool = False

    def delta(self, index: int) -> Delta | None:
        """Return what was added since the last call; None if there is nothing to show yet."""
        reasoning = self.held + "".join(self.reasoning[self.n_reasoning :])
        self.n_reasoning = len(self.reasoning)
        shown = reasoning.rstrip()
        self.held = reasoning[len(shown) :]
        text = self._new_text()
        calls = joined_calls(self.calls[self.n_calls :])
        self.n_calls = len(self.calls)
        if self.finished or not (text or shown or calls or self.finish_reason):
            return None
        tokens: tuple[ScoredToken, ...] = ()
        if text or calls or self.finish_reason:
            tokens = tuple(self.tokens[self.n_tokens :])
            self.n_tokens = len(self.tokens)
        self.finished = self.finish_reason is not None
        return Delta(index, text, shown, calls, tokens, self.finish_reason)

    def _new_text(self) -> str:
        text = "".join(self.pieces[self.n_pieces :])
        if self.lead and text and not self.n_pieces:
            if len(text) < len(self.lead) and self.lead.startswith(text) and not self.finish_reason:
                return ""  # the rest of the lead may follow
            text = text.removeprefix(self.lead)
        self.n_pieces = len(self.pieces)
        return text


class ReplyBuilder:
    """Collects the events of one request. `lead` is what `reply_lead` returned. `n_tokens` counts the
    generated tokens of all choices.
    """

    def __init__(self, request: Request, lead: str) -> None:
        self.n_tokens = 0
        self._request = request
        prompt = request.prompt
        self._chat = not isinstance(prompt, str) and isinstance(prompt[0], Message)
        self._lead = lead if self._chat and not request.continue_final_message else ""
        self._drafts = [_Draft(self._lead) for _ in range(request.n)]
        self._seconds = 0.0

    def add(self, event: TokenEvent) -> None:
        """Add an event."""
        draft = self._drafts[event.index]
        if event.text:
            draft.pieces.append(event.text)
        if event.reasoning:
            draft.reasoning.append(event.reasoning)
        draft.calls += event.calls
        if event.prompt_tokens:
            scored = [(token[0], token[1:]) for token in event.prompt_tokens]
            if event.prompt_start == 0:
                scored[0] = (replace(scored[0][0], logprob=math.nan), ())
            draft.tokens[event.prompt_start : event.prompt_start + len(scored)] = scored
        if event.token_id is not None and event.finish_reason is None:
            self.n_tokens += 1
            if event.in_reasoning:
                # The tokens so far are the marker before the reasoning.
                draft.tokens.clear()
            elif self._request.logprobs:
                draft.tokens.append(_scored(event, event.text))
        if event.finish_reason is not None:
            if event.token_id is not None and self._request.logprobs and not self._chat:
                # As in OpenAI's completions. Its text is not that of the event, which was held back before.
                draft.tokens.append(_scored(event, ""))
            draft.finish_reason, draft.usage = event.finish_reason, event.usage
            draft.stop = event.stop
            self._seconds = max(self._seconds, event.seconds)

    def deltas(self) -> list[Delta]:
        """Return what the replies have gained since the last call."""
        found = (draft.delta(index) for index, draft in enumerate(self._drafts))
        return [delta for delta in found if delta is not None]

    def reply(self, model: str) -> Reply | None:
        """Return the reply after the last event; None if the request was cancelled."""
        choices: list[Choice] = []
        usages: list[Usage] = []
        for draft in self._drafts:
            reason, usage = draft.finish_reason, draft.usage
            if reason is None or usage is None or reason is FinishReason.CANCELLED:
                return None
            text = "".join(draft.pieces).removeprefix(self._lead)
            tokens = tuple(draft.tokens) if self._request.logprobs else None
            reasoning = "".join(draft.reasoning).rstrip()
            calls = joined_calls(draft.calls)
            choices.append(Choice(text, reason, tokens, reasoning, calls, draft.stop))
            usages.append(usage)
        return Reply(self._request.id, model, self._chat, tuple(choices), tuple(usages), self._seconds)


def joined_replies(replies: Sequence[Reply]) -> Reply:
    """Return the replies to several prompts as one."""
    return replace(
        replies[0],
        choices=tuple(choice for reply in replies for choice in reply.choices),
        usages=tuple(usage for reply in replies for usage in reply.usages),
        seconds=max(reply.seconds for reply in replies),
        n_prompts=len(replies),
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


def joined_calls(parts: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """Return complete calls from their parts, which are in order."""
    calls = []
    for index, group in groupby(parts, lambda part: part.index):
        first, *others = group
        arguments = "".join((first.arguments, *(part.arguments for part in others)))
        calls.append(CallDelta(index, arguments, first.id, first.name))
    return tuple(calls)


def _scored(event: TokenEvent, text: str) -> ScoredToken:
    """Return the token and its alternatives. The first alternative is the token itself. Without alternatives,
    `text` is the text of the token.
    """
    if event.alternatives:
        return event.alternatives[0], event.alternatives[1:]
    return TokenLogprob(event.token_id or 0, text, event.logprob or 0.0), ()
