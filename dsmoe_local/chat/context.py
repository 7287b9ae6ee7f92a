"""The part of a conversation that is in the context: its messages, its tokens, and how to make room.

Functions of a transcript and a tokenizer, without state.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsmoe_local.base.sequences import n_common
from dsmoe_local.chat.settings import OnFull
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import Message, Prompt, Tool, ends_with_reply


@dataclass(frozen=True, slots=True)
class MadeRoom:
    """The context was full: `turns` (compact) or the oldest `n_tokens` (shift) were removed from it."""

    turns: tuple[Turn, ...] = ()
    n_tokens: int = 0


def completes(engine: TextEngine) -> bool:
    """Return whether the model is a base model: its context holds the last text and its completion only."""
    return engine.info.template is None


def messages(transcript: Transcript) -> tuple[Message, ...]:
    """Return the messages in the context, including tokens that were shifted out."""
    system = [Message("system", transcript.system)] if transcript.system else []
    return (*system, *(turn.message for turn in transcript.turns[transcript.n_left_out :]))


class Encoder:
    """Tokenizes prompts, and caches the results. `variables` are those of the chat template, `tools` those
    that the conversation offers.
    """

    def __init__(
        self, engine: TextEngine, variables: Mapping[str, Any], tools: tuple[Tool, ...] = ()
    ) -> None:
        self.info = engine.info
        self._engine = engine
        self._variables = variables
        self._tools = tools
        self._known: dict[Prompt, tuple[int, ...]] = {}

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of `prompt`. A reply at the end is left open, so that it can be continued."""
        ids = self._known.get(prompt)
        if ids is None:
            ids = self._engine.encode(
                prompt,
                continue_final_message=ends_with_reply(prompt),
                chat_template_kwargs=self._variables,
                tools=self._tools,
            )
            self._known[prompt] = ids
        return ids


def prompt(transcript: Transcript, encoder: Encoder) -> Prompt:
    """Return the prompt for the next reply, or the one that ends with the last reply."""
    if encoder.info.template is None:
        return _text_to_complete(transcript, encoder)
    current = messages(transcript)
    if not transcript.n_shifted:
        return current
    ids, n_kept = encoder.encode(current), n_never_shifted(transcript, encoder)
    return (*ids[:n_kept], *ids[n_kept + transcript.n_shifted :])


def token_ids(transcript: Transcript, encoder: Encoder) -> tuple[int, ...]:
    """Return the token ids in the context; none without turns."""
    return encoder.encode(prompt(transcript, encoder)) if transcript.turns else ()


def n_never_shifted(transcript: Transcript, encoder: Encoder) -> int:
    """Return how many tokens at the beginning are never shifted out: BOS and the system text."""
    if not transcript.system:
        return 1
    current = messages(transcript)
    return max(1, n_common(encoder.encode(current[:1]), encoder.encode(current)))


def fitted(
    transcript: Transcript,
    encoder: Encoder,
    on_full: OnFull,
    max_tokens: int | None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Transcript, MadeRoom | None]:
    """Return the transcript with room for a reply, if `on_full` allows it, and what was removed for that.

    Nothing is removed if the last message alone is too long, or once `stopped` returns true.
    """
    if encoder.info.template is None:
        return transcript, None
    if transcript.n_shifted and transcript.n_shifted > _most_shifted(transcript, encoder):
        # /undo went back to before the tokens that were shifted out, or to a message that lost its beginning.
        transcript = replace(transcript, n_shifted=0)
    n_context = encoder.info.n_context
    wanted = n_context - min(max_tokens or n_context, n_context // 4)
    if on_full is OnFull.STOP or len(token_ids(transcript, encoder)) <= wanted:
        return transcript, None
    found = (
        compacted(transcript, encoder, stopped)
        if on_full is OnFull.COMPACT
        else _shifted(transcript, encoder)
    )
    return found or (transcript, None)


def compacted(
    transcript: Transcript, encoder: Encoder, stopped: Callable[[], bool] = lambda: False
) -> tuple[Transcript, MadeRoom] | None:
    """Remove the oldest messages and their replies until half of the context is free.

    Returns the transcript and what was removed. The last message always stays: returns None if it is the only
    one or is too long, or once `stopped` returns true.
    """
    n_context = encoder.info.n_context
    # n_shifted=0: tokens that were shifted out earlier belong to messages that are removed now.
    cuts = [
        replace(transcript, n_left_out=index, n_shifted=0)
        for index in range(transcript.n_left_out + 1, len(transcript.turns))
        if transcript.turns[index].role is Role.USER
    ]
    if not cuts:
        return None
    # Later cuts leave fewer tokens, so bisection tokenizes only a few of them.
    first = bisect_left(
        cuts, True, key=lambda cut: stopped() or len(token_ids(cut, encoder)) <= n_context // 2
    )
    less = cuts[min(first, len(cuts) - 1)]
    if stopped() or len(token_ids(less, encoder)) >= n_context:
        return None
    return less, MadeRoom(turns=transcript.turns[transcript.n_left_out : less.n_left_out])


def _shifted(transcript: Transcript, encoder: Encoder) -> tuple[Transcript, MadeRoom] | None:
    """Shift out the oldest tokens after the system text until half of the context is free."""
    n_context = encoder.info.n_context
    n_ids = len(encoder.encode(messages(transcript)))
    target = max(n_ids - n_context // 2, transcript.n_shifted)
    n_shifted = min(target, _most_shifted(transcript, encoder))
    if n_shifted <= transcript.n_shifted or n_ids - n_shifted >= n_context:
        return None
    return replace(transcript, n_shifted=n_shifted), MadeRoom(n_tokens=n_shifted - transcript.n_shifted)


def _most_shifted(transcript: Transcript, encoder: Encoder) -> int:
    """Return how many tokens may be shifted out.

    An unanswered message stays whole. Of a reply that is continued, the end stays: a quarter of the context.
    """
    current = messages(transcript)
    n_kept = n_never_shifted(transcript, encoder)
    if current[-1].role == Role.ASSISTANT:
        return len(encoder.encode(current)) - n_kept - encoder.info.n_context // 4
    before = len(encoder.encode(current[:-1])) if len(current) > 1 else 0
    return max(0, before - n_kept)


def _text_to_complete(transcript: Transcript, encoder: Encoder) -> Prompt:
    index = max(
        (index for index, turn in enumerate(transcript.turns) if turn.role is Role.USER), default=None
    )
    if index is None:
        return ""
    text, *replies = transcript.turns[index:]
    if not replies:
        return text.content
    if not replies[-1].token_ids:
        return text.content + replies[-1].content
    return (*encoder.encode(text.content), *replies[-1].token_ids)
