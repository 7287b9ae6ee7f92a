"""Files in messages: found where they are meant, refused where they are no text, framed so that they end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support.fake_engine import FakeEngine
from support.recording_chat import RecordingChat

from dsmoe_local.base.errors import DsmoeError, FileError, UsageError
from dsmoe_local.chat.attachments import (
    MAX_BYTES,
    Expanded,
    describe,
    escaped,
    expand,
    read_attachment,
    split_name,
)
from dsmoe_local.chat.commands.files import COMMANDS
from dsmoe_local.chat.turns import Role


@pytest.fixture(autouse=True)
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.py", "my notes.txt", "文件.txt", "LICENSE", "sub/b.py", "c.d.e", "x(1).txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("message", "names", "rest"),
    [
        ("@a.py", ["a.py"], "a.py"),
        ("explain @a.py", ["a.py"], "explain a.py"),
        ("what is in @a.py?", ["a.py"], "what is in a.py?"),
        ("look at @a.py.", ["a.py"], "look at a.py."),
        ("look at @a.py...", ["a.py"], "look at a.py..."),
        ("(see @a.py), please", ["a.py"], "(see a.py), please"),
        ("compare @a.py, @sub/b.py: which?", ["a.py", "sub/b.py"], "compare a.py, sub/b.py: which?"),
        ("@a.py and @a.py again", ["a.py"], "a.py and a.py again"),
        ("@./a.py", ["./a.py"], "./a.py"),
        ('read @"my notes.txt", then answer', ["my notes.txt"], "read my notes.txt, then answer"),
        ("@LICENSE's first word", ["LICENSE"], "LICENSE's first word"),
        ("@c.d.e.", ["c.d.e"], "c.d.e."),
        ("@x(1).txt?", ["x(1).txt"], "x(1).txt?"),
        ("请总结@文件.txt。谢谢", ["文件.txt"], "请总结文件.txt。谢谢"),
        ("“@文件.txt”是什么", ["文件.txt"], "“文件.txt”是什么"),
        ("`@a.py` or <@sub/b.py>", ["a.py", "sub/b.py"], "`a.py` or <sub/b.py>"),
        ("@a.py#L3", ["a.py"], "a.py#L3"),
        ("line\n@a.py\nline", ["a.py"], "line\na.py\nline"),
    ],
)
def test_mentions(message: str, names: list[str], rest: str, folder: Path) -> None:
    """Guards: the end of a sentence taken for a part of the name, or a name cut where it has dots."""
    expanded = expand(message)
    assert [file.name for file in expanded.files] == names
    frames = [f"{name}:\n```{'' if '.' not in name else name.rsplit('.')[-1]}\ntext of " for name in names]
    position = -1
    for frame in frames:
        position = expanded.text.index(frame, position + 1)
    assert expanded.text.endswith(f"```\n\n{rest}")
    assert expanded.text.count("text of") == len(names)


@pytest.mark.parametrize(
    "message",
    [
        "",
        "write to bob@a.py or bob.smith+x@LICENSE",
        "@nobody says @property",
        'NSString *s = @"hello world";',
        "@sub is a folder",
        "@",
        "@@a.py",
        '@""',
        "a @ b",
        "@a.pyx and @a.pyc",
        "@a",
        "@" + "x" * 5000,
        "@" + ",." * 5000,
        "@/dev/null",
        "@a\0b",
    ],
)
def test_what_is_no_file_stays_text(message: str, folder: Path) -> None:
    """Guards: e-mail addresses, decorators and Objective-C strings taken for files, or for mistakes."""
    expanded = expand(message)
    assert expanded.text == message
    assert expanded.files == ()


def test_home_and_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: `~` taken literally; names that are relative to something else."""
    monkeypatch.setenv("HOME", str(folder))
    assert expand("@~/a.py").files[0].text == "text of a.py\n"
    assert expand("@a.py").files[0].text == "text of a.py\n"
    assert expand("@~nobody-of-that-name/x").files == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", "not UTF-8"),
        (b"a\0b", "NUL"),
        (b"GGUF\0\0", "a GGUF model"),
        (b"%PDF-1.7\n", "a PDF, not UTF-8 text"),
        (b"x" * (MAX_BYTES + 1), "larger than 1 MiB"),
    ],
)
def test_only_texts_are_read(content: bytes, message: str, tmp_path: Path) -> None:
    """Guards: a model file in a prompt; a prompt that takes minutes to read."""
    (tmp_path / "file").write_bytes(content)
    for attempt in (lambda: expand("see @file"), lambda: read_attachment("file")):
        with pytest.raises(DsmoeError, match=message) as caught:
            attempt()
        assert len(str(caught.value).splitlines()) <= 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Guards: a pipe that is waited for; tracebacks of the file system."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", ".", "a\0b", "x" * 300):
        with pytest.raises(FileError):
            read_attachment(name)
    assert expand("@pipe").files == ()


def test_files_of_windows(tmp_path: Path) -> None:
    """Guards: carriage returns and byte order marks in the prompt; a cap that counts them wrongly."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_attachment("a.txt").text == "one\ntwo\n"
    (tmp_path / "b.txt").write_bytes(b"x" * MAX_BYTES)
    assert describe(read_attachment("b.txt")) == "read b.txt: 1,048,576 characters"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("`~\n a>#")))
def test_a_file_stays_within_its_frame(tmp_path: Path, content: str) -> None:
    """Guards: a file with fences whose end reads like the user's words."""
    (tmp_path / "a.md").write_text(content)
    blocks = MarkdownIt("commonmark").parse(expand("what is @a.md").text)
    assert [block.type for block in blocks if block.level == 0 and block.nesting >= 0] == [
        "paragraph_open",
        "fence",
        "paragraph_open",
    ]
    assert blocks[-2].content == "what is a.md"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a.py", ("a.py", "")),
        ("a.py what is it?", ("a.py", "what is it?")),
        ("a.py\nwhat is it?", ("a.py", "what is it?")),
        ("my notes.txt", ("my notes.txt", "")),
        ("my notes.txt what?", ("my notes.txt", "what?")),
        ('"my notes.txt" what?', ("my notes.txt", "what?")),
        ("missing file", ("missing", "file")),
    ],
)
def test_names_before_questions(argument: str, expected: tuple[str, str], folder: Path) -> None:
    """Guards: names with spaces, which completion inserts as they are."""
    assert split_name(argument) == expected


def last_message(chat: RecordingChat) -> str:
    turn = chat.conversation.last(Role.USER)
    assert turn is not None
    return turn.content


def test_read_command(folder: Path) -> None:
    """Guards: a file sent without its question, or without a word on what was read."""
    chat = RecordingChat()
    read = COMMANDS["read"].run
    read(chat.as_chat, "a.py how does it differ from @sub/b.py?")
    assert chat.screen.notices == ["read a.py: 13 characters", "read sub/b.py: 17 characters"]
    sent = last_message(chat)
    assert sent.startswith("a.py:\n```py\ntext of a.py\n```")
    assert sent.endswith("how does it differ from sub/b.py?")
    read(chat.as_chat, "LICENSE")
    assert last_message(chat) == "LICENSE:\n```\ntext of LICENSE\n```"
    with pytest.raises(UsageError, match="missing"):
        read(chat.as_chat, "")


def test_a_base_model_reads_the_text_itself(folder: Path) -> None:
    """Guards: a frame around the text that a base model is to go on with."""
    chat = RecordingChat(engine=FakeEngine(template=False))
    COMMANDS["read"].run(chat.as_chat, "a.py")
    assert last_message(chat) == "text of a.py\n"
    COMMANDS["read"].run(chat.as_chat, "a.py And then")
    assert last_message(chat) == "text of a.py\n\nAnd then"


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("see @nofile.txt", ("nofile.txt",)),
        ('see @"no such file"', ("no such file",)),
        ("see @docs/nothing", ("docs/nothing",)),
        ("mail me@example.com, @ann", ()),
        ("see @nofile.txt, please", ("nofile.txt",)),
        (
            "see @./nothing, @../nothing, @~/nothing or @/nothing",
            ("./nothing", "../nothing", "~/nothing", "/nothing"),
        ),
        ("see @~nobody-of-that-name/x", ("~nobody-of-that-name/x",)),
        ("a decorator: @property", ()),
        ("@app.route('/x')\n@router.get(\"/y\")\n@pytest.mark.parametrize\n@mock.patch", ()),
        ("npm i -D @types/node @vue/cli-service @angular/core@17", ()),
        ("@" + "x/" * 500, ()),
        ("@a\0b/c", ()),
        ("@a\ud800b/c", ()),
    ],
)
def test_what_was_meant_as_a_file_is_told(text: str, missing: tuple[str, ...], tmp_path: Path) -> None:
    """Guards: a typo in a file's name that the model answers as if it had read it; mail, decorators and npm's
    packages called files.
    """
    (tmp_path / "docs").mkdir()
    assert expand(text) == Expanded(text, missing=missing)


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        (r"what does \@a.py mean?", "what does @a.py mean?"),
        (r"\\@a.py", r"\@a.py"),
        (r"\@nofile.txt", "@nofile.txt"),
        (r'\@"my notes.txt"', '@"my notes.txt"'),
        (r"LaTeX: \@ifnextchar", r"LaTeX: \@ifnextchar"),
        ("```py\n@a.py\n```", None),
        ("~~~\n@a.py\n```\n@a.py\n~~~~", None),
        ("not closed:\n````\n```\n@a.py @nofile.txt", None),
    ],
)
def test_an_at_sign_that_names_no_file(text: str, sent: str | None, folder: Path) -> None:
    """Guards: no way to write @ before a file's name; files attached for what stands in code."""
    assert expand(text) == Expanded(text if sent is None else sent)


def test_a_paste_into_code_that_is_being_typed(folder: Path) -> None:
    """Guards: a backslash in code, where nothing takes it away; one in a mention of which the @ was typed."""
    assert escaped("@a.py\n```", before="```py\n") == "@a.py\n```"
    assert escaped("a.py @a.py", before="see @") == "a.py \\@a.py"


def test_mentions_around_code(folder: Path) -> None:
    """Guards: code that takes what follows it along; three backticks amid a line taken for a fence."""
    assert [file.name for file in expand("```\n@LICENSE\n```\nsee @a.py").files] == ["a.py"]
    assert [file.name for file in expand("```x``` or\n@a.py").files] == ["a.py"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["@", "a.py", "\\", "```\n", "~~~", "\n", " ", '"', "my notes.txt", "x/", "."]))
)
def test_escaped_text_is_sent_as_it_was(folder: Path, pieces: list[str]) -> None:
    """Guards: pasted text that attaches files, is reported as one, or comes with marks of ours."""
    text = "".join(pieces)
    assert expand(escaped(text)) == Expanded(text)
