"""Data that the engine and its callers exchange: requests, token events, options, model information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.parameters import MAX_REPLIES as MAX_REPLIES
from dsmoe_local.engine.parameters import MAX_SEED as MAX_SEED
from dsmoe_local.engine.parameters import MAX_TOP_LOGPROBS as MAX_TOP_LOGPROBS
from dsmoe_local.engine.parameters import REQUEST_RANGES, check_fields
from dsmoe_local.engine.parameters import ReplyStart as ReplyStart
from dsmoe_local.engine.parameters import SamplingParameters as SamplingParameters
from dsmoe_local.engine.tools.calls import CallDelta as CallDelta
from dsmoe_local.engine.tools.calls import Tool as Tool
from dsmoe_local.engine.tools.calls import ToolCall as ToolCall
from dsmoe_local.engine.tools.calls import Tools as Tools

ALL_LAYERS = -1
MIN_CONTEXT = 32
"""The smallest `ModelOptions.n_context`."""
CHAT_RATIO = 3.0
"""The `ModelOptions.prompt_ratio` of a chat. It reads less than that, but prompts count more: the user waits
for the first word, and reads along with the others."""
PROMPTS_ONLY = 1e9
"""The `ModelOptions.prompt_ratio` of a job that generates no text."""
NO_TEMPLATE = "none"
"""The `ModelOptions.chat_template` of a model that only completes text."""


class FinishReason(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    LENGTH = "length"
    CONTEXT_FULL = "context_full"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    `token_ids` are the ids that the model generated for `content`. If they are set they are used in its place
    when the conversation is encoded, so that the reply's KV cache stays valid.

    `reasoning_content` is what the model wrote before `content`; `token_ids` then include it with its
    markers. The chat template decides whether it stays in the context.

    `tool_calls` are the calls of a reply, after its content. A message of the role `tool` is the result of
    the call `tool_call_id`.
    """

    role: str
    content: str
    token_ids: tuple[int, ...] = ()
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


Prompt: TypeAlias = str | tuple[Message | int, ...]
"""Raw text to complete, a conversation for the chat template, or token ids.

msgspec cannot distinguish two tuple types in a union, so `check_prompt` refuses a mix of messages and ids.
"""


def ends_with_reply(prompt: Prompt | Sequence[Message]) -> bool:
    """Return whether `prompt` is a conversation whose last message is the assistant's."""
    last = prompt[-1] if prompt else None
    return isinstance(last, Message) and last.role == "assistant"


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and the parameters of the reply.

    - `id` identifies the request for `cancel`; it must be unique among running requests.
    - `max_tokens` limits the reply. None: generate until the model stops or the context is full. 0: read the
      prompt only.
    - `stop`: the reply ends before the first occurrence of one of these strings in its answer.
    - `n` replies are generated for the prompt. `TokenEvent.index` numbers them; reply i is sampled with the
      seed plus i.
    - `echo`: the reply begins with the text of the prompt, which is not a conversation. With `logprobs`, the
      prompt's tokens have log-probabilities, too; `n` is then 1, and no part of the prompt is taken from the
      cache.
    - `logprobs` adds the log-probability of each token, `top_logprobs` also those of the likeliest tokens.
    - `logit_bias` is added to the logits of token ids before anything else; -100 bans a token.
    - `grammar` is GBNF, `json_schema` the text of a JSON schema. At most one of them is set. It constrains
      the answer, not the reasoning before it.
    - `context_shift`: when the context is full, drop the older half of the tokens after the first `n_keep`
      instead of ending the reply. The first token is always kept.
    - `score_from`: compute logits for the prompt's tokens from this index on and pass them to the observers.
      Requires an observer that reads logits, `n` = 1, and `max_tokens`.
    - `continue_final_message`: continue the last message of a conversation, which must be the assistant's,
      instead of beginning a new reply.
    - `reply_start` says whether the reply may begin with reasoning. None: DETECT for a conversation, ANSWER
      for other prompts.
    - `reasoning_budget`: reasoning is ended after that many tokens. 0 turns it off, None means no limit.
    - `chat_template_kwargs` are variables for the chat template, as JSON values.
    - `tools` are those that the reply may call. The prompt is then a conversation, or its token ids. They
      constrain the reply like a grammar; with `json_schema`, an answer without calls follows the schema.
    """

    id: str
    prompt: Prompt
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    echo: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    json_schema: str | None = None
    context_shift: bool = False
    n_keep: int = 0
    score_from: int | None = None
    continue_final_message: bool = False
    reply_start: ReplyStart | None = None
    reasoning_budget: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Tools | None = None

    def __post_init__(self) -> None:
        check_fields(self, REQUEST_RANGES)
        check_prompt(self.prompt)
        if self.score_from is not None and (self.n > 1 or self.max_tokens is None):
            raise UsageError("score_from requires n = 1 and max_tokens", remedy="set both, or leave it out")
        if self.echo and any(isinstance(item, Message) for item in self.prompt):
            raise UsageError("echo is for prompts, not for messages", remedy="leave it out")
        if self.scores_prompt and self.n > 1:
            raise UsageError("echo with logprobs requires n = 1", remedy="leave one of them out")
        if self.grammar is not None and self.json_schema is not None:
            raise UsageError("grammar and json_schema are both set", remedy="set only one of them")
        if self.tools is not None:
            self._check_tools()
        if self.continue_final_message and not ends_with_reply(self.prompt):
            raise UsageError(
                "continue_final_message: the last message does not have the role assistant",
                remedy="leave it out, or end the conversation with a message of the assistant",
            )

    def _check_tools(self) -> None:
        if self.grammar is not None:
            raise UsageError("grammar and tools are both set", remedy="leave one of them out")
        if isinstance(self.prompt, str):
            raise UsageError("tools require messages instead of a prompt", remedy="leave the tools out")
        if self.continue_final_message:
            raise UsageError(
                "a reply with tools cannot be continued",
                remedy="leave out continue_final_message, or the tools",
            )

    def with_prompt(self, name: str, prompt: str | tuple[int, ...]) -> Request:
        """Return the same request for another prompt that is not a conversation, with the id `name`.

        The other fields are not checked again: a large `logit_bias` takes long. Raises UsageError.
        """
        check_prompt(prompt)
        other = copy(self)
        object.__setattr__(other, "id", name)
        object.__setattr__(other, "prompt", prompt)
        return other

    @property
    def scores_prompt(self) -> bool:
        """True if the tokens of the prompt have log-probabilities."""
        return self.echo and (self.logprobs or self.top_logprobs > 0)

    @property
    def start(self) -> ReplyStart:
        """What the reply begins with."""
        last = self.prompt[-1] if self.prompt else None
        if self.reply_start is not None:
            return self.reply_start
        if not isinstance(last, Message) or (self.continue_final_message and last.content):
            return ReplyStart.ANSWER
        continues = self.continue_final_message and last.reasoning_content
        return ReplyStart.REASONING if continues else ReplyStart.DETECT


def check_prompt(prompt: Prompt) -> None:
    """Raise UsageError unless `prompt` is text, messages or token ids."""
    if isinstance(prompt, str) or (
        isinstance(prompt, tuple) and (all(map(_is_id, prompt)) or all(map(_is_message, prompt)))
    ):
        return
    raise UsageError(
        "the prompt has a wrong type", remedy="pass text, a tuple of messages, or a tuple of token ids"
    )


def _is_id(value: object) -> bool:
    return type(value) is int


def _is_message(value: object) -> bool:
    return (
        isinstance(value, Message)
        and isinstance(value.role, str)
        and isinstance(value.content, str)
        and isinstance(value.reasoning_content, str)
        and isinstance(value.token_ids, tuple)
        and all(map(_is_id, value.token_ids))
        and isinstance(value.tool_call_id, str)
        and isinstance(value.tool_calls, tuple)
        and all(isinstance(call, ToolCall) for call in value.tool_calls)
    )


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and time that a reply took.

    `cached_tokens` are the prompt tokens that were already in the KV cache. `prompt_seconds` is the wall time
    up to the first logits, `completion_seconds` the time after that. `seed` is None if nothing was random.
    `reasoning_tokens` are those of the completion tokens that belong to reasoning.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_seconds: float
    completion_seconds: float
    seed: int | None
    reasoning_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; 0 for fewer than two tokens."""
        decoded = self.completion_tokens - 1
        return decoded / self.completion_seconds if decoded > 0 and self.completion_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """`done` of `total` prompt tokens have been processed."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A candidate for the next token. In `text`, an incomplete character is U+FFFD."""

    token_id: int
    text: str
    logprob: float


class TokenEvent(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A step of a reply: a generated token, or progress in a long prompt.

    For a token, `token_id` is set. `text` is the part of the answer that it completes, `reasoning` that of
    the reasoning, `calls` those of tool calls. All may be empty: an incomplete character is held back, and so
    is the possible start of a stop string or a marker; then `held` is true. `in_reasoning` is true if the
    token belongs to the reasoning or to the marker that ends it. For a prompt in progress, `progress` is set.

    The last event of each reply has `finish_reason` and `usage`. Its texts are those that were held back. Its
    `token_id` is the end token of the reply, if there is one; it is not part of the reply. The answer is the
    concatenation of all texts, and so is the reasoning.

    - `seconds` since the request was submitted.
    - `logprob` is the natural log-probability, before the sampling parameters are applied. `alternatives` are
      the chosen token, then the `top_logprobs` likeliest tokens, the likeliest first.
    - `prompt_tokens` are those of an echoed prompt from index `prompt_start` on, each as in `alternatives`.
      The log-probability of a prompt's first token is 0, since nothing predicts it. If the prompt is
      processed again after a preemption, later events repeat tokens of earlier ones.
    - `stop` is the stop string that ended the reply, in its last event.
    - `dropped`: just before this event, a context shift dropped that many tokens from index `dropped_from`.

    A Struct instead of a dataclass: one is created for each token, which takes a tenth of the time.
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
    reasoning: str = ""
    in_reasoning: bool = False
    calls: tuple[CallDelta, ...] = ()
    stop: str = ""
    prompt_tokens: tuple[tuple[TokenLogprob, ...], ...] = ()
    prompt_start: int = 0


@dataclass(frozen=True, slots=True)
class ObserverOptions:
    """An observer to attach to the model.

    `name` is its key in the table `OBSERVERS` of the module `module`, which the engine's process imports.
    None: the engine's own table, in `observe.registry`.
    """

    name: str
    parameters: tuple[tuple[str, str | int | float | bool], ...] = ()
    module: str | None = None


Observation: TypeAlias = dict[str, Any]
"""The summary of an observer, as JSON values. Each observer documents its own keys."""


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model to load, and how. None: the engine chooses (see the option in `dsmoe-chat --help`).

    `n_parallel` requests are decoded at once and share `n_context` tokens of KV cache. If `unified`, each may
    use all of it and common prefixes are stored once; otherwise each has an equal part. `deterministic` makes
    replies independent of concurrent requests; it requires `n_parallel` >= 2 and a cache that is not unified.

    `n_gpu_layers` and `n_cpu_moe` count layers; ALL_LAYERS means all. `tensor_overrides` are pairs of a
    regular expression of tensor names and the name of a buffer type or device. `devices` are the names of the
    devices that may be used. If `offload_cache` is false, the whole KV cache is in main memory.
    `workers` are other machines that compute layers, as `workers.parse_worker` reads them.
    `chat_template` is a file, the name of a built-in template, or `NO_TEMPLATE`. `kernels` is one of
    `engine.load.kernels.Kernels`; "auto" depends on `prompt_ratio`, the prompt tokens that the job reads for
    each token of a reply.

    `scores_prompts`: requests with `echo` and `logprobs` are expected. They work without it, too, but their
    prompts are then processed a few tokens at a time.
    """

    path: Path
    n_context: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int | None = None  # None: as many as fit
    flash_attention: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    n_experts_per_token: int | None = None
    chat_template: str | None = None
    n_parallel: int = 1
    unified: bool | None = None
    deterministic: bool = False
    n_cpu_moe: int | None = None  # None: as few as possible
    tensor_overrides: tuple[tuple[str, str], ...] = ()
    devices: tuple[str, ...] | None = None
    offload_cache: bool = True
    kernels: str = "auto"
    prompt_ratio: float = CHAT_RATIO
    scores_prompts: bool = False
    observers: tuple[ObserverOptions, ...] = ()
    workers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Properties of a loaded model.

    - `n_context`: the largest number of tokens of one request's prompt and reply.
    - `template`: where the chat template comes from; `template_text`: its source. None: completion only.
    - `n_choosable_experts`: the most experts that a token can use: the routed ones of its groups.
    - `vocabulary`: a digest of the tokenizer. Token ids mean the same in two models with equal digests.
    - `placement`: where weights and KV cache are, for the user.
    - `kernels`: how and where tensors are computed, which changes the last digits of results;
      `kernels_reason`: why the form of the weights was chosen.
    - `cache_identity`: a digest of everything that the KV cache depends on besides its tokens, including the
      inode of the model file. `load_cache` refuses a file that was saved with another one.
    - `type`: the file's type as in `model.file_type`.
    - `server`: the URL of the server that runs the model; empty if it runs on this computer. Tokens, sizes
      and the file of a model on a server are not known.
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
    n_choosable_experts: int
    n_threads: int
    template: str | None
    n_parallel: int = 1
    unified: bool = True
    deterministic: bool = False
    placement: str = ""
    kernels: str = ""
    kernels_reason: str = ""
    template_text: str | None = None
    vocabulary: str = ""
    cache_identity: str = ""
    type: str = ""
    server: str = ""
