"""The ids that a tokenizer.json gives to a text, from the `tokenizers` library in a child process.

The library panics, or aborts the process, on several malformed files, and some definitions make it allocate
or compute without end: a child that can do little (`restricted`) is what that takes down. Run as a module,
this file is that child.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dsmoe_convert import restricted
from dsmoe_convert.errors import TokenizerError
from dsmoe_local.base.text import safe_line

_SECONDS = 30  # a vocabulary of 100,000 tokens takes about one
_MEMORY = 4 << 30


def encode(path: Path, text: str) -> list[int]:
    """The ids of `text` without special tokens, padding and truncation. TokenizerError if it has none."""
    try:
        status, output = restricted.run_module(
            __name__, str(path.absolute()), seconds=_SECONDS, input_bytes=text.encode()
        )
        answer = json.loads(output)
    except restricted.GaveUpError as error:
        answer = str(error)
    except (ValueError, RecursionError):
        answer = f"the reader died with status {status}"
    if isinstance(answer, list) and all(type(token_id) is int for token_id in answer):
        return answer
    raise TokenizerError(f"the tokenizers library refuses it: {safe_line(str(answer), 70)}", where=path)


def _main() -> None:
    restricted.leave_network()
    from tokenizers import Tokenizer

    restricted.confine(memory=_MEMORY, seconds=_SECONDS)
    try:
        tokenizer = Tokenizer.from_file(sys.argv[1])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        answer: object = tokenizer.encode(sys.stdin.buffer.read().decode(), add_special_tokens=False).ids
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
        # Some have no text: MemoryError, above all.
        answer = " ".join(str(error).split())[:300] or type(error).__name__
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
