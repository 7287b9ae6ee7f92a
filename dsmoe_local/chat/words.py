"""What the chat says of its own, in words. Decides and prints nothing."""

from __future__ import annotations

from collections.abc import Mapping

from dsmoe_local.base.text import count as count
from dsmoe_local.chat.context import MadeRoom
from dsmoe_local.chat.frames import preview
from dsmoe_local.chat.turns import Role
from dsmoe_local.engine.types import FinishReason, ModelInfo, Usage

ENDINGS: Mapping[FinishReason | None, str] = {
    FinishReason.LENGTH: "cut at max_tokens: /continue goes on",
    FinishReason.CONTEXT_FULL: "the context is full: /set on_full compact drops what is oldest, "
    "/undo goes back, /clear begins anew",
    FinishReason.CANCELLED: "stopped: /continue goes on",
}


def advises_against_system(info: ModelInfo) -> bool:
    """Whether the authors advise against a system text: DeepSeekMoE's card does, for its own format."""
    template = info.template_text or ""
    return info.architecture == "deepseek" and "User: " in template and "Assistant:" in template


def usage(taken: Usage) -> str:
    """One line on what a reply took."""
    seed = "" if taken.seed is None else f", seed {taken.seed}"
    read = taken.prompt_tokens - taken.cached_tokens
    return (
        f"prompt {count(taken.prompt_tokens, 'token')} ({read:,} read in {taken.prompt_seconds:.2f} s), "
        f"reply {count(taken.completion_tokens, 'token')} in {taken.completion_seconds:.2f} s "
        f"({taken.tokens_per_second:.1f} tokens/s){seed}"
    )


def made_room(room: MadeRoom) -> str:
    """What left the context."""
    if not room.turns:
        return f"the context was full: the oldest {count(room.n_tokens, 'token')} left it"
    said = [preview(turn.content, 40) for turn in room.turns if turn.role is Role.USER]
    if len(said) == 1:
        return f"the context was full: the oldest message and its reply left it: “{said[0]}”"
    return (
        f"the context was full: the oldest {len(said)} messages and their replies left it, "
        f"“{said[0]}” to “{said[-1]}”"
    )


def nearly_full(share: float) -> str:
    """A warning before the context is full."""
    return (
        f"note: the context is {share:.0%} full; when it is full, replies end: "
        "/set on_full compact (or shift) drops what is oldest instead"
    )
