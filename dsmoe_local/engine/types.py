"""The nouns that every caller of the engine shares: requests, events, options, and what an engine is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import msgspec

from dsmoe_local.base import progress
from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.parameters import MAX_REPLIES as MAX_REPLIES
from dsmoe_local.engine.parameters import MAX_SEED as MAX_SEED
from dsmoe_local.engine.parameters import MAX_TOP_LOGPROBS as MAX_TOP_LOGPROBS
from dsmoe_local.engine.parameters import REQUEST_RANGES, check_fields
from dsmoe_local.engine.parameters import SamplingParameters as SamplingParameters

ALL_LAYERS = -1


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


Prompt: TypeAlias = str | tuple[Message | int, ...]
"""Raw text to complete, a conversation for the chat template, or token ids as they are.

One type of tuple, since msgspec tells no two apart: `check_prompt` refuses messages mixed with ids.
"""


def ends_with_reply(prompt: Prompt | Sequence[Message]) -> bool:
    """Whether `prompt` is a conversation whose last message is the assistant's."""
    last = prompt[-1] if prompt else None
    return isinstance(last, Message) and last.role == "assistant"


@dataclass(frozen=True, slots=True)
class Request:
    """One reply to generate. `id` names it for `cancel`; ids of requests in flight must differ.

    With `continue_final_message` the last message of a conversation, an assistant's, is continued; else a new
    reply begins, whoever spoke last. `max_tokens` None: until the model stops or the context is full.
    Generation also ends before the first of the `stop` strings.

    `n` replies are made of one prompt, told apart by `TokenEvent.index`; the i-th is sampled with the seed
    plus i. `logprobs` asks for the log-probability of each token, `top_logprobs` for those of that many of
    the likeliest beside it. `logit_bias` adds to the logits of token ids before anything else; -100 bans
    one. `grammar` is GBNF, `json_schema` the text of a JSON schema; at most one of them constrains the reply.
    `context_shift`: when the context is full, the older half of what lies behind the first `n_keep` tokens
    makes room (the very first token always stays), instead of the end. `score_from`: the logits of the
    prompt's tokens from this index on are shown to the observers, so the tokens behind it are scored (of a
    model with an observer that reads logits; needs n = 1 and max_tokens).
    """

    id: str
    prompt: Prompt
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    json_schema: str | None = None
    context_shift: bool = False
    n_keep: int = 0
    score_from: int | None = None
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        check_fields(self, REQUEST_RANGES)
        check_prompt(self.prompt)
        if self.score_from is not None and (self.n > 1 or self.max_tokens is None):
            raise UsageError("score_from takes an index from 0, n = 1, and max_tokens")
        if self.grammar is not None and self.json_schema is not None:
            raise UsageError("grammar and json_schema are given", remedy="use one of them")
        if self.continue_final_message and not ends_with_reply(self.prompt):
            raise UsageError("continue_final_message: the last message is not the assistant's")


def check_prompt(prompt: Prompt) -> None:
    """UsageError unless `prompt` is text, messages or token ids. What they say is not looked at."""
    if isinstance(prompt, str) or (
        isinstance(prompt, tuple) and (all(map(_is_id, prompt)) or all(map(_is_message, prompt)))
    ):
        return
    raise UsageError("a prompt is text, messages with their token ids, or token ids")


def _is_id(value: object) -> bool:
    return type(value) is int


def _is_message(value: object) -> bool:
    return (
        isinstance(value, Message)
        and isinstance(value.role, str)
        and isinstance(value.content, str)
        and isinstance(value.token_ids, tuple)
        and all(map(_is_id, value.token_ids))
    )


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
class TokenLogprob:
    """A token that could have been next. `text` is its own, possibly with half a character as U+FFFD."""

    token_id: int
    text: str
    logprob: float


class TokenEvent(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One step of a reply.

    A generated token: `token_id` is set; `text` is what became printable with it, possibly nothing (half a
    character, or the start of what may be a stop string). A long prompt being read: `progress`, no token.

    Every stream that does not raise ends with one event whose `finish_reason` and `usage` are set (with
    `n` > 1: each reply does, in any order). Its `text` is what was held back; its `token_id` is the token
    that ended the reply, if one did (not part of it). Joined, the texts are the reply. `logprob` is natural
    and of the model's own distribution, before any sampling parameter; None unless asked for. `alternatives`:
    the chosen token, then the `top_logprobs` likeliest, most likely first; empty unless asked for. `seconds`
    count from the request's submission.

    `dropped` > 0: the context was full (see `Request.context_shift`), and just before this event that many
    tokens of prompt and reply, from the place `dropped_from` on, left it.

    `held`: the tokens so far have more text than was told, since its end may be the start of a stop string.

    A Struct, not a dataclass: there is one for each token, and it is made in a tenth of the time.
    """

    request_id: str
    text: str
    seconds: float
    token_id: int | None = None
    logprob: float | None = None
    progress: PromptProgress | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    index: int = 0
    alternatives: tuple[TokenLogprob, ...] = ()
    dropped: int = 0
    dropped_from: int = 0
    held: bool = False


@dataclass(frozen=True, slots=True)
class ObserverOptions:
    """An observer to load with the model.

    `name` is its name in the table `OBSERVERS` of `module`, which the engine's process imports; None is the
    engine's own table, in `observe.registry`.
    """

    name: str
    parameters: tuple[tuple[str, str | int | float | bool], ...] = ()
    module: str | None = None


Observation: TypeAlias = dict[str, Any]
"""What an observer has seen so far: plain JSON values; each observer documents its own."""


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What to load and how. None: the engine's own choice (see the field's flag in `dsmoe-chat --help`).

    `n_parallel` requests are decoded at once, sharing `n_context` tokens of KV cache (`unified`: any request
    may use all of it, and equal beginnings are kept once; else an equal share each). `deterministic` makes a
    reply independent of what else runs; it needs `n_parallel` >= 2 and excludes `unified`.

    `n_gpu_layers` and `n_cpu_moe` count layers; ALL_LAYERS is all of them. `tensor_overrides` are pairs of a
    regular expression of tensor names and a buffer type's or device's name; `devices` the names that may be
    used. `offload_cache` keeps the KV cache of a layer where the layer is, else all of it is on the CPU.
    """

    path: Path
    n_context: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int | None = None  # None: what fits
    flash_attention: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    n_experts_per_token: int | None = None
    chat_template: str | None = None
    n_parallel: int = 1
    unified: bool | None = None
    deterministic: bool = False
    n_cpu_moe: int | None = None  # None: what must
    tensor_overrides: tuple[tuple[str, str], ...] = ()
    devices: tuple[str, ...] | None = None
    offload_cache: bool = True
    observers: tuple[ObserverOptions, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is.

    `type` is what the file's type is called (`model.type_name`). `template` names where the chat template
    comes from, `template_text` is its source; None: completion only. `vocabulary` is a digest of the
    tokenizer: token ids mean the same in two models if it is equal. `n_context` is the longest prompt and
    reply of one request. `placement` says where weights and KV cache lie, in words; `kernels` what else the
    last digits of float results depend on, beside the options. `cache_identity` is a digest of all that the
    contents of the KV cache depend on beside their tokens, this very file among it (a copy is another one);
    what `save_cache` writes is of use only where it is equal.
    """

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
    n_parallel: int = 1
    unified: bool = True
    deterministic: bool = False
    placement: str = ""
    kernels: str = ""
    template_text: str | None = None
    vocabulary: str = ""
    cache_identity: str = ""
    type: str = ""


Deliver: TypeAlias = Callable[[TokenEvent | BaseException | None], None]
"""Takes a request's events as they happen, then None; an error instead of what would follow."""


class Ticket(Protocol):
    """A request on its way."""

    def cancel(self) -> None:
        """End it, as `TextEngine.cancel` does; nothing happens once it is over."""
        ...


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

    def start(self, request: Request, deliver: Deliver) -> Ticket:
        """Generate without waiting: `deliver` is called in the engine's own thread and must not block.

        What `submit` would raise at once is raised here too; what it would raise later is delivered.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request, also while its prompt is read: its stream closes with CANCELLED. Unknown ids are
        fine.
        """
        ...

    def encode(self, prompt: Prompt, *, continue_final_message: bool = False) -> tuple[int, ...]:
        """The exact token ids that `prompt` becomes in a Request. Raises PromptError, TemplateError."""
        ...

    def decode(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Each token's own text, as `TokenLogprob.text`; special tokens by their names. PromptError for an id
        that the vocabulary does not have.
        """
        ...

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        """Write what the KV cache holds of the beginning of `token_ids`, without the first `start` of them,
        to the new file `path`, and sync it.

        Returns how many tokens the cache holds of that beginning. 0, and no file: it holds no more than
        `start`, a request runs, the engine cannot (`deterministic`, or a cache in parts), or the disk is
        full.
        """
        ...

    def load_cache(self, path: Path, token_ids: tuple[int, ...]) -> int:
        """Make the KV cache hold what the file of a `save_cache` holds of the beginning of `token_ids`. What
        that file leaves out at its start must be in the cache already.

        Returns how many tokens the cache holds of it then. 0: the file is of other tokens, another model or
        shape, or cannot be used now. The caller has verified that the file is byte for byte what was written:
        contents that were changed are taken as they are, or end the engine's process.
        """
        ...

    def set_observers(self, options: tuple[ObserverOptions, ...]) -> None:
        """Replace all observers; what the old ones have seen is gone. The model stays loaded, the KV cache
        too, if there is room to carry it over. Without observers nothing is left that costs time.

        EngineError while requests run; UsageError, FileError, FormatError for what the model cannot have: the
        old ones are then still there.
        """
        ...

    def log(self) -> tuple[str, ...]:
        """llama.cpp's latest log lines, safe to print."""
        ...

    def observe(self, name: str) -> Observation:
        """What the observer of that name has seen since it is there. EngineError if there is none."""
        ...

    def close(self) -> None:
        """End all requests and give the model back. Closing twice is fine."""
        ...


class ReloadableEngine(TextEngine, Protocol):
    """An engine in a process of its own, which can be ended and replaced. Callable from any thread.

    Where the process has died, `start`, `submit`, `encode`, `decode`, `load_cache` and `set_observers` load
    the model again first, which may take minutes: InterruptedRunError if `cancel_all` or `kill` gives it up.
    `save_cache` and `observe` load nothing, since what they want is gone.
    """

    @property
    def options(self) -> ModelOptions:
        """What is loaded, and how, and what will be after a crash; with the observers set since."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the process is there; else the next request loads the model again first."""
        ...

    @property
    def crashes(self) -> int:
        """How often the process has died, or was killed, and another took its place."""
        ...

    def reload(
        self,
        options: ModelOptions,
        listen: progress.Listener = progress.ignore,
        stop: threading.Event | None = None,
    ) -> None:
        """Load another model, or the same one otherwise. The old one is given back first, with its KV cache.

        `listen` and `stop` as in `Engine.load`, and what it raises; the old options then stay, and the next
        request loads that model again. `cancel_all` and `kill` give it up, too.
        """
        ...

    def cancel_all(self) -> None:
        """End all requests, as `cancel` does, and give up every load that a call waits for. Never waits;
        signal handlers may call it.
        """
        ...

    def kill(self) -> None:
        """End the process at once, even one that hangs, and give up every load that a call waits for. Never
        waits; signal handlers may call it.

        Requests in flight end with EngineCrashError, and the next one loads the model again.
        """
        ...
