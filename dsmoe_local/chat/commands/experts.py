"""Commands for routed experts: /experts observes and shows them, /active changes how many are used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_count, format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.commands.declare import Chat, Command, Commands, read_count
from dsmoe_local.chat.commands.model import load_model
from dsmoe_local.chat.experts_view import REPLY, SESSION
from dsmoe_local.experts.cost import active_cost, compared, own_number

_DEFAULT = "default"


def _experts(chat: Chat, argument: str) -> None:
    word, _, rest = argument.partition(" ")
    action = _ACTIONS.get(word.lower())
    if action is None:
        raise UsageError(
            f"/experts does not take {safe_line(word, 40)!r}",
            remedy=f"use /experts, or one of {_EXPERTS_ARGUMENTS}",
        )
    action(chat, rest.strip())


def _watch_or_show(chat: Chat, _: str) -> None:
    if chat.experts.on:
        chat.experts.show(chat.screen, REPLY, SESSION)
    else:
        _watch(chat, "")


def _watch(chat: Chat, _: str) -> None:
    chat.experts.switch(True)
    chat.screen.notice(
        "experts are observed from the next reply on; /experts shows more, /experts off stops it"
    )


def _stop_watching(chat: Chat, _: str) -> None:
    chat.experts.switch(False)
    chat.screen.notice("experts are no longer observed")


def _show_reply(chat: Chat, _: str) -> None:
    chat.experts.show(chat.screen, REPLY)


def _show_session(chat: Chat, _: str) -> None:
    chat.experts.show(chat.screen, SESSION)


def _show_layer(chat: Chat, argument: str) -> None:
    number = read_count(argument)
    if number is None:
        raise UsageError("/experts layer takes the number of a layer", remedy="for example /experts layer 5")
    chat.experts.show_layer(chat.screen, number)


_ACTIONS = {
    "": _watch_or_show,
    "on": _watch,
    "off": _stop_watching,
    "reply": _show_reply,
    "session": _show_session,
    "layer": _show_layer,
}
_EXPERTS_ARGUMENTS = "off, reply, session, layer N"


def _complete_experts(chat: Chat, typed: str) -> Iterable[str]:
    first, space, _ = typed.partition(" ")
    if not space:
        return [word for word in _ACTIONS if word]
    return [str(number) for number in chat.experts.layers] if first == "layer" else []


def _active(chat: Chat, argument: str) -> None:
    engine = chat.conversation.engine
    n_routed, now = engine.info.n_routed_experts, engine.info.n_experts_per_token
    if not n_routed:
        raise UsageError("the model is dense: it has no routed experts")
    path = engine.options.path
    own = own_number(path)
    if not argument:
        _show_active(chat, own)
        return
    then = own if argument.lower() == _DEFAULT else _number(argument, engine.info.n_choosable_experts)
    if then == now:
        chat.screen.notice(f"the model already uses {now} of {n_routed} routed experts")
        return
    chat.screen.notice(compared(active_cost(path, now), active_cost(path, then)))
    if then != own:
        chat.screen.notice(
            f"the model was trained with {own}: replies may get worse; /active {_DEFAULT} restores that"
        )
    chat.screen.notice("the model is reloaded, and the conversation is read again with the next message")
    load_model(chat, replace(engine.options, n_experts_per_token=None if then == own else then))
    chat.screen.notice(f"{then} of {n_routed} routed experts are active until this chat ends")


def _show_active(chat: Chat, own: int) -> None:
    engine = chat.conversation.engine
    n_routed, now = engine.info.n_routed_experts, engine.info.n_experts_per_token
    most = engine.info.n_choosable_experts
    numbers = sorted({1, max(1, own // 2), own, now, min(2 * own, most), most})
    costs = [active_cost(engine.options.path, number) for number in numbers]
    remarks = {own: "as trained", now: "now"} if own != now else {own: "now"}
    chat.screen.table(
        [
            ("active experts", "read per token", "active parameters", ""),
            *(
                (
                    f"{cost.n_experts_per_token} of {n_routed}",
                    format_size(cost.n_bytes),
                    format_count(cost.n_activated),
                    remarks.get(cost.n_experts_per_token, ""),
                )
                for cost in costs
            ),
        ]
    )


def _number(argument: str, most: int) -> int:
    number = read_count(argument)
    if number is None or not 1 <= number <= most:
        raise UsageError(
            f"/active {safe_line(argument, 40)} is out of range", remedy=f"use 1 to {most}, or {_DEFAULT}"
        )
    return number


def _complete_active(chat: Chat, typed: str) -> Iterable[str]:
    most = chat.conversation.engine.info.n_choosable_experts
    return [] if " " in typed else [_DEFAULT, *map(str, range(1, most + 1))]


COMMANDS: Commands = {
    "experts": Command(
        _experts,
        "observe and show which experts replies use",
        f"[{_EXPERTS_ARGUMENTS.replace(', ', '|')}]",
        complete=_complete_experts,
        local=True,
    ),
    "active": Command(
        _active,
        "show or change how many routed experts a token uses, until the chat ends",
        f"[N|{_DEFAULT}]",
        complete=_complete_active,
        local=True,
    ),
}
