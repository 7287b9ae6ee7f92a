"""/export and /copy: nothing is replaced unasked, nothing goes where it was not meant to go."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.recording_chat import RecordingChat

from dsmoe_local.base.errors import DsmoeError, FileError, UsageError
from dsmoe_local.chat.commands.files import COMMANDS


def chat_with(*replies: str, answers: tuple[bool, ...] = ()) -> RecordingChat:
    chat = RecordingChat(*answers, engine=FakeEngine(replies=replies or ["yes"]))
    for number in range(len(replies)):
        chat.say(f"question {number}")
    return chat


def export(chat: RecordingChat, argument: str) -> None:
    COMMANDS["export"].run(chat.as_chat, argument)


def copy(chat: RecordingChat, argument: str = "") -> str:
    COMMANDS["copy"].run(chat.as_chat, argument)
    return chat.screen.copied[-1]


def test_a_file_for_its_owner_is_written(tmp_path: Path) -> None:
    """Guards: a conversation that everybody on the machine can read; no word on where it went."""
    chat = chat_with("fine")
    for name in ("a.md", "a b.html", "a.json"):
        path = tmp_path / name
        export(chat, f'"{path}"' if " " in name else str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "fine" in path.read_text(encoding="utf-8")
        assert str(path) in chat.screen.notices[-1]
        assert "2 messages" in chat.screen.notices[-1]
    assert json.loads((tmp_path / "a.json").read_text())["model"] == "fake"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.html", "a.json", "a.md"]


def test_what_is_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    """Guards: notes of the user overwritten by a wrong name."""
    path = tmp_path / "notes.md"
    path.write_text("mine")
    chat = chat_with("fine", answers=(False, True))
    export(chat, str(path))
    assert path.read_text() == "mine"
    assert "notes.md" in chat.screen.questions[0]
    assert chat.screen.notices == ["nothing was written"]
    export(chat, str(path))
    assert "fine" in path.read_text()


def test_home_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a folder called ~; a link replaced by a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    chat = chat_with("fine", answers=(True,))
    export(chat, "~/chat.md")
    (tmp_path / "link.md").symlink_to(tmp_path / "chat.md")
    (tmp_path / "chat.md").write_text("old")
    export(chat, str(tmp_path / "link.md"))
    assert (tmp_path / "link.md").is_symlink()
    assert "fine" in (tmp_path / "chat.md").read_text()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    """Guards: tracebacks of the file system; a folder replaced; a file left behind by a failure."""
    chat = chat_with("fine", answers=(True, True))
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "circle.md").symlink_to(tmp_path / "circle.md")
    for name in ("no/such/folder.md", "folder.md", "circle.md", "x" * 300 + ".md", "a\0b.md"):
        with pytest.raises(FileError):
            export(chat, str(tmp_path / name))
    assert {path.name for path in tmp_path.iterdir()} == {"folder.md", "circle.md"}
    for argument in ("", "notes.txt", str(tmp_path / "model.gguf")):
        with pytest.raises(UsageError):
            export(chat, argument)
    with pytest.raises(UsageError, match="nothing to export"):
        export(chat_with(), str(tmp_path / "a.md"))


@pytest.mark.parametrize("name", ["experts.svg", "Experts.JSON", "picture.SVG"])
def test_pictures_are_the_experts(name: str, tmp_path: Path) -> None:
    """Guards: the conversation in a file that is to show the experts; a file replaced unasked."""
    chat = chat_with(answers=(False,))
    path = tmp_path / name
    export(chat, str(path))
    assert chat.experts.exported == [path]
    path.write_text("mine")
    export(chat, str(path))
    assert chat.experts.exported == [path]


@pytest.mark.parametrize("name", ["experts-talk.json", "experts of May.JSON", "my experts.json"])
def test_conversation_about_experts(name: str, tmp_path: Path) -> None:
    """Guards: a conversation that can never be exported since its file's name begins with `experts`."""
    chat = chat_with("fine")
    export(chat, str(tmp_path / name))
    assert chat.experts.exported == []
    assert json.loads((tmp_path / name).read_text())["messages"][-1]["content"] == "fine"


def test_copies() -> None:
    """Guards: the wrong reply or block; a list's indentation in copied code; a newline that a shell obeys."""
    chat = chat_with(
        "Here:\n\n```py\nold\n```\n\n- so:\n  ```sh\n  if x\n    ls | wc\n  ```\n\n    > ```\n\n ", "no code"
    )
    assert copy(chat) == "no code"
    assert copy(chat, "code") == "if x\n  ls | wc"
    assert copy(chat, "all").count("\n## ") == 4
    assert chat.screen.notices[0] == "copied 7 characters: tests"


def test_nothing_to_copy() -> None:
    """Guards: an empty clipboard instead of a word."""
    for argument in ("", "code", "all"):
        with pytest.raises(UsageError, match=r"nothing|no reply|no code"):
            copy(chat_with(), argument)
    with pytest.raises(UsageError, match="no code"):
        copy(chat_with("only words"), "code")
    with pytest.raises(DsmoeError, match="use /copy, /copy code"):
        copy(chat_with("x"), "everything")


def test_completion() -> None:
    """Guards: words that are offered but not taken."""
    chat = chat_with("```\nx\n```")
    for word in COMMANDS["copy"].complete(chat.as_chat, ""):
        assert copy(chat, word)
    assert COMMANDS["export"].files
    assert COMMANDS["read"].files
    (picture,) = COMMANDS["export"].complete(chat.as_chat, "")
    export(chat, picture)
    assert chat.experts.exported
