"""Prompts as token ids, cut from Python's help topics, which every tokenizer can encode; and as requests.

No slice is handed out twice, so that no contender finds tokens of an earlier round in its cache.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

from dsmoe_local.batch.job import BatchOptions, Job, prepared
from dsmoe_local.engine.types import SamplingParameters
from dsmoe_local.protocol.requests import RequestDefaults

Ids = tuple[int, ...]

_TAIL_OF_SHARED = 16
_SHORTEST, _LONGEST = 32, 192
_BAN = -100


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, the number of new tokens of each, and the length of their common prefix, which may be 0."""

    name: str
    n_prompts: int
    n_new: int
    n_shared: int

    @property
    def n_each(self) -> int:
        """The most tokens that one prompt and its reply have."""
        return (self.n_shared + _TAIL_OF_SHARED if self.n_shared else _LONGEST) + self.n_new


class Corpus:
    """Token ids that prompts are cut from. `take` continues after the last slice."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = tuple(ids)
        self._at = 0

    def take(self, count: int) -> Ids:
        """Return the next `count` ids. After the end it continues at the beginning with another offset."""
        if count >= len(self._ids):
            raise ValueError(f"the corpus has {len(self._ids)} tokens, {count} are wanted")
        if self._at + count > len(self._ids):
            self._at = self._at % 7 + 1
        taken = self._ids[self._at : self._at + count]
        self._at += count
        return taken

    def prompts(self, work: Workload, seed: int) -> list[Ids]:
        """Return the prompts of a workload, new ones in every call."""
        if work.n_shared:
            shared = self.take(work.n_shared)
            return [shared + self.take(_TAIL_OF_SHARED) for _ in range(work.n_prompts)]
        lengths = random.Random(seed)
        return [self.take(lengths.randint(_SHORTEST, _LONGEST)) for _ in range(work.n_prompts)]


def completion(prompt: Ids, n_new: int, ends: Sequence[int]) -> dict[str, Any]:
    """Return the request of a greedy completion of exactly `n_new` tokens. `ends` would end a reply."""
    bias = {str(token_id): _BAN for token_id in ends}
    return {"prompt": prompt, "max_tokens": n_new, "temperature": 0, "logit_bias": bias}


@contextmanager
def batch_of(requests: Sequence[dict[str, Any]]) -> Iterator[Job]:
    """Prepare a job of dsmoe-batch with these requests. Its files are removed when the block ends."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        source.write_text("".join(f"{json.dumps(request)}\n" for request in requests))
        defaults = RequestDefaults(SamplingParameters(temperature=0))
        with prepared(BatchOptions([source], Path(folder) / "out.jsonl", defaults)) as job:
            yield job


def help_texts() -> list[str]:
    """Return the topics, one text each, in a fixed order."""
    return [topics[name] for name in sorted(topics)]


def sentences(count: int, start: int) -> str:
    """Return about `count` words of the help texts, different ones for each `start`."""
    words = itertools.chain.from_iterable(text.split() for text in help_texts())
    return " ".join(itertools.islice(words, start * count, (start + 1) * count))
