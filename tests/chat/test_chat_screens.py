"""What a whole chat shows, on a fake engine: going back and on, sessions, a full context, crashes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.screens import ScreenTerminal
from support.terminal import CTRL_C, CTRL_D, ENTER

from dsmoe_local.chat.terminal.plain import PlainTerminal

Start = Callable[..., ScreenTerminal]


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Start]:
    """Starts chats, in a folder of their own."""
    started: list[ScreenTerminal] = []

    def start(*arguments: str, columns: int = 80, lines: int = 30, **environment: str) -> ScreenTerminal:
        terminal = ScreenTerminal(
            ["-m", "support.fake_chat", *arguments],
            environment,
            columns=columns,
            lines=lines,
            folder=tmp_path,
        )
        started.append(terminal)
        terminal.wait_screen(r"context \d")
        return terminal

    yield start
    for terminal in started:
        terminal.__exit__(None, None, None)


def say(terminal: ScreenTerminal, text: str, shown: str) -> None:
    """Send `text` and wait until `shown` has been printed after it, with the empty input below."""
    terminal.send(text + ENTER)
    terminal.wait_screen(rf"(?s)> {re.escape(text)}(?=\n).*{shown}.*\n>\n[^\n]*$")


def test_first_run(chat: Start) -> None:
    """Guards: a greeting that does not say what one talks with and where help is."""
    terminal = chat()
    say(terminal, "hello", "\nhello")
    terminal.check("chat_first_run")
    terminal.send(CTRL_D)
    assert terminal.ending() == 0


def test_again_back_otherwise_and_on(chat: Start) -> None:
    """Guards: /regen, /undo, /edit, /continue and /fork changing other turns than they say."""
    terminal = chat(EDITOR="sed -i s/second/changed/")
    say(terminal, "first", "\nfirst")
    say(terminal, "second", "\nsecond")
    say(terminal, "/regen", "\nsecond")
    say(terminal, "/edit", "changed")
    say(terminal, "/undo", "removed: “changed”")
    say(terminal, "/fork other", "this is now other")
    say(terminal, "/context", "user ")
    terminal.check("chat_again", whole=True)


@pytest.mark.parametrize("arguments", [[], ["plain"]])
def test_what_an_editor_gave_is_shown(arguments: list[str]) -> None:
    """Guards: an answer on the screen without its question, which was changed or written in an editor."""
    editor = "sed -i 's/second/changed/;s/^$/written/'"
    with ScreenTerminal(["-m", "support.fake_chat", *arguments], {"EDITOR": editor}, lines=40) as terminal:
        terminal.wait_screen(r"/help\n+>")
        terminal.send("second" + ENTER)
        terminal.wait_screen(r"> second\n\n?second\n+>")
        terminal.send("/edit" + ENTER)
        terminal.wait_screen(r"> /edit\n\n?> changed\n\n?changed\n+>")
        terminal.send("/edit second" + ENTER)
        terminal.wait_screen(r"> /edit second\n\n?second\n+>")
        terminal.send("/editor" + ENTER)
        terminal.wait_screen(r"> /editor\n\n?> written\n\n?written\n+>")


def test_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    """Guards: a message, a file's name or an export that ends the chat, since its folder was deleted."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with ScreenTerminal(["-m", "support.fake_chat"], folder=folder, lines=60) as terminal:
        terminal.wait_screen(r"context \d")
        folder.rmdir()
        say(terminal, "hello", "\nhello")
        say(terminal, "see @a.txt", r"a\.txt does not exist and is sent as text\n\nsee @a\.txt")
        say(terminal, "/read a.txt", "error: the file cannot be read")
        say(terminal, "/export a.md", "error: the export cannot be written")
        terminal.send("see @a\t")
        terminal.wait_screen("> see @a\n")
        terminal.send("\x15/exit" + ENTER)
        assert terminal.ending() == 0


def test_stopped_and_continued(chat: Start) -> None:
    """Guards: Ctrl-C losing what came, or the message it came before."""
    terminal = chat()
    terminal.send("one# two" + ENTER)
    terminal.wait_screen(r"two\n\none")
    terminal.send(CTRL_C)
    terminal.wait_screen("stopped: /continue")
    terminal.send("#never begun" + ENTER)
    terminal.wait_screen("> #never begun")
    terminal.wait_screen(r"never begun\n\n>\n")
    terminal.send(CTRL_C)
    terminal.until(lambda text: text.count("stopped: /continue") == 2)
    say(terminal, "/context", "#never begun")
    terminal.check("chat_stopped")


def test_session_goes_on_after_kill_9(chat: Start) -> None:
    """Guards: a turn that was on the screen but not on the disk; a question lost with its reply."""
    terminal = chat("no-drafts")
    say(terminal, "/save letters", "saved as letters")
    say(terminal, "alpha", "\nalpha")
    terminal.send("beta#gamma" + ENTER)
    terminal.wait_screen(r"gamma\n\nbeta")
    os.kill(terminal.pid, signal.SIGKILL)
    terminal.ending()
    terminal = chat("latest")
    terminal.check("chat_resumed")
    say(terminal, "/continue", "\nbeta")


@pytest.mark.parametrize("on_full", ["stop", "shift", "compact"])
def test_context_full(chat: Start, on_full: str) -> None:
    """Guards: a conversation that is cut without a word, or that cannot go on where it was to."""
    terminal = chat("200", lines=60)
    say(terminal, f"/set on_full {on_full}", f"on_full {on_full}")
    for letter in "abc":
        say(terminal, letter * 40, rf"\n({letter * 40}|error: )")
    terminal.check(f"chat_full_{on_full}")


def test_crash_amid_a_reply(chat: Start) -> None:
    """Guards: a crash that ends the chat, or one after which nobody knows what to do."""
    terminal = chat()
    say(terminal, "fine", "\nfine")
    say(terminal, "half!way", "loads the model again")
    say(terminal, "next", "\nnext")
    terminal.check("chat_crash")


def test_base_model(chat: Start) -> None:
    """Guards: a conversation's format put around the text for a base model."""
    terminal = chat("base")
    say(terminal, "once", "\nonce")
    for _ in range(4):
        # Before the reply is saved, too, there is nothing to go on with.
        terminal.send(ENTER)
        with suppress(AssertionError):
            terminal.wait_screen("onceonce")
            break
    say(terminal, "/system Be brief.", "no system text")
    terminal.check("chat_base")


def test_forty_columns(chat: Start) -> None:
    """Guards: help and notices that run out of a narrow window."""
    terminal = chat(columns=40, lines=200)
    say(terminal, "/help all", r"until\s+the\s+chat\s+ends")
    say(terminal, "/help", r"explains\s+all\s+of\s+them")
    terminal.check("chat_narrow_help")


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_none_are_wanted(chat: Start, environment: dict[str, str]) -> None:
    """Guards: colour codes on a dumb terminal or against NO_COLOR."""
    terminal = ScreenTerminal(["-m", "support.fake_chat"], environment)
    with terminal:
        terminal.wait_screen("/help\n")
        terminal.send("/set" + ENTER)
        terminal.wait_screen(r"on_full[^>]*\n>")  # what is typed before the prompt is echoed above it
        terminal.send("**hi** `code`" + ENTER)
        terminal.wait_screen(r"code`?\s+\S*hi\S* `?code")
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m|\x1b\[[0-9;]*[34]8;", terminal.raw)
        if "TERM" in environment:
            assert "\x1b" not in terminal.raw


def test_what_a_model_says_is_inert(chat: Start) -> None:
    """Guards: a model that clears the screen, changes the title, or writes with Rich markup."""
    terminal = chat()
    before = len(terminal.raw)
    terminal.paste("[red]x[/red]\x9b2J\u202ey")
    terminal.send(ENTER)
    terminal.wait_screen(r"\n\n\[red\]x\[/red\]\N{REPLACEMENT CHARACTER}2J\N{REPLACEMENT CHARACTER}y")
    assert "\x9b" not in terminal.raw[before:]
    assert "\u202e" not in terminal.raw[before:]


def test_reasoning_is_dimmed_above_the_answer(chat: Start) -> None:
    """Guards: reasoning that looks like the answer, or is rendered as Markdown, or is shown when hidden."""
    terminal = chat("reasons")
    terminal.send("<think>first **this**, then# that, which takes more than one line on this terminal, since "
                  "it goes on</think>## yes" + ENTER)  # fmt: skip
    terminal.wait_screen(r"first \*\*this\*\*, then\n")
    terminal.check("chat_reasoning_open")
    terminal.send(CTRL_C)
    terminal.wait_screen(r"thought for \d+ s, 20 tokens\n(?s:.)*/continue continues it")
    say(terminal, "<think>again</think>**no**", r"again\nthought for \d+ s, 13 tokens\n\nno\n")
    say(terminal, "/think hide", "think hide: ")
    terminal.send("<think>aside#</think>yes" + ENTER)
    terminal.wait_screen(r"thinking: 5 tokens")
    terminal.send(CTRL_C)
    terminal.wait_screen(r"thought for \d+ s, 5 tokens")
    say(terminal, "/think show", "\naside\nthink show: ")


def test_reasoning_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: reasoning and answer that cannot be told apart without styles."""
    with PlainTerminal().reply() as view:
        for piece in ("h", "m"):
            view.reasoning(piece)
        view.reasons(3)
        view.reasoned("thought for 2 s, 3 tokens")
        view.text("yes")
    assert capsys.readouterr().out == "[reasoning]\nhm\n[thought for 2 s, 3 tokens]\n\nyes\n"
