"""The text for calibration and evaluation of the demo: Python's help topics, divided into two halves.

Topics are assigned to a half by a hash of their name, which is the same for every version of Python. Many
topics repeat sections of others. So repeated paragraphs are dropped, and calibration paragraphs that are also
in the held-out half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pydoc_data.topics import topics
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dsmoe_convert.demo.source import Source
from dsmoe_convert.demo.tokenizer_files import tokenizer_json

Half: TypeAlias = Literal["calibration", "held out"]

N_WINDOW = 512


def text(half: Half) -> str:
    """Return one half of the help topics, with a blank line between paragraphs. No paragraph is in both."""
    held_out = _paragraphs(topics[name] for name in sorted(topics) if not _is_calibration(name))
    if half == "held out":
        return "\n\n".join(held_out)
    seen = set(held_out)
    calibration = _paragraphs(topics[name] for name in sorted(topics) if _is_calibration(name))
    return "\n\n".join(paragraph for paragraph in calibration if paragraph not in seen)


def token_windows(source: Source, half: Half) -> NDArray[np.int32]:
    """Return one half as full windows of tokens, (windows, N_WINDOW)."""
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(source)))
    tokens = np.array(tokenizer.encode(text(half)).ids, np.int32)
    return tokens[: len(tokens) // N_WINDOW * N_WINDOW].reshape(-1, N_WINDOW)


def _is_calibration(topic: str) -> bool:
    return hashlib.sha256(topic.encode()).digest()[0] % 2 == 0


def _paragraphs(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the paragraphs in order, each once."""
    return tuple(dict.fromkeys(part for text in texts for part in text.strip("\n").split("\n\n")))
