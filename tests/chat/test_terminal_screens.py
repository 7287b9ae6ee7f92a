"""The screens of the full terminal; support/screens.py explains how to write the golden ones again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.screens import StartChat
from support.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER
from support.tmux import Tmux, needs_tmux

CHAT = ["-m", "support.terminal_chat"]


# Width, height, and a pattern of the status bar that the size before does not have: it shows that the chat
# has been drawn for this size. A frame for one size in a window of another one is drawn wrong for good.
SIZES = (
    (60, 24, "▕"),
    (41, 24, "context"),
    (77, 24, "notes on go.*/2,048$"),
    (40, 20, "context"),
    (90, 14, ".*tokens/s$"),
    (33, 24, r"\d"),
    (90, 24, ".*tokens/s$"),
)


def wait_until_halted(folder: Path) -> None:
    """Wait until a reply has halted. Its last words may not be drawn yet."""
    while not (folder / "halted").exists():
        pass


def test_first_prompt(chat: StartChat) -> None:
    """Guards: a prompt in the wrong place, a status bar without its parts."""
    chat().check("first_prompt")


def test_markdown_with_code_and_chinese(chat: StartChat) -> None:
    """Guards: Markdown shown as its source, a table out of line behind wide characters, lost blank lines."""
    terminal = chat(lines=36)
    terminal.send("/reply markdown" + ENTER)
    terminal.check("markdown")


def test_markdown_amid_a_reply(chat: StartChat) -> None:
    """Guards: an open block that is not shown before it is final, or twice once it is."""
    terminal = chat(lines=36)
    terminal.send("/reply table" + ENTER)
    terminal.check("markdown_open")
    terminal.send(CTRL_C)
    terminal.check("markdown_stopped")


def test_reply_longer_than_the_screen(chat: StartChat) -> None:
    """Guards: lines drawn again in the scrollback, or lost on their way there."""
    terminal = chat(lines=16)
    terminal.send("/reply long" + ENTER)
    terminal.wait_screen(r"60\. a line of the long reply\n\n>\n[^\n]*context[^\n]*$")
    numbers = re.findall(r"(?m)^(\d+)\. a line of the long reply$", terminal.whole_text())
    assert numbers == [str(number) for number in range(1, 61)]
    assert terminal.whole_text().count("context") == 2  # in the greeting and in the bar


def test_block_longer_than_the_screen(chat: StartChat) -> None:
    """Guards: an open block whose beginning scrolls out and cannot be erased any more."""
    terminal = chat(columns=40, lines=10)
    terminal.send("/reply wide" + ENTER)
    terminal.wait_screen("context 40/2,048")
    assert "十" not in terminal.whole_text().removesuffix(terminal.screen_text())
    terminal.send(CTRL_C)
    terminal.wait_screen("stopped")
    assert terminal.whole_text().count("十") == 12


def test_resize_amid_a_reply(chat: StartChat) -> None:
    """Guards: remains of the last frame on a terminal that cuts lines off."""
    terminal = chat(columns=90)
    terminal.send("/reply halt" + ENTER)
    terminal.wait_screen("so it wraps")
    terminal.send("typed meanwhile")
    terminal.wait_screen("typed meanwhile")
    for columns, lines in ((50, 24), (70, 24), (40, 26), (50, 26)):
        terminal.resize(columns, lines)
        terminal.until(lambda text, columns=columns: max(map(len, text.split("\n"))) <= columns)  # type: ignore[misc]
    terminal.check("resized", whole=True)
    terminal.send(CTRL_C)
    terminal.check("resized_stopped", whole=True)


def test_a_window_that_is_back_at_its_size(chat: StartChat) -> None:
    """Guards: lines that a smaller window has cut off, not drawn again because the old size is back."""
    terminal = chat()
    terminal.send("typed")
    terminal.wait_screen("> typed\n")
    terminal.resize(12, 2)
    terminal.resize(80, 24)
    terminal.wait_screen(r"> typed\nSmolLM2 135M .* context 0/2,048$")


@needs_tmux
@pytest.mark.parametrize("reply", ["halt", "table", "wide"])
def test_resize_where_lines_are_wrapped_anew(reply: str, tmp_path: Path) -> None:
    """Guards: copies of the input or of the open block that a new width leaves in the scrollback."""
    with Tmux(CHAT, tmp_path, columns=90) as tmux:
        tmux.wait_for("context 0/2,048")
        tmux.send("/reply long", "Enter", f"/reply {reply}", "Enter")
        wait_until_halted(tmp_path)
        # Drawn after the reply has halted: from now on nothing changes by itself.
        tmux.send("typed meanwhile")
        tmux.wait_for("typed meanwhile")
        for columns, lines, bar in SIZES:
            tmux.resize(columns, lines)
            tmux.wait_for(rf"(?m)typed meanwhile\nSmolLM2 135M  ·  {bar}")
        tmux.send("C-c")
        tmux.wait_for(r"stopped.*\n\n*> typed meanwhile\nSmolLM2")
        whole = tmux.whole()
    assert whole.count("typed meanwhile") == 1
    assert whole.count("SmolLM2 135M") == 2  # in the greeting and in the bar
    assert len(re.findall(r"(?m)^\d+\. a line of the long reply$", whole)) == 60
    once = {"halt": "A second one", "table": "16.4B", "wide": "一二三四五六七八九十" * 12}
    assert whole.replace("\n", "").count(once[reply]) == 1


@pytest.mark.parametrize("columns", [60, 41])
def test_a_narrower_window_of_an_unknown_terminal(chat: StartChat, columns: int) -> None:
    """Guards: lines of the conversation erased over ssh, where nothing shows that the terminal is xterm."""
    terminal = chat(columns=90, XTERM_VERSION="")
    terminal.send("/reply long" + ENTER + "/reply halt" + ENTER)
    terminal.wait_screen("so it wraps")
    terminal.send("a draft that is longer than a narrow window is wide, so that it takes two rows of it")
    terminal.wait_screen("of it")
    terminal.resize(columns, 24)
    terminal.until(lambda text: max(map(len, text.split("\n"))) <= columns and "rows" in text)
    terminal.send(CTRL_C)
    terminal.wait_screen("stopped")
    numbers = re.findall(r"(?m)^(\d+)\. a line of the long reply$", terminal.whole_text())
    assert numbers == [str(number) for number in range(1, 61)]
    assert terminal.whole_text().count("> /reply halt") == 1


@needs_tmux
def test_a_narrower_window_of_an_unknown_terminal_that_wraps_lines(tmp_path: Path) -> None:
    """Guards: lines of the conversation erased where an unknown terminal does wrap them anew."""
    code = "import os; del os.environ['TMUX']; os.environ['TERM'] = 'xterm-256color'\n"
    start = "from support import terminal_chat; terminal_chat.main()"
    with Tmux(["-c", code + start], tmp_path, columns=90) as tmux:
        tmux.wait_for("context 0/2,048")
        tmux.send("/reply long", "Enter", "/reply halt", "Enter")
        wait_until_halted(tmp_path)
        tmux.send("x")
        tmux.wait_for("> x\nSmolLM2")
        tmux.send("BSpace")
        tmux.wait_for(">\nSmolLM2")
        for columns, lines, bar in SIZES:
            tmux.resize(columns, lines)
            tmux.wait_for(rf"(?m)>\nSmolLM2 135M  ·  {bar}")
        tmux.send("C-c")
        tmux.wait_for(r"stopped.*\n\n*>\nSmolLM2")
        whole = tmux.whole()
    assert len(re.findall(r"(?m)^\d+\. a line of the long reply$", whole)) == 60
    assert whole.count("> /reply halt") == 1


@needs_tmux
def test_joined_emoji_at_the_right_edge(tmp_path: Path) -> None:
    """Guards: remains of the input and the bar beside emoji that tmux makes wider than other terminals do."""
    family = "\N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}\u200d\N{BOY}"
    code = (
        "from support import terminal_chat\n"
        f"line = 'x' * 74 + {family!a} * 2\n"
        "terminal_chat.REPLIES['emoji'] = f'{line} {line}\\n\\n```\\n{line}\\n{line}\\n{line}\\n```\\n'\n"
        "terminal_chat.main()\n"
    )
    with Tmux(["-c", code], tmp_path) as tmux:
        tmux.wait_for("context 0/2,048")
        tmux.send("/reply emoji 0.001", "Enter", f"draft {family} with two of them {family}")
        tmux.wait_for("x{74}[^x]+x{74}[^x]+x{74}[^x]+x{74}(?s:.*)\n> draft .*them")
        tmux.send("|")
        drawn = tmux.wait_for(r"\|\nSmolLM2 135M  ·  notes on go")
    for line in drawn.split("\n"):
        assert re.fullmatch(r"x* *[^ -~]*|> (/reply|draft).*|\[?SmolLM2.*", line), line


def test_paste_of_300_lines(chat: StartChat) -> None:
    """Guards: a paste that sends itself, an input that fills the screen, a cursor that cannot be seen."""
    terminal = chat()
    terminal.paste("\n".join(f"line {number}" for number in range(1, 301)))
    terminal.check("paste")
    terminal.send(ENTER)
    terminal.wait_screen(r"line 300\n\n>\n")
    assert re.findall(r"(?m)^[> ] line (\d+)$", terminal.whole_text()) == [str(n) for n in range(1, 301)]


def test_forty_columns(chat: StartChat) -> None:
    """Guards: lines that are cut off in a narrow window, a bar without the context."""
    terminal = chat(columns=40, lines=36)
    terminal.send("/reply markdown" + ENTER)
    terminal.wait_screen("is not")
    terminal.send("an input that is longer than forty columns are wide")
    terminal.check("forty_columns")


def test_no_colour(chat: StartChat) -> None:
    """Guards: colours against NO_COLOR."""
    terminal = chat(lines=36, NO_COLOR="1")
    terminal.send("/reply markdown" + ENTER)
    terminal.check("markdown")
    terminal.send("/error" + ENTER)
    terminal.wait_screen("do that")
    assert not re.search(r"\x1b\[[0-9;]*(?:[34][0-8]|9[0-7]|10[0-7])[;m]", terminal.raw)


def test_colour(chat: StartChat) -> None:
    """Guards: the test above passing because there are no colours at all."""
    terminal = chat(lines=36)
    terminal.send("/reply markdown" + ENTER)
    terminal.check("markdown")
    assert re.search(r"\x1b\[[0-9;]*3[0-7][;m]", terminal.raw)


def test_keys_appear_while_a_reply_hangs(chat: StartChat) -> None:
    """Guards: keys that are not shown before the reply ends."""
    terminal = chat()
    terminal.send("/reply halt" + ENTER)
    terminal.wait_screen("so it wraps")
    for count in range(1, 6):
        terminal.send("k")
        terminal.wait_screen(rf"(?m)^> {'k' * count}$")
    assert "stopped" not in terminal.screen_text()


def test_messages_wait_in_line(chat: StartChat) -> None:
    """Guards: queued messages that are not shown, cannot be taken back, or are sent after Ctrl-C."""
    terminal = chat()
    terminal.send("/reply halt" + ENTER)
    terminal.wait_screen("so it wraps")
    terminal.send("first" + ENTER + "second" + ENTER + "third" + ENTER)
    terminal.check("queue")
    terminal.send("\x1b[A")
    terminal.wait_screen("(?m)^> third$")
    terminal.send(CTRL_C)
    terminal.check("queue_back")


def test_interruption_at_the_prompt(chat: StartChat) -> None:
    """Guards: Ctrl-C at the prompt ending the chat, or keeping the line."""
    terminal = chat()
    terminal.send("half a li")
    terminal.wait_screen("half a li")
    terminal.send(CTRL_C)
    terminal.check("interrupted_prompt")
    terminal.send("next" + ENTER)
    terminal.wait_screen(r"> next\n\nnext\n\n>\n")
    assert "leaves" not in terminal.screen_text()


def test_interruption_while_the_prompt_is_read(chat: StartChat) -> None:
    """Guards: reading of a prompt without progress, or that cannot be stopped."""
    terminal = chat()
    terminal.send("/prompt" + ENTER)
    terminal.check("reading")
    terminal.send(CTRL_C)
    terminal.wait_screen(r"> /prompt\n\n\[stopped\]\n\n>\n")


def test_tabs_and_last_lines(chat: StartChat) -> None:
    """Guards: tabs shown as ^I; a newline at the end of a paste counted as a line."""
    terminal = chat()
    terminal.paste("a\tb\n" + "\tc\n" * 29)
    terminal.wait_screen(r"\n30 lines\n(?s:.*)\n      c\n")
    assert "^I" not in terminal.screen_text()
    terminal.send("d")
    terminal.wait_screen(r"\n31 lines\n")


def test_pasted_code_names_no_files(chat: StartChat, tmp_path: Path) -> None:
    """Guards: files that pasted code attaches, a backslash in the input that is not explained."""
    (tmp_path / "a.txt").touch()
    terminal = chat()
    terminal.send("see @a.txt, not ")
    terminal.paste("@a.txt @nofile.txt @app.route('/x')")
    terminal.wait_screen(r"(?m)^> see @a\.txt, not \\@a\.txt \\@nofile\.txt @app\.route\('/x'\)$")
    assert "delete the \\ before @" in terminal.screen_text()
    terminal.send(CTRL_C + "/read ")
    terminal.paste("a.txt what is @a.txt?")
    terminal.wait_screen(r"(?m)^> /read a\.txt what is @a\.txt\?$")


def test_lines(chat: StartChat) -> None:
    """Guards: Alt-Enter, Ctrl-J or Shift-Enter sending; the code of Shift-Enter in the message."""
    terminal = chat()
    terminal.send("one" + ALT_ENTER + "two\nthree\x1b[13;2ufour\x1b[27;2;13~five" + ENTER)
    terminal.wait_screen(r"> one\n  two\n  three\n  four\n  five\n")


def test_completion(chat: StartChat) -> None:
    """Guards: commands, arguments or files that are not offered; a menu that hides the input."""
    terminal = chat()
    (Path(f"/proc/{terminal.pid}/cwd").resolve() / "a file.txt").touch()
    terminal.send("/")
    terminal.check("commands")
    terminal.send("de\t")
    terminal.wait_screen(r"(?m)^> /delete$")
    terminal.send(CTRL_C + "/reply ha\t")
    terminal.wait_screen(r"> /reply hal\n  half\n  halt\n")
    terminal.send("\t\t")
    terminal.wait_screen("> /reply halt\n")
    terminal.send(CTRL_C + "see @a\t")
    terminal.wait_screen('> see @"a file.txt"')


def test_questions(chat: StartChat) -> None:
    """Guards: a question answered by what was typed for something else, or an answer taken for a message."""
    terminal = chat()
    for keys, answer in ((f"y{ENTER}", "gone"), (ENTER, "kept"), (CTRL_C, "kept"), (CTRL_D, "kept")):
        terminal.send("/delete x" + ENTER)
        terminal.wait_screen(r"delete x\? \[y/N\]")
        terminal.send(keys)
        terminal.wait_screen(rf"{answer}\n\n>\n")
        terminal.send("\x0c")
        terminal.wait_gone(answer)


def test_panel_and_notes(chat: StartChat) -> None:
    """Guards: a panel that stays, a note in the middle of a paragraph."""
    terminal = chat()
    terminal.send("/panel" + ENTER)
    terminal.check("panel")
    terminal.send(CTRL_C)
    terminal.wait_gone("layer")
    terminal.send("/note" + ENTER)
    terminal.wait_screen(
        r"> /note\n\nthe oldest turn has left the context\n\na reply\n\nthat goes on\nanother one has\n\n>\n"
    )


def test_control_sequences_are_inert(chat: StartChat) -> None:
    """Guards: a model or a paste that clears the screen, sets the title or turns the line around."""
    terminal = chat()
    terminal.paste("\x9b2J\u202e[red]x[/red]\x1b]0;title\x07")
    terminal.wait_screen("x")
    terminal.send(ENTER)
    terminal.wait_screen(r"(?s)title.*title.*\n>\n")
    assert not re.search("\x9b|\u202e|\x1b\\]", terminal.raw)
    assert "[red]x[/red]" in terminal.screen_text()
