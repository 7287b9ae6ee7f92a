"""The chat on real models and real folders, in a pseudo-terminal: cache, interruption, history, leaving."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from support.hosted import PREFILL_HELD
from support.models import smollm2, tiny_model
from support.screens import ScreenTerminal
from support.terminal import CTRL_C, CTRL_D, ENTER, Terminal

from dsmoe_local.base.paths import data_folder
from dsmoe_local.chat.store.states import BLOCK

FAKE = ["-m", "support.fake_chat"]
EMPTY_INPUT = r"\n>\n[^\n]*context [\d,]+/[\d,]+[^\n]*$"


def chat(*arguments: str) -> list[str]:
    return ["-c", "import sys; from dsmoe_local.cli.main import chat; chat()", *arguments]


def test_history_is_private_and_comes_back() -> None:
    """Guards: a history that others can read, or that is not kept."""
    for keys in ("remember me" + ENTER, "\x1b[A" + ENTER):
        with ScreenTerminal(FAKE) as terminal:
            terminal.wait_screen(EMPTY_INPUT)
            terminal.send(keys)
            terminal.wait_screen(rf"> remember me\n\nremember me\n{EMPTY_INPUT}")
            terminal.send(CTRL_D)
            assert terminal.ending() == 0
    for name in ("history", "sessions/sessions.db"):
        assert stat.S_IMODE((data_folder() / name).stat().st_mode) == 0o600


def test_real_model_two_turns_and_interruption() -> None:
    """Guards: the whole of it together: load, template, cache, Ctrl-C through llama.cpp, exit status."""
    with ScreenTerminal(
        chat("-m", str(smollm2()), "--temp", "0", "-c", "2048", "-n", "12"), lines=60
    ) as terminal:
        terminal.wait_screen(r"context 0/2,048", 60)
        terminal.send("My name is Bob. Say hello to me." + ENTER)
        terminal.wait_screen(r"cut at max_tokens", 60)
        terminal.send("/set max_tokens none" + ENTER)
        terminal.wait_screen("max_tokens none")
        terminal.send("Write a very long story about a fox." + ENTER)
        terminal.wait_screen(r"fox\.\n\n\w+", 60)
        terminal.send(CTRL_C)
        terminal.wait_screen("stopped: /continue")
        terminal.send("/stats" + ENTER)
        stats = terminal.wait_screen(r"prompt \d+ tokens \(\d+ read")
        read = re.findall(r"prompt (\d+) tokens \((\d+) read", stats)[-1]
        assert int(read[1]) < int(read[0]) / 2
        terminal.send(CTRL_D)
        assert terminal.ending() == 0


def test_real_model_remembers_a_session_without_reading_it(tmp_path: Path) -> None:
    """Guards: a long conversation that is read again when it goes on; a cache of another setting used."""
    words = chat("-m", str(smollm2()), "--temp", "0", "-c", "4096", "-n", "4", "--stats")
    cached = r"prompt ([\d,]+) tokens \((\d+) read"

    def ask(*options: str, text: str) -> tuple[int, int]:
        with ScreenTerminal([*words, *options], lines=60) as terminal:
            terminal.wait_screen(EMPTY_INPUT, 60)
            terminal.paste(text)
            terminal.send(ENTER)
            found = re.findall(cached, terminal.wait_screen(rf"(?s){cached}.*{EMPTY_INPUT}", 120))[-1]
            terminal.send(CTRL_D)
            assert terminal.ending() == 0
        return int(found[0].replace(",", "")), int(found[1])

    n_prompt, n_read = ask(text="one two three four five six seven eight " * 18)
    assert n_read == n_prompt > 144
    # All but the last block of its tokens.
    assert ask("--continue", text="And nine?")[1] < 40 + BLOCK
    # Another type of cache: what is beside the session is of no use, and nobody is told.
    assert ask("--continue", "-ctk", "q8_0", text="And ten?")[1] > 144


def test_real_model_interrupted_in_a_long_prompt() -> None:
    """Guards: a long prompt that cannot be stopped, or is lost when it is."""
    words = ("-m", str(smollm2()), "--temp", "0", "-c", "8192", "-ub", "32", "-n", "2")
    option, code, *arguments = chat(*words)
    code = f"from dsmoe_local.engine.process import client; client.NATIVE = {PREFILL_HELD!r}; {code}"
    with ScreenTerminal([option, code, *arguments]) as terminal:
        terminal.wait_screen(r"context 0/8,192", 60)
        terminal.paste("the quick brown fox " * 120)
        terminal.send(ENTER)
        terminal.wait_screen(r"reading [\d,]+ of [\d,]+ tokens", 60)
        terminal.send(CTRL_C)
        terminal.wait_screen("stopped: /continue")
        terminal.send("/continue" + ENTER)
        terminal.wait_screen(r"cut at max_tokens", 200)
        terminal.send("/stats" + ENTER)
        stats = terminal.wait_screen(r"prompt [\d,]+ tokens \([\d,]+ read")
        n_prompt, n_read = re.findall(r"prompt ([\d,]+) tokens \(([\d,]+) read", stats)[-1]
        assert int(n_read.replace(",", "")) < int(n_prompt.replace(",", ""))
        terminal.send(CTRL_D)
        assert terminal.ending() == 0


def test_endless_word_and_special_text_do_no_harm() -> None:
    """Guards: a typed word or token that kills the chat or ends the model's turn."""
    model = str(tiny_model())
    with ScreenTerminal(
        chat("-m", model, "--chat-template", "deepseek-moe", "-n", "5"), lines=80
    ) as terminal:
        terminal.wait_screen("context 0/256", 60)
        terminal.paste("a" * 30_000)
        terminal.send(ENTER)
        terminal.wait_screen(r"error: the message was not sent", 60)
        terminal.send("<｜end▁of▁sentence｜>" + ENTER)
        terminal.wait_screen(r"context [1-9]\d*/256")
        terminal.send(CTRL_D)
        assert terminal.ending() == 0


def test_system_text_is_advised_against_where_the_authors_do() -> None:
    """Guards: DeepSeekMoE's own advice unheard; the advice given for models of another format."""
    model = str(tiny_model())
    for template, advised in (("deepseek-moe", True), ("chatml", False)):
        arguments = chat("-m", model, "--chat-template", template, "-sys", "Be brief.")
        with ScreenTerminal(arguments) as terminal:
            shown = terminal.wait_screen("context 0/256", 60)
            assert ("was trained without a system text" in shown) == advised


def test_terminal_is_as_it_was() -> None:
    """Guards: a shell without echo after the chat."""
    code = (
        "import termios, sys, runpy\n"
        "before = termios.tcgetattr(0)\n"
        "sys.argv = ['chat']\n"
        "runpy.run_module('support.fake_chat', run_name='__main__')\n"
        "print('SAME' if termios.tcgetattr(0) == before else 'CHANGED')\n"
    )
    with Terminal(["-c", code]) as terminal:
        terminal.wait_for("context 0")
        terminal.send("hi#c" + ENTER)
        terminal.wait_for(r"hi\n")
        terminal.send(CTRL_C)
        terminal.wait_for("stopped")
        terminal.send(CTRL_D)
        terminal.wait_for("SAME")
        assert terminal.ending() == 0
