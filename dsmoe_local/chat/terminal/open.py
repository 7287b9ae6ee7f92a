"""Which of the two terminals a chat gets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from dsmoe_local.chat.terminal.completion import Complete, nothing
from dsmoe_local.chat.terminal.environment import only_prints
from dsmoe_local.chat.terminal.screen import Screen
from dsmoe_local.chat.terminal.status import Status


class Terminal(Screen, Protocol):
    """A Screen that also reads what the user says."""

    def run(self, take: Callable[[str], bool], cancel: Callable[[], None], kill: Callable[[], None]) -> None:
        """Read inputs until the user leaves, or `take` says so.

        `take` deals with one input and returns whether the chat goes on; what it raises is raised here.
        `cancel` stops what it does and returns at once, `kill` ends an engine that does not stop: any thread
        may call them, but no signal handler. Raises InterruptedRunError for SIGTERM and SIGHUP, with the
        terminal as it was.
        """
        ...


def open_terminal(
    *,
    plain: bool,
    state: Callable[[], Status],
    complete: Complete = nothing,
    history_path: Path | None = None,
    markdown: bool = True,
) -> Terminal:
    """The full terminal; the plain one if it is asked for, or where nothing can be drawn.

    `state` gives the bottom line, `complete` what Tab offers: neither is called in the thread that answers.
    Without `markdown` replies are printed as they come. `history_path` None: nothing typed is kept.
    """
    if plain or only_prints() or not (sys.stdin.isatty() and sys.stdout.isatty()):
        from dsmoe_local.chat.terminal.plain import PlainTerminal

        return PlainTerminal(complete, history_path)
    from dsmoe_local.chat.terminal.full import FullTerminal

    return FullTerminal(state, complete, history_path, markdown=markdown)
