"""From a text to windows of token ids, cut as llama.cpp's perplexity tool cuts them. Runs nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.prompts.encoder import MAX_TOKEN_BYTES
from dsmoe_local.engine.types import TextEngine
from dsmoe_local.evaluate.text import Text

LEAST_CONTEXT = 16

# No pre-tokenizer joins a letter with what follows it here, so both sides have the tokens of the whole text.
_CUTS = (r"(?<=[^\W\d_])(?=\n)", r"(?<=[^\W\d_])(?=[\s，。])", r"(?=\n)")


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of equal length. Of each, the tokens behind the one with the index `first` are scored.

    `text` and `text_digest` name what they were cut from, `vocabulary` whose ids they are.
    """

    tokens: tuple[tuple[int, ...], ...]
    text: str
    text_digest: str
    vocabulary: str

    @property
    def n_context(self) -> int:
        """Tokens of a window."""
        return len(self.tokens[0])

    @property
    def first(self) -> int:
        """What stands before is context only."""
        return self.n_context // 2

    @property
    def n_tokens(self) -> int:
        """Tokens of all windows."""
        return self.n_context * len(self.tokens)

    @property
    def n_scored(self) -> int:
        """Tokens whose probabilities are looked at."""
        return (self.n_context - 1 - self.first) * len(self.tokens)


def cut_windows(engine: TextEngine, text: Text, n_context: int, n_windows: int | None = None) -> Windows:
    """The windows of a text, at most `n_windows`; what is left at the end is dropped. UsageError if the text
    does not fill one.

    Where the model wants BOS, it takes the place of each window's first token, as llama.cpp has it.
    """
    ids = encode_text(engine, text.content)
    bos = bos_token(engine)
    count = min(len(ids) // n_context, n_windows or len(ids))
    if not count:
        raise UsageError(
            f"the text has {len(ids)} tokens, which fill no window of {n_context}",
            where=text.name,
            remedy="take a longer text, or smaller windows: -c",
        )
    windows = [tuple(ids[start : start + n_context]) for start in range(0, count * n_context, n_context)]
    if bos is not None:
        windows = [(bos, *window[1:]) for window in windows]
    return Windows(tuple(windows), text.name, text.digest, engine.info.vocabulary)


def encode_text(engine: TextEngine, content: str) -> list[int]:
    """The ids of a text of any length, BOS in front where the model wants it."""
    bos = bos_token(engine)
    ids: list[int] = []
    for piece in pieces(content, engine.info.n_context * MAX_TOKEN_BYTES):
        part = engine.encode(piece)
        ids += part[1:] if ids and bos is not None else part
    return ids


def bos_token(engine: TextEngine) -> int | None:
    """What every prompt begins with, if anything."""
    firsts = {engine.encode(text)[0] for text in ("a", "1", "\n")}
    return firsts.pop() if len(firsts) == 1 else None


def pieces(content: str, most_bytes: int) -> Iterator[str]:
    """A text in parts of at most so many bytes, cut where that changes no tokens if it can be."""
    # A character has four bytes at most.
    most = max(1, most_bytes // 4)
    start = 0
    while len(content) - start > most:
        piece = content[start : start + most]
        end = next((end for pattern in _CUTS if (end := _last(pattern, piece + content[start + most]))), most)
        yield content[start : start + end]
        start += end
    yield content[start:]


def _last(pattern: str, text: str) -> int:
    """The last place that is not the very first; 0 if there is none."""
    return max((match.start() for match in re.finditer(pattern, text)), default=0)
