"""`python -m support.watched_chat LOG ...`: fake_chat, which logs what it prints, draws and saves."""

from __future__ import annotations

import json
import sys
from typing import IO, Any

from prompt_toolkit.application import get_app
from prompt_toolkit.filters import is_searching

from dsmoe_local.chat.chat import Chat
from dsmoe_local.chat.terminal import renderer
from dsmoe_local.chat.terminal.frame import Frame, paint
from dsmoe_local.chat.terminal.renderer import InlineRenderer
from support import fake_chat


class Watch:
    """Writes the log. Its methods replace those that they wrap."""

    def __init__(self, log: IO[str]) -> None:
        self._log = log
        self._erase = InlineRenderer.erase
        self._clear, self._reset = InlineRenderer.clear, InlineRenderer.reset
        self._save, self._take = Chat.save, Chat.take

    def _write(self, **entry: object) -> None:
        self._log.write(f"{json.dumps(entry)}\n")
        self._log.flush()

    def paint(self, old: Frame | None, new: Frame, above: str = "", *, reflows: bool = False) -> str:
        """Log a drawn frame."""
        layout = get_app().layout
        buffer = layout.get_buffer_by_name("input")
        typing = buffer is not None and layout.current_buffer is buffer and not is_searching()
        self._write(
            event="draw",
            above=above,
            lines=new.lines,
            size=(new.columns, new.rows),
            cursor=(new.row, new.column),
            input=buffer.text if typing and buffer is not None else None,
        )
        return paint(old, new, above, reflows=reflows)

    def erase(self, of: Any, leave_alternate_screen: bool = True) -> None:
        """Log that the frame is erased."""
        self._write(event="erase", above="".join(of._above))
        self._erase(of, leave_alternate_screen)

    def clear(self, of: Any) -> None:
        """Log that the screen is cleared."""
        self._write(event="clear")
        self._clear(of)

    def reset(self, of: Any, _scroll: bool = False, leave_alternate_screen: bool = True) -> None:
        """Log that the position of the frame is forgotten."""
        if getattr(of, "_frame", None) is not None:
            self._write(event="reset")
        self._reset(of, _scroll, leave_alternate_screen)

    def save(self, of: Chat) -> None:
        """Log the turns before they are saved and after."""
        turns = [(turn.role, turn.content) for turn in of.conversation.transcript.turns]
        self._write(event="saving", turns=turns)
        self._save(of)
        if of.session is not None and of.session.number:
            self._write(event="saved", session=of.session.number, turns=turns)

    def take(self, of: Chat, text: str) -> bool:
        """Log the beginning and the end of an answer."""
        self._write(event="take", begins=True)
        goes_on = self._take(of, text)
        self._write(event="take", begins=False)
        return goes_on


def main() -> None:
    """Run the chat with the log."""
    with open(sys.argv.pop(1), "a", encoding="utf-8") as log:
        _install(Watch(log))
        fake_chat.main()


def _install(watch: Watch) -> None:
    setattr(renderer, "paint", watch.paint)  # noqa: B010 - it is imported there
    InlineRenderer.erase = lambda self, leave=True: watch.erase(self, leave)  # type: ignore[method-assign,assignment]
    InlineRenderer.clear = lambda self: watch.clear(self)  # type: ignore[method-assign]
    InlineRenderer.reset = lambda self, *arguments, **named: watch.reset(self, *arguments, **named)  # type: ignore[method-assign]
    Chat.save = lambda self: watch.save(self)  # type: ignore[method-assign]
    Chat.take = lambda self, text: watch.take(self, text)  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
