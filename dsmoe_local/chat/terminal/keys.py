"""The key bindings of the full terminal."""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit.filters import Always, Condition, Filter, is_searching
from prompt_toolkit.input.ansi_escape_sequences import ANSI_SEQUENCES
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.search import stop_search

from dsmoe_local.chat.terminal.ui import ChatUI

# Shift-Enter in terminals that distinguish it from Enter: kitty's sequence and xterm's.
_SHIFT_ENTER = ("\x1b[13;2u", "\x1b[27;2;13~")


def key_bindings(ui: ChatUI) -> KeyBindings:
    """Return the key bindings of the chat."""
    asked = Condition(lambda: ui.is_asking)
    typing = ~asked & ~is_searching
    empty = typing & Condition(lambda: not ui.input.text)
    queued = empty & Condition(lambda: bool(ui.messages.waiting))
    always = Always()
    # Keys, filter, action, and whether the binding is eager: it does not wait for a longer sequence.
    table: tuple[tuple[str, Filter, Callable[[], object], bool], ...] = (
        ("enter", typing, lambda: _enter(ui), False),
        ("escape enter", typing, lambda: ui.input.newline(copy_margin=False), False),
        ("c-j", typing, lambda: ui.input.newline(copy_margin=False), False),
        ("tab", typing, ui.layout.complete, False),
        ("c-d", empty, ui.leave, False),
        ("up", queued, ui.take_back, False),
        ("escape", queued, ui.take_back, True),
        ("c-x c-e", typing, ui.open_editor, False),
        ("c-g", typing, ui.open_editor, False),
        ("enter", asked, ui.answer_typed, False),
        ("c-d", asked, lambda: ui.answer(yes=False), False),
        ("escape", asked, lambda: ui.answer(yes=False), True),
        ("c-c", ~is_searching, ui.interrupt, True),
        ("<sigint>", always, lambda: stop_search() if is_searching() else ui.interrupt(), False),
        # prompt_toolkit binds these to accept the input, which would discard it.
        ("c-o", always, lambda: None, False),
        ("escape #", always, lambda: None, False),
        ("c-z", always, ui.suspend, False),
        ("c-l", always, ui.clear_screen, False),
    )
    for sequence in _SHIFT_ENTER:
        ANSI_SEQUENCES[sequence] = (Keys.Escape, Keys.ControlM)  # like Alt-Enter
    bindings = KeyBindings()
    for keys, condition, act, eager in table:
        bindings.add(*keys.split(), filter=condition, eager=eager)(_handler(ui, act))

    @bindings.add(Keys.BracketedPaste, filter=typing)
    def paste(event: KeyPressEvent) -> None:
        ui.paste(event.data)

    return bindings


def _handler(ui: ChatUI, act: Callable[[], object]) -> Callable[[KeyPressEvent], None]:
    def handle(event: KeyPressEvent) -> None:
        # Keys may have been read together with the one that opened the editor.
        if not ui.is_suspended:
            act()

    return handle


def _enter(ui: ChatUI) -> None:
    state = ui.input.complete_state
    if state is not None and state.current_completion is not None:
        ui.input.complete_state = None
    elif ui.block_is_open:
        ui.input.newline(copy_margin=False)
    else:
        ui.enter()
