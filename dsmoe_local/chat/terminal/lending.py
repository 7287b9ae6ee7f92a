"""The full terminal given away for a while: to the user's editor, or to the shell after Ctrl-Z."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

from prompt_toolkit.application import Application, in_terminal

from dsmoe_local.chat.terminal.editor import Editor
from dsmoe_local.chat.terminal.mailbox import Action, Mailbox
from dsmoe_local.chat.terminal.threads import await_thread


class Lending:
    """Keys and screen are another program's while `away`; what is posted waits. `back` is called afterwards,
    `redraw` where nobody knows what is on the screen.
    """

    def __init__(self, app: Application[None], mailbox: Mailbox, *, back: Action, redraw: Action) -> None:
        self.away = False
        self._app = app
        self._mailbox = mailbox
        self._back = back
        self._redraw = redraw
        self._editor: Editor | None = None

    def start(self) -> None:
        """Be ready; in the loop."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGCONT, self._come_back)

    def lend(self, use: Callable[[], Awaitable[None]]) -> None:
        """Let `use` have the terminal. Not while it is away."""
        # From now on, not from when `use` begins: more keys may be there already.
        self.away = True
        self._mailbox.pause(True)
        self._app.create_background_task(self._lend(use))

    async def edit(self, text: str) -> str | None:
        """Have a text edited while the terminal is away; see Editor.edit."""
        self._editor = editor = Editor()
        try:
            return await await_thread(lambda: editor.edit(text))
        finally:
            self._editor = None

    async def stop_as_job(self) -> None:
        """Stop as a job of the shell, while the terminal is away, until it is told to go on."""
        loop = asyncio.get_running_loop()
        # Drawn again in any case: the signal that lets it go on is not for `_come_back`.
        loop.remove_signal_handler(signal.SIGCONT)
        os.kill(0, signal.SIGTSTP)
        loop.add_signal_handler(signal.SIGCONT, self._come_back)

    def demand(self) -> None:
        """Have the terminal back, whoever uses it."""
        if self._editor is not None:
            self._editor.end()

    async def _lend(self, use: Callable[[], Awaitable[None]]) -> None:
        try:
            async with in_terminal():
                await use()
        finally:
            self.away = False
            self._mailbox.pause(False)
            self._back()

    def _come_back(self) -> None:
        """Somebody else had the terminal."""
        if not self.away:
            self._redraw()
