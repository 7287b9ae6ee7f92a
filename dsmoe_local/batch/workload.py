"""Estimate the work of a batch from the bytes of its prompts, before anything is tokenized."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from dsmoe_local.engine.load.parallel import Workload
from dsmoe_local.engine.types import Message, Prompt, Request

BYTES_PER_TOKEN = 4
"""An estimate for text in any language."""
HASH_BYTES = 2
"""Bytes of the hash of one prefix, see `prefix_hashes`."""
PREFIX_LENGTHS = (64, 256, 1024, 4096)
_UNLIMITED_REPLY = 512  # tokens; an estimate for requests without max_tokens
_MAX_COST = 2**32 - 1


class WorkloadMeter:
    """Totals over requests.

    `n_sequences` counts replies: a request may ask for several. `n_tokens` is an estimate for prompts and
    replies together, with the prompt once for each reply; `n_prompt_tokens` counts it once, and
    `n_reply_tokens` counts replies alone. `n_messages` is the length of the longest conversation. `n_longest`
    is an upper bound for the tokens of one prompt with its reply, without what a chat template adds; None if
    a request sets no limit.
    """

    def __init__(self) -> None:
        self.n_sequences = 0
        self.n_tokens = 0
        self.n_prompt_tokens = 0
        self.n_reply_tokens = 0
        self.n_messages = 0
        self.n_longest: int | None = 0
        self.scores_prompts = False

    def add(self, request: Request) -> None:
        """Count one request."""
        prompt = request.prompt
        self.n_sequences += request.n
        self.scores_prompts = self.scores_prompts or request.scores_prompt
        if prompt and isinstance(prompt[0], Message):
            self.n_messages = max(self.n_messages, len(prompt))
        n_reply = request.max_tokens or _UNLIMITED_REPLY
        n_prompt = prompt_bytes(prompt) // BYTES_PER_TOKEN
        self.n_tokens += request.n * (n_prompt + n_reply)
        self.n_prompt_tokens += n_prompt
        self.n_reply_tokens += request.n * n_reply
        if request.max_tokens is None or self.n_longest is None:
            self.n_longest = None
        else:
            self.n_longest = max(self.n_longest, max_prompt_tokens(prompt) + request.max_tokens)

    def remaining(self, n_left: int, n_lines: int, n_shared: int) -> Workload:
        """Return the workload of `n_left` of the `n_lines` lines, assuming that all lines are alike.

        `n_shared` prompt tokens are prefixes that the KV cache already holds.
        """
        n_sequences = max(1, self.n_sequences * n_left // max(1, n_lines))
        n_tokens = self.n_tokens * n_sequences // max(1, self.n_sequences) - n_shared
        return Workload(n_sequences, self.n_longest, max(n_sequences, n_tokens), self.n_messages)


def max_prompt_tokens(prompt: Prompt) -> int:
    """Return an upper bound for the tokens of a prompt: a tokenizer makes at most one token per byte."""
    if prompt and isinstance(prompt[0], int):
        return len(prompt)
    return prompt_bytes(prompt)


def prompt_bytes(prompt: Prompt) -> int:
    """Return the bytes of a prompt's text. A token id counts as BYTES_PER_TOKEN bytes."""
    if isinstance(prompt, str):
        return len(prompt.encode())
    return sum(
        len(f"{item.role}\n{item.reasoning_content}{item.content}\n".encode())
        if isinstance(item, Message)
        else BYTES_PER_TOKEN
        for item in prompt
    )


def cost(request: Request) -> int:
    """Return an estimate of the work: a generated token costs as much as ten prompt tokens."""
    n_generated = request.n * (request.max_tokens or _UNLIMITED_REPLY)
    return min(10 * n_generated + prompt_bytes(request.prompt) // BYTES_PER_TOKEN, _MAX_COST)


def prefix_hashes(prompt: Prompt) -> bytes:
    """Return the hashes of the prompt's first 64, 256, 1024 and 4096 bytes, HASH_BYTES each.

    Prompts with a common prefix have hashes that begin alike. A collision only costs speed.
    """
    text = b"".join(_pieces(prompt, PREFIX_LENGTHS[-1]))
    digest = blake2b(digest_size=HASH_BYTES)
    hashes, begin = b"", 0
    for end in PREFIX_LENGTHS:
        digest.update(text[begin:end])
        hashes += digest.digest()
        begin = end
    return hashes


def shared_bytes(first: bytes, second: bytes) -> int:
    """Return about how many bytes two prompts share, given their prefix hashes: 0 to 4096.

    Lines that are not valid have empty hashes and share nothing.
    """
    shared = 0
    for end, n_bytes in zip(range(HASH_BYTES, len(first) + 1, HASH_BYTES), PREFIX_LENGTHS, strict=False):
        if first[:end] != second[:end]:
            break
        shared = n_bytes
    return shared


def _pieces(prompt: Prompt, limit: int) -> Iterator[bytes]:
    if isinstance(prompt, str):
        yield prompt[:limit].encode()
        return
    for item in prompt[:limit]:
        if isinstance(item, Message):
            yield f"{item.role}\n{item.content[:limit]}\n".encode()
        else:
            # The engine refuses such an id later.
            in_range = -(2**31) <= item < 2**31
            yield item.to_bytes(BYTES_PER_TOKEN, "little", signed=True) if in_range else b"????"
