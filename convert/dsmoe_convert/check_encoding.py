"""Encode a text with a tokenizer.json, by the `tokenizers` library in a restricted child process.

The library panics or aborts the process on several malformed files, and some definitions make it allocate or
compute without end. Run as a module, this file is the child.
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
    """Return the ids of `text` without special tokens, padding and truncation.

    Raises TokenizerError if it fails.
    """
    try:
        status, output = restricted.run_module(
            __name__, str(path.absolute()), seconds=_SECONDS, input_bytes=text.encode()
        )
        answer = json.loads(output)
    except restricted.GaveUpError as error:
        answer = str(error)
    except (ValueError, RecursionError):
        answer = f"the child process failed with status {status}"
    if isinstance(answer, list) and all(type(token_id) is int for token_id in answer):
        return answer
    raise TokenizerError(f"the tokenizers library cannot read it: {safe_line(str(answer), 70)}", where=path)


def _main() -> None:
    restricted.leave_network()
    from tokenizers import Tokenizer

    restricted.confine(memory=_MEMORY, seconds=_SECONDS)
    try:
        tokenizer = Tokenizer.from_file(sys.argv[1])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        answer: object = tokenizer.encode(sys.stdin.buffer.read().decode(), add_special_tokens=False).ids
    except BaseException as error:  # noqa: BLE001 - the library's panics are not Exceptions
        # Some have no text, such as MemoryError.
        answer = " ".join(str(error).split())[:300] or type(error).__name__
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
