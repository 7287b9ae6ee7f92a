"""Typed and pasted text in the full terminal: drafts, blocks, queued messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.screens import StartChat
from support.terminal import CTRL_C, ENTER, editor_script

BLOCK_OPEN = "block open"


def test_blocks(chat: StartChat) -> None:
    """Guards: a block sent at its first line, an open block without a hint, marks that are sent."""
    terminal = chat()
    terminal.send('"""' + ENTER)
    terminal.wait_screen(rf'{BLOCK_OPEN}.*\n> """\n')
    terminal.send("/exit" + ENTER + '    """Doc."""' + ENTER + "b" + ENTER)
    terminal.wait_screen(rf'{BLOCK_OPEN}.*\n> """\n  /exit\n      """Doc."""\n  b\n')
    terminal.send('"""' + ENTER)
    terminal.wait_screen(r'(?s)> """\n  /exit.*  """\n\n/exit\n"""Doc."""\nb\n\n>\n')
    assert BLOCK_OPEN not in terminal.screen_text()


def test_quotes_that_open_nothing(chat: StartChat) -> None:
    """Guards: a message in quotes that Enter never sends."""
    terminal = chat()
    terminal.send('"""Return the sum.' + ENTER)
    terminal.wait_screen(r'> """Return the sum\.\n\n"""Return the sum\.\n\n>\n')
    terminal.send('""""""' + ENTER + "next" + ENTER)
    terminal.wait_screen(r'> """"""\n\n> next\n\nnext\n\n>\n')


@pytest.mark.parametrize("text", ['"""\na docstring\n', '"""\na docstring\n"""', '"""\na\n"""\nb = 1'])
def test_a_paste_opens_no_block(chat: StartChat, text: str) -> None:
    """Guards: pasted code that begins with quotes and cannot be sent, or is sent without the quotes."""
    terminal = chat()
    terminal.paste(text)
    terminal.wait_screen(r"  a")
    assert BLOCK_OPEN not in terminal.screen_text()
    terminal.send(ENTER)
    terminal.wait_screen(rf"\n\n{re.escape(text.strip())}\n\n>\n")
    # The history has it as a block, so that it is sent unchanged again.
    terminal.send("\x1b[A")
    terminal.wait_screen(r'> """\n  """\n')
    terminal.send("\x05" + ENTER)
    terminal.until(lambda shown: shown.count(f"\n\n{text.strip()}\n\n") == 2)


def test_a_paste_amid_a_reply_is_one_message(chat: StartChat) -> None:
    """Guards: the lines of a paste sent one by one."""
    terminal = chat()
    terminal.send("/reply halt" + ENTER)
    terminal.wait_screen("so it wraps")
    terminal.paste("one\r\ntwo\rthree\n")
    terminal.wait_screen(r"> one\n  two\n  three\n")
    terminal.send(ENTER)
    terminal.wait_screen(r"queued: one two three\n")


def test_keys_that_throw_nothing_away(chat: StartChat) -> None:
    """Guards: keys of readline that accept the line, so that it is lost."""
    terminal = chat()
    terminal.send("kept\x0f and")
    terminal.wait_screen("> kept and")
    terminal.send("\x1b# more")
    terminal.wait_screen("> kept and more")


@pytest.mark.parametrize("keys", ["\x07\x07", "\x07\x07" + ENTER, "\x07\x1a\x07", "\x07\x03", "\x07\x0c\x07"])
def test_the_editor_opens_once(chat: StartChat, tmp_path: Path, keys: str) -> None:
    """Guards: a second editor after the first, which discards the text written in the first."""
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\necho opened >> log\necho edited >> "$1"\n', encoding="utf-8")
    editor.chmod(0o700)
    terminal = chat(VISUAL=str(editor))
    terminal.send("draft" + keys)
    terminal.wait_screen(r"\n> draft\n  edited\n")
    terminal.send(" more")
    terminal.wait_screen(r"\n> draft\n  edited more\n")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "opened\n"


def test_a_paste_without_its_end(chat: StartChat, tmp_path: Path) -> None:
    """Guards: all keys, Ctrl-C too, taken as a paste whose end the editor has read."""
    terminal = chat(VISUAL=editor_script(tmp_path, "exit 1"))
    terminal.send("a \x07\x1b[200~pasted\rtext")
    terminal.wait_screen(r"> a pasted\n  text\n")
    terminal.send(" and typed")
    terminal.wait_screen(r"> a pasted\n  text and typed\n")


def test_the_editor_without_room(chat: StartChat) -> None:
    """Guards: a full disk that ends the chat or loses the draft."""
    code = (
        "import tempfile\n"
        "from support import terminal_chat\n"
        "def full(*_, **__): raise OSError(28, 'No space left on device')\n"
        "tempfile.TemporaryDirectory = full\n"
        "terminal_chat.main()\n"
    )
    terminal = chat(code=code, VISUAL="true")
    terminal.send("kept\x07")
    terminal.wait_screen(r"error: .*No space left on device(?s:.*)\n> kept\n")
    terminal.send("\x15/edit" + ENTER)
    terminal.wait_screen(r"> /edit\n+error: .*No space left on device")


def test_messages_wait_and_are_sent(chat: StartChat, tmp_path: Path) -> None:
    """Guards: messages sent during a reply that are lost, or come in another order."""
    terminal = chat()
    terminal.send("reply¬ends" + ENTER)
    terminal.wait_screen("\n\nreply\n")
    terminal.send("first" + ENTER + "second" + ENTER)
    terminal.wait_screen("queued: first\nqueued: second\n")
    (tmp_path / "go").touch()
    terminal.wait_screen(r"\n\nreplyends\n\n> first\n\nfirst\n\n> second\n\nsecond\n\n>\n")


def test_interruption_gives_what_waits_back(chat: StartChat) -> None:
    """Guards: Ctrl-C that stops one reply to begin the next; a draft or a message that is lost."""
    terminal = chat()
    terminal.send("/reply halt" + ENTER)
    terminal.wait_screen("so it wraps")
    terminal.send('"""' + ENTER + "first" + ENTER + '"""' + ENTER + "second" + ENTER + "draft")
    terminal.wait_screen(r'(?s)queued: """ first """\nqueued: second\n.*> draft\n')
    terminal.send(CTRL_C)
    terminal.wait_screen(r"stopped: /continue continues it\]\n\n> first\n  second\n  draft\nSmolLM2")
    assert "queued" not in terminal.screen_text()


def test_an_interruption_is_for_the_job_that_runs(chat: StartChat) -> None:
    """Guards: a cancel from another thread, which may stop the next message; one that comes too early."""
    code = (
        "import threading\n"
        "from support import terminal_chat\n"
        "class Chat(terminal_chat.ScriptedChat):\n"
        "    def cancel(self):\n"
        "        self.screen.notice(f'in {threading.current_thread().name}')\n"
        "        super().cancel()\n"
        "terminal_chat.ScriptedChat = Chat\n"
        "terminal_chat.main()\n"
    )
    terminal = chat(code=code)
    terminal.send("/reply halt" + ENTER + CTRL_C)
    terminal.wait_screen(r"(?s)in MainThread.*\n\n>\n")
    terminal.send("next" + ENTER)
    terminal.wait_screen(r"> next\n\nnext\n\n>\n")
