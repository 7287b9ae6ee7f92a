"""Key bindings beyond prompt_toolkit's Emacs keys, and keys typed while the application does not read."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Callable
from typing import TYPE_CHECKING

from prompt_toolkit.filters import Always, Condition, Filter, is_searching
from prompt_toolkit.input.ansi_escape_sequences import ANSI_SEQUENCES
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.search import stop_search

if TYPE_CHECKING:
    from dsmoe_local.chat.terminal.ui import ChatUI

# Shift-Enter in terminals that tell it from Enter: kitty's sequence and xterm's.
_SHIFT_ENTER = ("\x1b[13;2u", "\x1b[27;2;13~")
_PASTE_END = "\x1b[201~"


def key_bindings(ui: ChatUI) -> KeyBindings:
    """Return the key bindings of the chat."""
    asked = Condition(lambda: ui.is_asking)
    typing = ~asked & ~is_searching
    empty = typing & Condition(lambda: not ui.input.text)
    always = Always()
    queued = empty & Condition(lambda: ui.n_queued > 0)
    # Keys, when they apply, what they do, and whether they are eager: they do not wait for a longer sequence.
    table: tuple[tuple[str, Filter, Callable[[], object], bool], ...] = (
        ("enter", typing, lambda: _enter(ui), False),
        ("escape enter", typing, lambda: ui.input.newline(copy_margin=False), False),
        ("c-j", typing, lambda: ui.input.newline(copy_margin=False), False),
        ("tab", typing, ui.complete, False),
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
        # prompt_toolkit accepts the input with these, which would discard it.
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


def read_typeahead(descriptor: int) -> list[KeyPress]:
    """Return the keys that were typed before the application started. The terminal is in raw mode.

    A single Enter is kept. Several may be the line ends of a paste: they become new lines, so that nothing is
    sent.
    """
    # Before raw mode the terminal may have turned Enter into a line feed, and Ctrl-D into a NUL.
    text = re.sub("\r\n?", "\n", _read_available(descriptor).replace("\0", ""))
    text = text.replace("\n", "\r") if text.count("\n") == 1 else text.strip("\n").replace("\t", " ")
    keys: list[KeyPress] = []
    parser = Vt100Parser(keys.append)
    parser.feed(text)
    parser.flush()
    return keys


def close_open_paste(source: Vt100Input) -> list[KeyPress]:
    """Return the keys of a paste whose end another program has read; none if no paste is open.

    prompt_toolkit's parser would take all further keys, Ctrl-C too, as part of the paste.
    """
    parser = source.vt100_parser
    if not parser._in_bracketed_paste:
        return []
    parser.feed(_read_available(source.fileno()))
    if parser._in_bracketed_paste:
        parser.feed(_PASTE_END)
    return source.flush_keys()


def _read_available(descriptor: int) -> str:
    read = b""
    while select.select([descriptor], [], [], 0)[0]:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:
            break
        if not piece:
            break
        read += piece
    return read.decode(errors="replace")
