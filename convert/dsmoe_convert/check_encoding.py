"""The ids that a tokenizer.json gives to a text, from the `tokenizers` library in a child process.

The library panics, or aborts the process, on several malformed files, and some definitions make it allocate
or compute without end: a child is what that takes down. Run as a module, this file is that child.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from dsmoe_convert.errors import TokenizerError
from dsmoe_local.base.text import safe_line

_TIMEOUT = 30  # seconds; a vocabulary of 100,000 tokens takes about one
_MEMORY = 4 << 30


def encode(path: Path, text: str) -> list[int]:
    """The ids of `text` without special tokens, padding and truncation. TokenizerError if it has none."""
    # -P: a file called tokenizers.py in the current folder must not be imported.
    command = [sys.executable, "-P", "-m", "dsmoe_convert.check_encoding", str(path.absolute())]
    try:
        child = subprocess.run(
            command,
            input=text.encode(),
            capture_output=True,
            timeout=_TIMEOUT,
            check=False,
            start_new_session=True,  # Ctrl-C on the terminal is for us
        )
    except subprocess.TimeoutExpired as error:
        raise TokenizerError(f"splitting a text took more than {_TIMEOUT} s", where=path) from error
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        answer = f"the reader died with status {child.returncode}"
    if isinstance(answer, list):
        return answer
    raise TokenizerError(f"the tokenizers library refuses it: {safe_line(str(answer), 70)}", where=path)


def _main() -> None:
    import resource

    from tokenizers import Tokenizer

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
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
