"""Prompts as token ids, cut from Python's help topics: text that any tokenizer knows. Measures nothing.

A slice is never handed out twice, so that nobody finds in a cache what an earlier round left there.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

from dsmoe_local.batch.job import BatchOptions, prepared
from dsmoe_local.engine.load import parallel
from dsmoe_local.engine.types import SamplingParameters
from dsmoe_local.protocol.requests import RequestDefaults

Ids = tuple[int, ...]

_TAIL_OF_SHARED = 16
_SHORTEST, _LONGEST = 32, 192


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of one kind and how many tokens each is to be answered with."""

    name: str
    n_prompts: int
    n_new: int
    n_shared: int
    """Tokens that all prompts begin with; 0: the prompts have nothing in common."""

    @property
    def n_each(self) -> int:
        """The most tokens that one prompt and its reply take."""
        return (self.n_shared + _TAIL_OF_SHARED if self.n_shared else _LONGEST) + self.n_new


class Corpus:
    """Token ids to cut prompts from. `take` goes on where the last one ended."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = tuple(ids)
        self._at = 0

    def take(self, count: int) -> Ids:
        """The next `count` ids. At the corpus's end it begins anew, one further on: still no slice twice."""
        if count >= len(self._ids):
            raise ValueError(f"the corpus has {len(self._ids)} tokens, {count} are wanted")
        if self._at + count > len(self._ids):
            self._at = self._at % 7 + 1
        taken = self._ids[self._at : self._at + count]
        self._at += count
        return taken

    def prompts(self, work: Workload, seed: int) -> list[Ids]:
        """The workload's prompts, new ones on every call."""
        if work.n_shared:
            shared = self.take(work.n_shared)
            return [shared + self.take(_TAIL_OF_SHARED) for _ in range(work.n_prompts)]
        lengths = random.Random(seed)
        return [self.take(lengths.randint(_SHORTEST, _LONGEST)) for _ in range(work.n_prompts)]


def as_batch(prompts: Sequence[Ids], n_new: int) -> tuple[parallel.Workload, float]:
    """What dsmoe-batch makes of a file of these prompts before it loads the model: work and prompt_ratio."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        lines = (json.dumps({"prompt": prompt, "max_tokens": n_new}) for prompt in prompts)
        source.write_text("".join(f"{line}\n" for line in lines))
        options = BatchOptions(
            [source], Path(folder) / "out.jsonl", RequestDefaults(SamplingParameters(temperature=0))
        )
        with prepared(options) as job:
            return job.workload, job.prompt_ratio


def help_texts() -> list[str]:
    """The topics, one text each, in a fixed order."""
    return [topics[name] for name in sorted(topics)]


def sentences(count: int, start: int) -> str:
    """About `count` words of the help texts, different ones for each `start`."""
    words = itertools.chain.from_iterable(text.split() for text in help_texts())
    return " ".join(itertools.islice(words, start * count, (start + 1) * count))
