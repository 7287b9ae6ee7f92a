"""Which key does what, where prompt_toolkit's emacs keys do not suffice. What is done is the interface's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prompt_toolkit.buffer import Buffer
from prompt_toolkit.filters import Always, Condition, Filter, is_searching
from prompt_toolkit.input.ansi_escape_sequences import ANSI_SEQUENCES
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.search import stop_search

# Shift-Enter, where a terminal tells it from Enter: the codes of kitty and of xterm.
_SHIFT_ENTER = ("\x1b[13;2u", "\x1b[27;2;13~")


class Actions(Protocol):
    """What keys do. `input` is the buffer of the next message."""

    @property
    def input(self) -> Buffer: ...
    @property
    def asked(self) -> bool: ...
    @property
    def away(self) -> bool: ...
    @property
    def n_queued(self) -> int: ...
    @property
    def block_is_open(self) -> bool: ...
    def paste(self, text: str) -> None: ...
    def enter(self) -> None: ...
    def answer(self, yes: bool) -> None: ...
    def answer_typed(self) -> None: ...
    def interrupt(self) -> None: ...
    def leave(self) -> None: ...
    def complete(self) -> None: ...
    def take_back(self) -> None: ...
    def open_editor(self) -> None: ...
    def suspend(self) -> None: ...
    def clear_screen(self) -> None: ...


def key_bindings(actions: Actions) -> KeyBindings:
    """The keys of the whole chat."""
    asked = Condition(lambda: actions.asked)
    typing = ~asked & ~is_searching
    blank = typing & Condition(lambda: not actions.input.text)
    queued = blank & Condition(lambda: actions.n_queued > 0)
    table: tuple[tuple[str, Filter, Callable[[], object]], ...] = (
        ("enter", typing, lambda: _enter(actions)),
        ("escape enter", typing, lambda: actions.input.newline(copy_margin=False)),
        ("c-j", typing, lambda: actions.input.newline(copy_margin=False)),
        ("tab", typing, actions.complete),
        ("c-d", blank, actions.leave),
        ("up", queued, actions.take_back),
        ("c-x c-e", typing, actions.open_editor),
        ("c-g", typing, actions.open_editor),
        ("enter", asked, actions.answer_typed),
        ("c-d", asked, lambda: actions.answer(yes=False)),
        ("<sigint>", Always(), lambda: _interrupt(actions)),
        # What prompt_toolkit has on these throws the input away.
        ("c-o", Always(), _do_nothing),
        ("escape #", Always(), _do_nothing),
        ("c-z", Always(), actions.suspend),
        ("c-l", Always(), actions.clear_screen),
    )
    # Keys that wait for none that may follow: Esc begins many, Ctrl-C some.
    eager: tuple[tuple[str, Filter, Callable[[], object]], ...] = (
        ("escape", queued, actions.take_back),
        ("escape", asked, lambda: actions.answer(yes=False)),
        ("c-c", ~is_searching, actions.interrupt),
    )
    for code in _SHIFT_ENTER:
        ANSI_SEQUENCES[code] = (Keys.Escape, Keys.ControlM)  # the same as Alt-Enter
    keys = KeyBindings()
    for rows, at_once in ((table, False), (eager, True)):
        for names, condition, act in rows:
            keys.add(*names.split(), filter=condition, eager=at_once)(_handler(actions, act))

    @keys.add(Keys.BracketedPaste, filter=typing)
    def paste(event: KeyPressEvent) -> None:
        actions.paste(event.data)

    return keys


def _handler(actions: Actions, act: Callable[[], object]) -> Callable[[KeyPressEvent], None]:
    def handle(event: KeyPressEvent) -> None:
        # Keys that came together with the one that gave the terminal away.
        if not actions.away:
            act()

    return handle


def _do_nothing() -> None:
    return None


def _enter(actions: Actions) -> None:
    buffer = actions.input
    if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
        buffer.complete_state = None
    elif actions.block_is_open:
        buffer.newline(copy_margin=False)
    else:
        actions.enter()


def _interrupt(actions: Actions) -> None:
    if is_searching():
        stop_search()
    else:
        actions.interrupt()
