"""The prompt of a single answer, from the command line, files and stdin.

`@file` is not expanded here: the prompt of a script may contain text from anywhere.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.base.text_files import decode_text

if TYPE_CHECKING:
    from dsmoe_local.engine.types import Tools

MAX_BYTES = 16 << 20
_STDIN = "stdin"


def one_prompt(
    prompt: str | None, file: str | None, dash: bool = False, stdin: TextIO | None = None
) -> str | None:
    """Return the text to answer: piped input, the file, and `prompt` (-p), with empty lines between them.

    None, for a chat, if none of them is given. `-` for `prompt` or `file` puts the piped input in that place;
    `dash` is True for `-` as an argument. `stdin` None is the standard input of the process. The last newline
    of each text is removed.

    UsageError for an empty prompt; FileError for one that cannot be read or has more than 16 MiB; FormatError
    for one that is not UTF-8.
    """
    stream = sys.stdin if stdin is None else stdin
    n_dashes = (prompt == "-") + (file == "-") + dash
    if n_dashes > 1:
        raise UsageError("stdin is given twice", remedy="give - once")
    if prompt is None and file is None and not n_dashes and stream.isatty():
        return None
    piped = _read_stdin(stream) if n_dashes or not stream.isatty() else ""
    texts = [
        "" if n_dashes and not dash else piped,
        "" if file is None else piped if file == "-" else _read_file(file),
        "" if prompt is None else piped if prompt == "-" else _argument(prompt),
    ]
    said = [text for text in texts if text.strip()]
    if not said:
        raise UsageError("the prompt is empty", remedy="use -p TEXT, or leave out the pipe to chat")
    return "\n\n".join([*(text.rstrip("\n") for text in said[:-1]), said[-1]])


def read_schema(file: str) -> str:
    """Return the text of a JSON schema. UsageError if it cannot be used; otherwise as `one_prompt`."""
    from dsmoe_local.engine.grammar.compile import compile_json_schema
    from dsmoe_local.engine.large_stack import large_stack

    text = _read_file(file, what="the schema")
    # Report errors before the model is loaded.
    try:
        with large_stack("dsmoe-schema") as thread:
            thread.submit(compile_json_schema, text).result()
    except UsageError as error:
        where = ", ".join(filter(None, (safe_line(file), error.where)))
        raise UsageError(error.what, where=where, remedy=error.remedy) from error
    return text


def read_tools(file: str) -> Tools | None:
    """Return the tools in a JSON file: a list as in OpenAI's requests. RequestError if it is not valid."""
    from dsmoe_local.protocol.errors import RequestError
    from dsmoe_local.protocol.tools import offered_tools

    text = _read_file(file, what="the list of tools")
    try:
        return offered_tools({"tools": json.loads(text)})
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the list of tools is not JSON: {error}", where=safe_line(file)) from error
    except RequestError as error:
        raise UsageError(error.what, where=safe_line(file), remedy=error.remedy) from error


def _read_stdin(stream: TextIO) -> str:
    try:
        return _decoded(stream.buffer.read(MAX_BYTES + 1), _STDIN, "the prompt")
    except OSError as error:
        raise FileError(f"the prompt cannot be read: {error.strerror}", where=_STDIN) from error


def _read_file(file: str, what: str = "the prompt") -> str:
    where = safe_line(file)
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FileError(f"{what} cannot be read: {reason}", where=where) from error
    text = _decoded(content, where, what)
    if not text.strip():
        raise UsageError(f"{what} is empty", where=where)
    return text


def _argument(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        # Python decodes bytes that are not UTF-8 to lone surrogates.
        raise UsageError("the prompt is not UTF-8", where=f"-p, character {error.start}") from error
    if not prompt.strip():
        raise UsageError("the prompt is empty", remedy="use -p TEXT")
    return prompt


def _decoded(content: bytes, source: str, what: str) -> str:
    if len(content) > MAX_BYTES:
        raise FileError(f"{what} is larger than 16 MiB", where=source)
    return decode_text(content, what, source).removesuffix("\n")
