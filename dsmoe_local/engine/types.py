"""The nouns that every caller of the engine shares: requests, events, options. Data and one protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Protocol, TypeAlias

from dsmoe_local.base.errors import UsageError

MAX_SEED = 2**32 - 2  # llama.cpp reads 2^32 - 1 as "choose one"


class FinishReason(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    LENGTH = "length"
    CONTEXT_FULL = "context_full"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `token_ids` are the exact ids of a reply of this model. They stand for `content` when the conversation is
    read again, so that a reply is never re-tokenized and its KV cache stays valid.
    """

    role: str
    content: str
    token_ids: tuple[int, ...] = ()


Prompt: TypeAlias = str | tuple[Message, ...] | tuple[int, ...]
"""Raw text to complete, a conversation for the chat template, or token ids as they are."""


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the next token is chosen.

    `temperature` 0 takes the likeliest one. Raises UsageError out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            check, accepted = _RANGES[item.name]
            if not check(value):
                raise UsageError(f"{item.name} = {value} is out of range", remedy=f"it takes {accepted}")


_Check: TypeAlias = Callable[[float], bool]


def _between(low: float, high: float) -> _Check:
    # False for NaN; unlike math.isfinite it takes whole numbers of any size.
    return lambda value: low <= value <= high


_RANGES: dict[str, tuple[Callable[..., bool], str]] = {
    "temperature": (_between(0, 100), "a number from 0 (always the likeliest token) to 100"),
    "top_k": (_between(0, 2**31 - 1), "a whole number, 0 = off"),
    "top_p": (_between(0, 1), "a number from 0 to 1, 1 = off"),
    "min_p": (_between(0, 1), "a number from 0 to 1, 0 = off"),
    "typical_p": (_between(0, 1), "a number from 0 to 1, 1 = off"),
    "repeat_penalty": (_between(0.01, 100), "a number from 0.01 to 100, 1 = off"),
    "repeat_last_n": (_between(0, 2**20), "a whole number of tokens, 0 = off"),
    "presence_penalty": (_between(-100, 100), "a number, 0 = off"),
    "frequency_penalty": (_between(-100, 100), "a number, 0 = off"),
    "seed": (lambda value: value is None or 0 <= value <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}"),
}


@dataclass(frozen=True, slots=True)
class Request:
    """One reply to generate. `id` names it for `cancel`; ids of requests in flight must differ.

    A conversation that ends with an assistant's message is continued from there. `max_tokens` None: until the
    model stops or the context is full. Generation also ends before the first of the `stop` strings.
    """

    id: str
    prompt: Prompt
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens = {self.max_tokens} is out of range", remedy="it takes 1 or more")
        if any(not text for text in self.stop):
            raise UsageError("a stop string is empty", remedy="leave it out")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a reply took. Seconds are wall time: `prompt_seconds` to the first logits, then decoding."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_seconds: float
    completion_seconds: float
    seed: int | None

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; 0 before the second token."""
        decoded = self.completion_tokens - 1
        return decoded / self.completion_seconds if decoded > 0 and self.completion_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """`done` of `total` prompt tokens are read."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of a reply.

    A generated token: `token_id` is set; `text` is what became printable with it, possibly nothing (half a
    character, or the start of what may be a stop string). A long prompt being read: `progress`, no token.

    Every stream that does not raise ends with one event whose `finish_reason` and `usage` are set. Its `text`
    is what was held back; its `token_id` is the token that ended the reply, if one did (not part of it).
    Joined, the texts are the reply. `logprob` is natural and of the model's own distribution, before any
    sampling parameter; None unless asked for. `seconds` count from the request's submission.
    """

    request_id: str
    text: str
    seconds: float
    token_id: int | None = None
    logprob: float | None = None
    progress: PromptProgress | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What to load and how. None: the engine's own choice (see the field's flag in `dsmoe-chat --help`)."""

    path: Path
    n_context: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int | None = None
    flash_attention: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    n_experts_per_token: int | None = None
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is. `template` names where the chat template comes from; None: completion only."""

    path: Path
    name: str
    architecture: str
    n_context: int
    n_context_trained: int
    n_vocab: int
    n_parameters: int
    n_bytes: int
    n_routed_experts: int
    n_experts_per_token: int
    n_threads: int
    template: str | None


class TextEngine(Protocol):
    """What chat and batch hold: the engine in this process, one in another, or a fake. Callable from any
    thread.
    """

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        ...

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        """Generate. Events arrive as they happen; an EngineError is raised from the iteration.

        Closing the iterator early cancels the request.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request, also while its prompt is read: its stream closes with CANCELLED. Unknown ids are
        fine.
        """
        ...

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The exact token ids that `prompt` becomes. Raises PromptError, TemplateError."""
        ...

    def close(self) -> None:
        """End all requests and give the model back. Closing twice is fine."""
        ...
