"""The part of a conversation that is in the context: its messages, its tokens, and how to make room.

Functions of a transcript and a tokenizer, without state.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from dsmoe_local.base.sequences import n_common
from dsmoe_local.chat.settings import OnFull
from dsmoe_local.chat.turns import Role, Transcript, Turn
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import Message, Prompt, ends_with_reply


@dataclass(frozen=True, slots=True)
class MadeRoom:
    """The context was full: `turns` (compact) or the oldest `n_tokens` (shift) were removed from it."""

    turns: tuple[Turn, ...] = ()
    n_tokens: int = 0


def completes(engine: TextEngine) -> bool:
    """Return whether the model is a base model: its context holds the last text and its completion only."""
    return engine.info.template is None


def messages(kept: Transcript) -> tuple[Message, ...]:
    """Return the messages in the context, including tokens that were shifted out."""
    system = [Message("system", kept.system)] if kept.system else []
    return (*system, *(turn.message for turn in kept.turns[kept.n_left_out :]))


class Encoder:
    """Tokenizes prompts, and caches the results."""

    def __init__(self, engine: TextEngine) -> None:
        self.info = engine.info
        self._engine = engine
        self._known: dict[Prompt, tuple[int, ...]] = {}

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of `prompt`. A reply at its end stays open."""
        ids = self._known.get(prompt)
        if ids is None:
            ids = self._engine.encode(prompt, continue_final_message=ends_with_reply(prompt))
            self._known[prompt] = ids
        return ids


def prompt(kept: Transcript, encoder: Encoder) -> Prompt:
    """Return the prompt for the next reply, or the one that ends with the last reply."""
    if encoder.info.template is None:
        return _text_to_complete(kept, encoder)
    said = messages(kept)
    if not kept.n_shifted:
        return said
    ids, n_kept = encoder.encode(said), n_never_shifted(kept, encoder)
    return (*ids[:n_kept], *ids[n_kept + kept.n_shifted :])


def token_ids(kept: Transcript, encoder: Encoder) -> tuple[int, ...]:
    """Return the token ids in the context; none without turns."""
    return encoder.encode(prompt(kept, encoder)) if kept.turns else ()


def n_never_shifted(kept: Transcript, encoder: Encoder) -> int:
    """Return how many tokens at the beginning are never shifted out: BOS and the system text."""
    if not kept.system:
        return 1
    said = messages(kept)
    return max(1, n_common(encoder.encode(said[:1]), encoder.encode(said)))


def fitted(
    kept: Transcript,
    encoder: Encoder,
    on_full: OnFull,
    max_tokens: int | None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Transcript, MadeRoom | None]:
    """Return `kept` with room for a reply, if `on_full` allows it, and what was removed for that.

    Nothing is removed if that cannot help, because the last message alone is too long, or once `stopped`
    returns true.
    """
    if encoder.info.template is None:
        return kept, None
    if kept.n_shifted and kept.n_shifted > _most_shifted(kept, encoder):
        # /undo went back to before the tokens that were shifted out, or to a message that lost its beginning.
        kept = replace(kept, n_shifted=0)
    n_context = encoder.info.n_context
    wanted = n_context - min(max_tokens or n_context, n_context // 4)
    if on_full is OnFull.STOP or len(token_ids(kept, encoder)) <= wanted:
        return kept, None
    found = compacted(kept, encoder, stopped) if on_full is OnFull.COMPACT else _shifted(kept, encoder)
    return found or (kept, None)


def compacted(
    kept: Transcript, encoder: Encoder, stopped: Callable[[], bool] = lambda: False
) -> tuple[Transcript, MadeRoom] | None:
    """Remove the oldest messages and their replies, so that half of the context is free.

    Returns the transcript and what was removed; None if the last message, which always stays, is the only one
    or is too long, or once `stopped` returns true.
    """
    n_context = encoder.info.n_context
    # Tokens that were shifted out before belong to the messages that are removed now.
    cuts = [
        replace(kept, n_left_out=index, n_shifted=0)
        for index in range(kept.n_left_out + 1, len(kept.turns))
        if kept.turns[index].role is Role.USER
    ]
    if not cuts:
        return None
    # Bisection, since later cuts leave fewer tokens: only a few are tokenized.
    first = bisect_left(
        cuts, True, key=lambda cut: stopped() or len(token_ids(cut, encoder)) <= n_context // 2
    )
    less = cuts[min(first, len(cuts) - 1)]
    if stopped() or len(token_ids(less, encoder)) >= n_context:
        return None
    return less, MadeRoom(turns=kept.turns[kept.n_left_out : less.n_left_out])


def _shifted(kept: Transcript, encoder: Encoder) -> tuple[Transcript, MadeRoom] | None:
    """Shift the oldest tokens after the system text out, so that half of the context is free."""
    n_context = encoder.info.n_context
    n_ids = len(encoder.encode(messages(kept)))
    target = max(n_ids - n_context // 2, kept.n_shifted)
    n_shifted = min(target, _most_shifted(kept, encoder))
    if n_shifted <= kept.n_shifted or n_ids - n_shifted >= n_context:
        return None
    return replace(kept, n_shifted=n_shifted), MadeRoom(n_tokens=n_shifted - kept.n_shifted)


def _most_shifted(kept: Transcript, encoder: Encoder) -> int:
    """Return how many tokens may be shifted out: none of an unanswered message, nor of the end of a reply
    that is continued.
    """
    said = messages(kept)
    n_kept = n_never_shifted(kept, encoder)
    if said[-1].role == Role.ASSISTANT:
        return len(encoder.encode(said)) - n_kept - encoder.info.n_context // 4
    before = len(encoder.encode(said[:-1])) if len(said) > 1 else 0
    return max(0, before - n_kept)


def _text_to_complete(kept: Transcript, encoder: Encoder) -> Prompt:
    index = max((index for index, turn in enumerate(kept.turns) if turn.role is Role.USER), default=None)
    if index is None:
        return ""
    text, *replies = kept.turns[index:]
    if not replies:
        return text.content
    if not replies[-1].token_ids:
        return text.content + replies[-1].content
    return (*encoder.encode(text.content), *replies[-1].token_ids)
