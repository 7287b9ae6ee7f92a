"""`python -m support.terminal_chat`: a terminal with a scripted chat, without an engine.

`/reply NAME` shows a reply of `REPLIES`; a text that is not a command is shown as its own reply.
A `¤` in a reply halts it until Ctrl-C; meanwhile the file `halted` exists in the working folder.
A `¬` halts it until the file `go` exists there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from rich.text import Text

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.chat import multiline
from dsmoe_local.chat.commands.completion import choices
from dsmoe_local.chat.commands.declare import Command
from dsmoe_local.chat.terminal import open_terminal
from dsmoe_local.chat.terminal.screen import Status

MARKDOWN = """\
# Experts

A **mixture of experts** has many small networks, and a *router* that picks `6` of 64 of them:

1. the router scores every expert,
2. the best ones are run,
3. their outputs are summed.

```python
def route(scores: list[float], k: int = 6) -> list[int]:
    \"\"\"The k best experts.\"\"\"
    return sorted(range(len(scores)), key=scores.__getitem__)[-k:]
```

专家混合模型只激活一小部分参数，所以推理很快。👍

| model | parameters | active |
|---|---:|---:|
| 16B | 16.4B | 2.8B |
| 专家 | 145B | 22B |

> Memory is cheap on a laptop, compute is not.
"""

REPLIES = {
    "markdown": MARKDOWN,
    "half": f"{MARKDOWN.partition('    return')[0]}¤",
    "table": f"{MARKDOWN.partition('| 专家')[0]}¤",
    "long": "".join(f"{number}. a line of the long reply\n" for number in range(1, 61)),
    "halt": "A first paragraph.\n\nA second one begins, longer than a narrow window is wide, so it wraps.¤",
    "wide": "一二三四五六七八九十" * 12 + "¤",
}


class ScriptedChat:
    """Answers as described above."""

    def __init__(self, *, plain: bool) -> None:
        self.commands = {
            "reply": Command(self._reply, "show a reply", "NAME", complete=lambda chat, typed: REPLIES),
            "delete": Command(self._delete, "ask, then say what was answered", "NAME", aliases=("del",)),
            "edit": Command(self._edit, "edit a text"),
            "read": Command(self._echo, "read a file", "FILE", files=True),
            "copy": Command(self._copy, "copy a text"),
            "panel": Command(self._panel, "show a panel beside a reply that halts"),
            "note": Command(self._note, "a note amid a reply"),
            "prompt": Command(self._prompt, "read a long prompt that halts"),
            "error": Command(self._error, "raise an error"),
            "crash": Command(self._crash, "raise what nobody expects"),
            "exit": Command(self._exit, "leave", aliases=("quit",)),
        }
        self._stopped = threading.Event()
        self.hangs = False
        self.over = False
        self.n_used = 0
        self.screen = open_terminal(
            plain=plain,
            status=self._status,
            complete=lambda before: choices(before, self.commands, None),  # type: ignore[arg-type]
            history_path=Path("history"),
        )

    def _status(self) -> Status:
        return Status("SmolLM2 135M", "notes on go", self.n_used, 2048, 23.4 if self.n_used else 0)

    def run(self) -> None:
        self.screen.notice("SmolLM2 135M · 2,048 tokens of context · /help")
        self.screen.run(self.take, self.cancel, self.kill)

    def cancel(self) -> None:
        if self.hangs:
            self.screen.notice("hung")
        else:
            self._stopped.set()

    def kill(self) -> None:
        self.screen.notice("killed")
        self._stopped.set()

    def take(self, text: str) -> bool:
        self._stopped.clear()
        name, _, rest = text.removeprefix("/").partition(" ")
        try:
            if text.startswith("/") and name in self.commands:
                self.commands[name].run(None, rest)  # type: ignore[arg-type]
            elif (message := multiline.content(text)) is not None:
                self._say(message)
            elif text.strip():
                self._say(text)
        except DsmoeError as error:
            self.screen.error(error)
        return not self.over

    def _say(self, text: str, pause: float = 0.0) -> None:
        with self.screen.reply() as view:
            for start in range(0, len(text), 3):
                piece = text[start : start + 3]
                if self._stopped.is_set():
                    break
                halts = "¤" in piece or "¬" in piece
                # Counted before it is shown: nothing draws the count anew afterwards.
                self.n_used += not halts
                view.text(piece.replace("¤", "").replace("¬", ""))
                if "¤" in piece:
                    Path("halted").touch()
                    self._stopped.wait()
                    Path("halted").unlink()
                if "¬" in piece:
                    while not Path("go").exists() and not self._stopped.is_set():
                        time.sleep(0.01)
                self.n_used += halts
                time.sleep(pause)
            if self._stopped.is_set():
                view.note("[stopped: /continue continues it]")

    def _reply(self, chat: object, name: str) -> None:
        name, _, pause = name.partition(" ")
        self._say(REPLIES[name], float(pause or 0))

    def _delete(self, chat: object, name: str) -> None:
        self.screen.notice("gone" if self.screen.confirm(f"delete {name}?") else "kept")

    def _edit(self, chat: object, text: str) -> None:
        self.screen.notice(f"edited: {self.screen.edit(text)}")

    def _echo(self, chat: object, text: str) -> None:
        self.screen.notice(text)

    def _copy(self, chat: object, text: str) -> None:
        self.screen.notice(self.screen.copy(text))

    def _panel(self, chat: object, text: str) -> None:
        self.screen.live(Text("layer 1 ░▒▓█\nlayer 2 █▓▒░"))
        self._say("a reply beside a panel¤")
        self.screen.live(None)

    def _note(self, chat: object, text: str) -> None:
        with self.screen.reply() as view:
            view.note("the oldest turn has left the context")
            view.text("a reply\n\nthat goes")
            view.note("another one has")
            view.text(" on")

    def _prompt(self, chat: object, text: str) -> None:
        with self.screen.reply() as view:
            view.progress(100, 2000)
            view.progress(300, 2000)
            self._stopped.wait()
            view.note("[stopped]")

    def _error(self, chat: object, text: str) -> None:
        raise UsageError("this cannot be", where="here", remedy="do that")

    def _crash(self, chat: object, text: str) -> None:
        raise RuntimeError("nobody expects this")

    def _exit(self, chat: object, text: str) -> None:
        self.over = True


def main() -> None:
    """Run the chat. Arguments: `plain` for the plain terminal; `hangs`: only `kill` ends a halted reply."""
    chat = ScriptedChat(plain="plain" in sys.argv)
    chat.hangs = "hangs" in sys.argv
    try:
        chat.run()
    except DsmoeError as error:
        print(f"ended: {error}")
        sys.exit(error.exit_code)
    print("left", os.getpid() > 0)


if __name__ == "__main__":
    main()
