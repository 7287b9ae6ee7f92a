"""How much there is to do, in tokens, before anything is tokenized: bounds and guesses from bytes."""

from __future__ import annotations

from dsmoe_local.engine.load.parallel import Workload
from dsmoe_local.engine.types import Message, Prompt, Request

UNSET_TOKENS = 512
"""A guess at replies whose length nobody limits."""
BYTES_A_TOKEN = 4
"""A guess at text of any language."""


class WorkloadMeter:
    """Sums up requests. `n_sequences` counts replies: a request may want several. `n_messages` is of the
    longest conversation.
    """

    def __init__(self) -> None:
        self.n_sequences = 0
        self.n_messages = 0
        self._longest: int | None = 0
        self._total = 0

    def add(self, request: Request) -> None:
        """Count one request."""
        self.n_sequences += request.n
        self.n_messages = max(self.n_messages, n_messages(request.prompt))
        self._total += request.n * expected_tokens(request)
        if request.max_tokens is None or self._longest is None:
            self._longest = None
        else:
            self._longest = max(self._longest, most_tokens(request.prompt) + request.max_tokens)

    @property
    def n_longest(self) -> int | None:
        """No request takes more tokens than this with its reply, what a template adds aside; None if one may
        take any number.
        """
        return self._longest

    def n_total(self, n_sequences: int) -> int:
        """What so many of the replies take, about."""
        return self._total * n_sequences // max(1, self.n_sequences)

    def left(self, n_left: int, n_lines: int, n_shared: int) -> Workload:
        """What `n_left` of `n_lines` lines ask for, if they are like the others; `n_shared` of their prompt
        tokens are read once for several.
        """
        n_sequences = max(1, self.n_sequences * n_left // max(1, n_lines))
        n_total = max(n_sequences, self.n_total(n_sequences) - n_shared)
        return Workload(n_sequences, self.n_longest, n_total, self.n_messages)


def expected_tokens(request: Request) -> int:
    """About what a reply takes, with its prompt."""
    return prompt_bytes(request.prompt) // BYTES_A_TOKEN + (request.max_tokens or UNSET_TOKENS)


def n_messages(prompt: Prompt) -> int:
    """Messages of a conversation; 0 if it is none."""
    return sum(isinstance(item, Message) for item in prompt)


def most_tokens(prompt: Prompt) -> int:
    """A prompt has no more tokens: a tokenizer makes at most one of a byte, and ids are what they are."""
    if prompt and isinstance(prompt[0], int):
        return len(prompt)
    return prompt_bytes(prompt)


def prompt_bytes(prompt: Prompt) -> int:
    """Bytes of text; of token ids, their number times as many bytes as a token has."""
    if isinstance(prompt, str):
        return len(prompt.encode())
    return sum(
        len(f"{item.role}\n{item.content}\n".encode()) if isinstance(item, Message) else BYTES_A_TOKEN
        for item in prompt
    )
