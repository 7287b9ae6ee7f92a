"""The prompt of a one-shot answer: from the command line, files and stdin. Loads and answers nothing.

`@file` means nothing here: a script's prompt may hold anybody's text.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from dsmoe_local.base.content import decode_text
from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.base.text import safe_line

MAX_BYTES = 16 << 20
_STDIN = "stdin"


def one_prompt(
    prompt: str | None, file: str | None, dash: bool = False, stdin: TextIO | None = None
) -> str | None:
    """The text to answer once: what is piped in, then the file's text, then `prompt` (-p), with an empty line
    between them. None for a conversation: nothing of them is there.

    `-` for `prompt` or `file`, or as an argument (`dash`), is what comes from `stdin` (None: the process's),
    in that place. A text's last newline is not part of it. UsageError for an empty prompt, FileError for one
    that cannot be read or is larger than 16 MiB, FormatError for one that is no UTF-8 text.
    """
    stream = sys.stdin if stdin is None else stdin
    n_dashes = (prompt == "-") + (file == "-") + dash
    if n_dashes > 1:
        raise UsageError("stdin is asked for twice", remedy="use one -")
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
    """The text of a JSON schema, which can be kept. Else UsageError, and what `one_prompt` raises."""
    from dsmoe_local.engine.grammar.compile import compile_json_schema
    from dsmoe_local.engine.large_stack import large_stack

    text = _read_file(file, what="the schema")
    # Before the model is loaded.
    try:
        with large_stack("dsmoe-schema") as thread:
            thread.submit(compile_json_schema, text).result()
    except UsageError as error:
        where = ", ".join(filter(None, (safe_line(file), error.where)))
        raise UsageError(error.what, where=where, remedy=error.remedy) from error
    return text


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
        # What Python makes of an argument's bytes that are no text.
        raise UsageError("the prompt is not UTF-8", where=f"-p, character {error.start}") from error
    if not prompt.strip():
        raise UsageError("the prompt is empty", remedy="use -p TEXT")
    return prompt


def _decoded(content: bytes, source: str, what: str) -> str:
    if len(content) > MAX_BYTES:
        raise FileError(f"{what} is larger than 16 MiB", where=source)
    # The shell's own newline at the end is not part of what was asked.
    return decode_text(content, what, source).removesuffix("\n")
