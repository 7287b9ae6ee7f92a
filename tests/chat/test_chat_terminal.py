"""The chat in a pseudo-terminal: keys, turns, interruption, leaving; on a fake engine and on real files."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from support.models import smollm2, tiny_model
from support.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, Terminal

from dsmoe_local.base.paths import data_folder

FAKE = ["-m", "support.fake_chat"]
PROMPT = r"context \d+/\d+"


def chat(*arguments: str) -> list[str]:
    return ["-c", "import sys; from dsmoe_local.cli.main import chat; chat()", *arguments]


def test_turns_interruption_and_leaving() -> None:
    """Guards: Ctrl-C ending the chat, or losing what was said; the next turn not knowing it."""
    with Terminal(FAKE) as terminal:
        terminal.wait_for(PROMPT)
        terminal.send("hello" + ENTER)
        terminal.wait_for(r"> hello\s+hello\n")
        terminal.wait_for(PROMPT)
        terminal.send("abc#def" + ENTER)
        terminal.wait_for(r"abc\[halt\]")
        terminal.send(CTRL_C)
        terminal.wait_for(r"stopped: /continue")
        terminal.wait_for(PROMPT)
        terminal.send("/stats" + ENTER)
        terminal.wait_for(r"reply 3 tokens")
        terminal.wait_for(PROMPT)
        terminal.send("/continue" + ENTER)
        terminal.wait_for(PROMPT)
        terminal.send(CTRL_D)
        assert terminal.ending() == 0


def test_interruption_before_the_first_word() -> None:
    """Guards: Ctrl-C while a prompt is read leaving two questions in a row."""
    with Terminal(FAKE) as terminal:
        terminal.wait_for(PROMPT)
        terminal.send("#never" + ENTER)
        terminal.wait_for(r"\[halt\]")
        terminal.send(CTRL_C)
        terminal.wait_for(r"stopped")
        terminal.wait_for(PROMPT)
        terminal.send("/regen" + ENTER)
        terminal.wait_for("nothing to answer again")


def test_interruption_at_the_prompt_clears_the_line() -> None:
    """Guards: Ctrl-C at the prompt ending the chat, or keeping the line."""
    with Terminal(FAKE) as terminal:
        terminal.wait_for(PROMPT)
        terminal.send("half a li")
        terminal.wait_for("half a li")
        terminal.send(CTRL_C)
        terminal.wait_for("Ctrl-D or /exit leaves")
        terminal.wait_for(PROMPT)
        terminal.send("x" + ENTER)
        terminal.wait_for(r"> x\s+x\n")
        terminal.wait_for(PROMPT)
        terminal.send("/exit" + ENTER)
        assert terminal.ending() == 0


def test_lines_pastes_and_blocks() -> None:
    """Guards: pasted lines sent one by one; Alt-Enter sending; a block sent at its first line."""
    with Terminal(FAKE) as terminal:
        terminal.wait_for(PROMPT)
        terminal.paste("first\nlast pasted")
        terminal.send(ENTER)
        terminal.wait_for(r"last pasted\s+last pasted\n")
        terminal.wait_for(PROMPT)
        terminal.send("one" + ALT_ENTER + "last typed" + ENTER)
        terminal.wait_for(r"last typed\s+last typed\n")
        terminal.wait_for(PROMPT)
        terminal.send('"""' + ENTER + "a" + ENTER + 'last block"""' + ENTER)
        terminal.wait_for(r'last block"""\s+last block\n')
        terminal.wait_for(PROMPT)
        terminal.send("/usr/bin/env is a path" + ENTER)
        terminal.wait_for(r"path\s+/usr/bin/env is a path\n")
        terminal.wait_for(PROMPT)
        terminal.send("/halp" + ENTER)
        terminal.wait_for("did you mean /help")


def test_typing_during_a_reply_waits() -> None:
    """Guards: keys typed during a reply appearing in the middle of it, or being lost."""
    with Terminal(FAKE) as terminal:
        terminal.wait_for(PROMPT)
        terminal.send("ab#c" + ENTER)
        terminal.wait_for(r"ab\[halt\]")
        terminal.send("later" + ENTER)
        terminal.send(CTRL_C)
        said = terminal.wait_for(r"stopped")
        assert "later" not in said
        terminal.wait_for(r"> later\s+later\n")


def test_control_sequences_of_a_model_are_inert() -> None:
    """Guards: a model clearing the screen, changing the title, or writing with Rich markup."""
    with Terminal(FAKE) as terminal:
        terminal.wait_for(PROMPT)
        terminal.paste("[red]x[/red]\x9b2J\u202e")
        terminal.send(ENTER)
        terminal.wait_for(r"\n\[red\]x\[/red\]\N{REPLACEMENT CHARACTER}2J\N{REPLACEMENT CHARACTER}\n")
        assert "\x9b" not in terminal.raw.rsplit("\n[red]", 1)[-1]


def test_base_model_completes_and_goes_on() -> None:
    """Guards: a conversation's format put around the text for a base model."""
    with Terminal([*FAKE, "base"]) as terminal:
        terminal.wait_for("it completes your text")
        terminal.wait_for(PROMPT)
        terminal.send("once" + ENTER)
        terminal.wait_for(r"once\s+once\n")
        terminal.wait_for(PROMPT)
        terminal.send(ENTER)
        terminal.wait_for(r"onceonce\n")


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_no_colour_where_none_is_wanted(environment: dict[str, str]) -> None:
    """Guards: colour codes on a dumb terminal or against NO_COLOR."""
    with Terminal(FAKE, environment) as terminal:
        terminal.wait_for(r"> ")
        terminal.send("/set" + ENTER)
        terminal.wait_for(r"frequency_penalty")
        terminal.wait_for(r"\n> ")
        terminal.send("hi" + ENTER)
        terminal.wait_for(r"hi\s+hi\n")
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m|\x1b\[38", terminal.raw)
        if environment.get("TERM") == "dumb":
            assert "\x1b" not in terminal.raw


def test_history_is_private_and_comes_back() -> None:
    """Guards: a history that others can read, or that is not kept."""
    for keys in ("remember me" + ENTER, "\x1b[A" + ENTER):
        with Terminal(FAKE) as terminal:
            terminal.wait_for(PROMPT)
            terminal.send(keys)
            terminal.wait_for(r"remember me\s+remember me\n")
            terminal.wait_for(PROMPT)
            terminal.send(CTRL_D)
            assert terminal.ending() == 0
    mode = stat.S_IMODE((data_folder() / "history").stat().st_mode)
    assert mode == 0o600


def test_real_model_two_turns_and_interruption() -> None:
    """Guards: the whole of it together: load, template, cache, Ctrl-C through llama.cpp, exit status."""
    with Terminal(chat("-m", str(smollm2()), "--temp", "0", "-c", "2048", "-n", "12")) as terminal:
        terminal.wait_for(r"context 0/2048")
        terminal.send("My name is Bob. Say hello to me." + ENTER)
        terminal.wait_for(PROMPT)
        terminal.send("/set max_tokens none" + ENTER)
        terminal.wait_for(PROMPT)
        terminal.send("Write a very long story about a fox." + ENTER)
        terminal.wait_for(r"fox\.\s+\w+ \w+ \w+")
        terminal.send(CTRL_C)
        terminal.wait_for("stopped: /continue")
        terminal.wait_for(PROMPT)
        terminal.send("/stats" + ENTER)
        stats = terminal.wait_for(r"\((\d+) read in")
        read = re.findall(r"prompt (\d+) tokens \((\d+) read", stats)[-1]
        assert int(read[1]) < int(read[0]) / 2
        terminal.wait_for(PROMPT)
        terminal.send(CTRL_D)
        assert terminal.ending() == 0


def test_real_model_interrupted_in_a_long_prompt() -> None:
    """Guards: a long prompt that cannot be stopped."""
    with Terminal(chat("-m", str(smollm2()), "-c", "8192", "-ub", "128")) as terminal:
        terminal.wait_for(PROMPT)
        terminal.paste("the quick brown fox " * 1200)
        terminal.send(ENTER)
        terminal.wait_for(r"reading \d+ of \d+ tokens")
        terminal.send(CTRL_C)
        terminal.wait_for("stopped")
        terminal.wait_for(PROMPT)
        terminal.send(CTRL_D)
        assert terminal.ending() == 0


def test_endless_word_and_special_text_do_no_harm() -> None:
    """Guards: a typed word or token that kills the chat or ends the model's turn."""
    with Terminal(chat("-m", str(tiny_model()), "--chat-template", "deepseek-moe", "-n", "5")) as terminal:
        terminal.wait_for(PROMPT)
        terminal.paste("a" * 30_000)
        terminal.send(ENTER)
        terminal.wait_for(r"error: the prompt has \d+ tokens|too long")
        terminal.wait_for(PROMPT)
        terminal.send("<｜end▁of▁sentence｜>" + ENTER)
        terminal.wait_for(r"context [1-9]\d*/256")
        terminal.send(CTRL_D)
        assert terminal.ending() == 0


def test_terminal_is_as_it_was(tmp_path: Path) -> None:
    """Guards: a shell without echo after the chat."""
    code = (
        "import termios, sys, runpy\n"
        "before = termios.tcgetattr(0)\n"
        "sys.argv = ['chat']\n"
        "runpy.run_module('support.fake_chat', run_name='__main__')\n"
        "print('SAME' if termios.tcgetattr(0) == before else 'CHANGED')\n"
    )
    with Terminal(["-c", code]) as terminal:
        terminal.wait_for(PROMPT)
        terminal.send("hi#c" + ENTER)
        terminal.wait_for(r"hi\[halt\]")
        terminal.send(CTRL_C)
        terminal.wait_for("stopped")
        terminal.wait_for(PROMPT)
        terminal.send(CTRL_D)
        terminal.wait_for("SAME")
        assert terminal.ending() == 0
        assert os.environ.get("HOME")
