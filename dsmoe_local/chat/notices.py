"""Notices of the chat: how a reply ended, what left the context, the last messages of a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsmoe_local.base.text import count, safe_line, safe_text
from dsmoe_local.chat.attachments import preview, without_files
from dsmoe_local.chat.context import MadeRoom
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.settings import OnFull, Think
from dsmoe_local.chat.turns import Role, Turn
from dsmoe_local.engine.tools.formats import format_of
from dsmoe_local.engine.types import FinishReason, ModelInfo, Usage

if TYPE_CHECKING:
    from dsmoe_local.chat.terminal.screen import Screen

_MOST_LINES = 12
_LONGEST_LINE = 400  # characters

ENDINGS: Mapping[FinishReason | None, str] = {
    FinishReason.LENGTH: "cut at max_tokens: /continue continues it",
    FinishReason.CONTEXT_FULL: "the context is full: /set on_full compact drops the oldest messages, "
    "/undo goes back, /clear begins a new conversation",
    FinishReason.CANCELLED: "stopped: /continue continues it",
}

ON_FULL_IS_LOCAL = (
    "note: on_full needs the model on this computer; with a server, a full context ends the reply"
)


def greet(screen: Screen, conversation: Conversation) -> None:
    """Show what the model is, when the chat begins or another model was loaded."""
    info = conversation.engine.info
    n_context = f"{info.n_context:,} tokens of context" if info.n_context else ""
    screen.notice(" · ".join(filter(None, (info.name, info.type, info.server, n_context, "/help"))))
    if info.server and conversation.settings.on_full is not OnFull.STOP:
        screen.notice(ON_FULL_IS_LOCAL)
    if conversation.completes:
        screen.notice("a base model without a chat template: it completes your text; Enter alone continues")
    if tools := about_tools(conversation):
        screen.notice(f"note: {tools}")


def about_tools(conversation: Conversation) -> str:
    """Return a note if tools are offered to a model whose chat template does not render them; else ""."""
    info = conversation.engine.info
    if conversation.tools is None or info.template_text is None or format_of(info.template_text):
        return ""
    return "the chat template knows no tools: they are added to the system text, which works less well"


def other_model(screen: Screen, conversation: Conversation, before: str) -> None:
    """Show that another model than `before` continues the conversation."""
    name = conversation.engine.info.name
    screen.notice(f"the replies so far are from {safe_line(before, 60)}; {name} continues")


def advises_against_system(info: ModelInfo) -> bool:
    """Return whether the model has the template of DeepSeekMoE, whose authors discourage a system text."""
    template = info.template_text or ""
    return info.architecture == "deepseek" and "User: " in template and "Assistant:" in template


def usage(taken: Usage) -> str:
    """Return a line about the tokens and the time of a reply."""
    seed = "" if taken.seed is None else f", seed {taken.seed}"
    read = taken.prompt_tokens - taken.cached_tokens
    reasoning = f" ({taken.reasoning_tokens:,} of reasoning)" if taken.reasoning_tokens else ""
    return (
        f"prompt {count(taken.prompt_tokens, 'token')} ({read:,} read in {taken.prompt_seconds:.2f} s), "
        f"reply {count(taken.completion_tokens, 'token')}{reasoning} in {taken.completion_seconds:.2f} s "
        f"({taken.tokens_per_second:.1f} tokens/s){seed}"
    )


def thought(turn: Turn) -> str:
    """Return a line about the reasoning of a stored reply."""
    n_tokens = 0 if turn.usage is None else turn.usage.reasoning_tokens
    return f"thought for {count(n_tokens, 'token')}" if n_tokens else "thought"


def made_room(room: MadeRoom) -> str:
    """Return a line about what was removed from the context."""
    if not room.turns:
        return f"the context was full: its oldest {count(room.n_tokens, 'token')} were removed"
    said = [preview(turn.content, 40) for turn in room.turns if turn.role is Role.USER]
    if len(said) == 1:
        return f"the context was full: its oldest message and reply were removed: “{said[0]}”"
    return (
        f"the context was full: its oldest {len(said)} messages and their replies were removed, "
        f"“{said[0]}” to “{said[-1]}”"
    )


def nearly_full(share: float) -> str:
    """Return the warning that the context is nearly full."""
    return (
        f"note: the context is {share:.0%} full; when it is full, replies end: "
        "/set on_full compact (or shift) drops the oldest messages instead"
    )


def ending(reason: FinishReason | None, conversation: Conversation, *, has_text: bool) -> str:
    """Return a note about how a reply ended; empty if the model ended it. `has_text`: the reply has text."""
    turns = conversation.turns
    last_complete = bool(turns) and turns[-1].role is Role.ASSISTANT and not turns[-1].unfinished
    if reason is FinishReason.CANCELLED and not has_text and last_complete:
        return "stopped: the old reply stays"
    if not has_text and reason is FinishReason.STOP:
        return "the reply is empty: /regen tries again"
    return ENDINGS.get(reason, "")


def how_to_make_room(conversation: Conversation) -> str:
    """Return how to make room for a message that does not fit; empty if no earlier message takes room."""
    stops = conversation.settings.on_full is OnFull.STOP
    if not conversation.turns or not stops or conversation.completes:
        return ""
    return (
        f"earlier messages take {count(conversation.n_used, 'token')}: /clear begins a new conversation, "
        "/set on_full compact drops the oldest messages when the context is full"
    )


def recall(screen: Screen, conversation: Conversation, name: str) -> None:
    """Show the last message and reply of the session `name`, shortened, and how an incomplete reply ended."""
    # Imported here, since a one-shot answer needs neither of them.
    from rich.text import Text

    from dsmoe_local.chat.markdown.stream import render_markdown

    turns = conversation.turns
    questions = [index for index, turn in enumerate(turns) if turn.role is Role.USER]
    # The last message with a reply, if there is one, and an unanswered one after it.
    first = questions[-2:][0] if conversation.unanswered else (questions or [0])[-1]
    earlier = f", {count(first, 'message')} before these" if first else ""
    screen.notice(f"{name}{earlier}")
    for turn in turns[first:]:
        if turn.role is Role.USER:
            text = _shortened(without_files(turn.content))
            screen.show(Text(safe_text(f"> {text}"), style="dim"))
            continue
        if turn.reasoning:
            if conversation.settings.think is Think.SHOW:
                screen.show(Text(safe_text(_shortened(turn.reasoning)), style="dim"))
            screen.notice(thought(turn))
        if screen.plain:
            screen.show(Text(safe_text(_shortened(turn.content))))
        else:
            screen.show(render_markdown(_shortened(turn.content), screen.width, colour=screen.colour))
    if conversation.unanswered:
        screen.notice("[not answered: /continue answers it]")
    elif turns and turns[-1].ending in ENDINGS:
        screen.notice(f"[{ENDINGS[turns[-1].ending]}]")


def _shortened(text: str) -> str:
    lines = text.strip().split("\n")
    shown = [line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…" for line in lines]
    return "\n".join([*shown[:_MOST_LINES], *(["…"] if len(shown) > _MOST_LINES else [])])
