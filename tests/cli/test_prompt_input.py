"""The prompt of `dsmoe-chat -p`: which text it is, and in which order."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, UsageError
from dsmoe_local.cli.prompt_input import MAX_BYTES, one_prompt, read_schema


class Keyboard(io.StringIO):
    """A terminal: reading from it would wait for the user."""

    def isatty(self) -> bool:
        return True


def piped(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "prompt.txt"
    path.write_text("of the file\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("prompt", "named", "dash", "given", "expected"),
    [
        ("Why?", False, False, None, "Why?"),
        (None, True, False, None, "of the file"),
        ("Why?", True, False, None, "of the file\n\nWhy?"),
        (None, False, False, "diff\n", "diff"),
        ("Why?", False, False, "diff\n", "diff\n\nWhy?"),
        ("Why?", True, False, "diff\n\n\n", "diff\n\nof the file\n\nWhy?"),
        ("-", False, False, "diff\n", "diff"),
        (None, False, True, "diff\n", "diff"),
        ("Why?", False, True, "diff\n", "diff\n\nWhy?"),
        ("-", True, False, "diff\n", "of the file\n\ndiff"),
        ("Why?", False, False, "", "Why?"),
        ("Why?", False, False, " \n", "Why?"),
        (" Why?\n", False, False, None, " Why?\n"),
        (None, False, False, "\ufeff 你好 \n\n", " 你好 \n"),
        (None, False, False, None, None),
    ],
)
def test_what_is_asked(
    prompt: str | None, named: bool, dash: bool, given: str | None, expected: str | None, file: str
) -> None:
    """Guards: a question before what it is about; stdin lost, read twice, or waited for at a terminal."""
    stdin = Keyboard() if given is None else piped(given.encode())
    assert one_prompt(prompt, file if named else None, dash, stdin) == expected


def test_a_file_called_dash_is_stdin() -> None:
    """Guards: `-f -` looking for a file of that name."""
    assert one_prompt("Why?", "-", False, piped(b"diff\n")) == "diff\n\nWhy?"


@pytest.mark.parametrize(
    ("prompt", "dash", "given", "error", "message"),
    [
        ("-", True, b"x", UsageError, "twice"),
        ("", False, None, UsageError, "empty"),
        (" \n", False, b"x", UsageError, "empty"),
        (None, False, b"", UsageError, "empty"),
        ("-", False, b" \n", UsageError, "empty"),
        ("caf\udce9", False, None, UsageError, "-p, character 3"),
        (None, False, b"caf\xe9", FormatError, "stdin, byte 3"),
        ("Why?", False, b"\xff", FormatError, "not UTF-8"),
        (None, False, b"x" * (MAX_BYTES + 1), FileError, "16 MiB"),
        (None, False, b"%PDF-1.7\n", FormatError, "a PDF, not UTF-8 text"),
        (None, False, b"PK\x03\x04abc", FormatError, "office"),
        (None, False, "x".encode("utf-16"), FormatError, "UTF-16"),
        (None, False, b"a\0b", FormatError, "NUL"),
    ],
)
def test_what_cannot_be_asked(
    prompt: str | None, dash: bool, given: bytes | None, error: type[DsmoeError], message: str
) -> None:
    """Guards: an empty prompt answered; tracebacks for bytes that are no text."""
    with pytest.raises(error, match=message) as caught:
        one_prompt(prompt, None, dash, Keyboard() if given is None else piped(given))
    assert len(str(caught.value).splitlines()) <= 3


def test_files_that_cannot_be_asked(tmp_path: Path) -> None:
    """Guards: the same for files."""
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, error in (
        ("empty", UsageError),
        ("latin", FormatError),
        ("missing", FileError),
        (".", FileError),
    ):
        for read in (lambda path: one_prompt("Why?", path, False, Keyboard()), read_schema):
            with pytest.raises(error) as caught:
                read(str(tmp_path / name))
            assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(FileError):
        read_schema("a\0b")


@pytest.mark.parametrize("text", ["{", "[]", '{"type": "colour"}', '{"uniqueItems": true, "type": "array"}'])
def test_schemas_that_cannot_be_kept(text: str, tmp_path: Path) -> None:
    """Guards: a model of 16B loaded, only to find that the schema is wrong."""
    path = tmp_path / "schema.json"
    path.write_text(text)
    with pytest.raises(UsageError):
        read_schema(str(path))


def test_a_schema(tmp_path: Path) -> None:
    """Guards: a byte order mark that makes good JSON bad."""
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    path = tmp_path / "schema.json"
    path.write_bytes(b"\xef\xbb\xbf" + schema.encode() + b"\n")
    assert read_schema(str(path)) == schema


def test_a_schema_of_thousands_of_references(tmp_path: Path) -> None:
    """Guards: references that follow each other so far that reading them overflows the stack."""
    steps: dict[str, object] = {f"a{number}": {"$ref": f"#/$defs/a{number + 1}"} for number in range(10_000)}
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"$ref": "#/$defs/a0", "$defs": {**steps, "a10000": {"type": "string"}}}))
    program = f"from dsmoe_local.cli.prompt_input import read_schema; read_schema({str(schema)!r})"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
