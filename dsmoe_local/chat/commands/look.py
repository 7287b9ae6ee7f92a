"""Commands that show the model, its template, tokens, the cost of replies, and the use of the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from rich.text import Text

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_count, format_size
from dsmoe_local.base.text import count, safe_line, safe_text
from dsmoe_local.chat import notices
from dsmoe_local.chat.attachments import preview
from dsmoe_local.chat.commands.declare import Chat, Command, Commands
from dsmoe_local.chat.settings import OnFull, setting_rows
from dsmoe_local.engine.types import Message

_MAX_TOKENS = 2000  # that are shown: the last ones


def _show(chat: Chat, what: str) -> None:
    show = _SHOWN.get(what or "info")
    if show is None:
        raise UsageError(f"/show takes {', '.join(_SHOWN)}, not {safe_line(what, 40)!r}")
    if what in ("template", "prompt") and chat.conversation.engine.info.server:
        raise UsageError(f"/show {what} needs the model on this computer, not on a server")
    show(chat)


def _show_info(chat: Chat) -> None:
    info = chat.conversation.engine.info
    if info.server:
        n_context = f"{info.n_context:,} tokens" if info.n_context else "not known"
        chat.screen.table([("model", info.name), ("server", info.server), ("context", n_context)])
        return
    experts = (
        f"{info.n_experts_per_token} of {info.n_routed_experts}"
        if info.n_routed_experts
        else "none: a dense model"
    )
    chat.screen.table(
        [
            ("model", info.name),
            ("file", str(info.path)),
            ("size", f"{format_size(info.n_bytes)}, {format_count(info.n_parameters)} parameters"),
            ("routed experts", experts),
            ("context", f"{info.n_context:,} tokens (trained for {info.n_context_trained:,})"),
            ("on full", chat.conversation.settings.on_full),
            ("template", info.template or "none: the model completes text"),
            ("runs on", info.placement),
            ("threads", str(info.n_threads)),
        ]
    )


def _show_parameters(chat: Chat) -> None:
    chat.screen.table(setting_rows(chat.conversation.settings))


def _show_template(chat: Chat) -> None:
    info = chat.conversation.engine.info
    if info.template_text is None:
        chat.screen.notice("no chat template: the model completes text")
        return
    chat.screen.notice(info.template or "")
    chat.screen.show(Text(safe_text(info.template_text)))


def _show_prompt(chat: Chat) -> None:
    """Show the tokens of the context with their ids."""
    if not chat.conversation.turns:
        chat.screen.notice("there is no prompt yet: it begins with your first message")
        return
    _show_tokens(chat, chat.conversation.context_ids())


def _show_tokens(chat: Chat, ids: tuple[int, ...]) -> None:
    shown = ids[-_MAX_TOKENS:]
    text = Text()
    for number, (token_id, piece) in enumerate(
        zip(shown, chat.conversation.engine.decode(shown), strict=True)
    ):
        # Alternating styles show where a token ends.
        text.append(safe_text(piece), style="" if number % 2 else "underline")
        text.append(f"[{token_id}]", style="dim cyan")
        text.append(" ")
    chat.screen.show(text)
    left = len(ids) - len(shown)
    chat.screen.notice(count(len(ids), "token") + (f", the first {left:,} not shown" if left else ""))


def _tokens(chat: Chat, text: str) -> None:
    if text:
        _show_tokens(chat, chat.conversation.engine.encode(text))
        return
    replies = [turn for turn in chat.conversation.turns if turn.token_ids]
    if not replies:
        raise UsageError(
            "there is no reply with known tokens yet", remedy="/tokens TEXT shows the tokens of a text"
        )
    _show_tokens(chat, replies[-1].token_ids)


def _stats(chat: Chat, _: str) -> None:
    conversation = chat.conversation
    if conversation.usage is not None:
        chat.screen.notice(notices.usage(conversation.usage))
    else:
        chat.screen.notice("no reply yet")
    taken = [turn.usage for turn in conversation.turns if turn.usage is not None]
    if len(taken) > 1:
        n_tokens = sum(usage.completion_tokens for usage in taken)
        seconds = sum(usage.prompt_seconds + usage.completion_seconds for usage in taken)
        chat.screen.notice(f"all replies: {count(n_tokens, 'token')} in {seconds:.1f} s")
    info = conversation.engine.info
    if info.kernels_reason:
        chat.screen.notice(f"computed {info.kernels} ({info.kernels_reason})")


def _context(chat: Chat, _: str) -> None:
    """Show how many tokens each message takes, the oldest first."""
    conversation = chat.conversation
    info = conversation.engine.info
    rows = []
    if not conversation.completes:
        messages, before, encoder = conversation.messages(), 0, conversation.encoder()
        messages = (*map(_without_reasoning, messages[:-1]), *messages[-1:])
        for index, message in enumerate(messages):
            n_tokens = len(encoder.encode(messages[: index + 1]))
            rows.append((message.role, f"{max(0, n_tokens - before):,}", preview(message.content, 50)))
            before = n_tokens
    if rows:
        chat.screen.table(rows)
    transcript = conversation.transcript
    if transcript.n_left_out:
        chat.screen.notice(f"{count(transcript.n_left_out, 'earlier message')} left out")
    if transcript.n_shifted:
        chat.screen.notice(f"{count(transcript.n_shifted, 'token')} of these shifted out")
    share = conversation.n_used / info.n_context
    chat.screen.notice(
        f"context: {conversation.n_used:,} of {info.n_context:,} tokens ({share:.0%}); "
        f"when it is full: {_ON_FULL[conversation.settings.on_full]}"
    )


def _without_reasoning(message: Message) -> Message:
    """Return a message as most templates render it when it is not the last one."""
    return replace(message, token_ids=(), reasoning_content="") if message.reasoning_content else message


_ON_FULL: Mapping[OnFull, str] = {
    OnFull.STOP: "stop",
    OnFull.SHIFT: "shift the oldest tokens out",
    OnFull.COMPACT: "leave out the oldest messages",
}
_SHOWN: Mapping[str, Callable[[Chat], None]] = {
    "info": _show_info,
    "parameters": _show_parameters,
    "template": _show_template,
    "prompt": _show_prompt,
}

COMMANDS: Commands = {
    "show": Command(
        _show,
        "show the model, the settings, the template, or the tokens of the prompt",
        f"[{'|'.join(_SHOWN)}]",
        complete=lambda chat, typed: _SHOWN,
    ),
    "stats": Command(_stats, "show tokens and time of the last reply"),
    "context": Command(_context, "show what fills the context", local=True),
    "tokens": Command(_tokens, "show the tokens of the last reply, or of TEXT", "[TEXT]", local=True),
}
