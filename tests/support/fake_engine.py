"""A fake engine with the interface of the real one, without a model or native code."""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from dsmoe_local.base import progress
from dsmoe_local.base.sequences import n_common
from dsmoe_local.base.text import whole_characters
from dsmoe_local.engine.errors import EngineError, EngineKilledError, PromptError, too_long
from dsmoe_local.engine.interface import Deliver, Ticket
from dsmoe_local.engine.reasoning import ReasoningParser, markers_in
from dsmoe_local.engine.text_stream import TextStream
from dsmoe_local.engine.tools.formats import HERMES
from dsmoe_local.engine.tools.parser import ToolParser
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    ModelInfo,
    ModelOptions,
    Observation,
    ObserverOptions,
    Prompt,
    Request,
    TokenEvent,
    TokenLogprob,
    Tool,
    Usage,
    ends_with_reply,
)

END = 0  # the id of the token that ends a reply; a byte b has the id b + 1
_END_SCORE = TokenLogprob(END, "<end>", 0.0)


def echo(prompt: str) -> str:
    """Return the default reply: the last line of the prompt."""
    return prompt.rsplit("\n", 1)[-1]


class FakeEngine:
    """Replies with `reply(prompt text)`, or with `replies` in turn. A token is one byte, so that characters
    consist of several tokens.

    `template` False makes a base model. `reasons` makes a model whose replies may begin with <think>; its
    template drops the reasoning of earlier replies. `gate` is called before each token: a test can wait in
    it, cancel, or raise an error. `observations` are the results of observers by name; all of these observers
    exist until `set_observers` replaces them.

    It records its calls: `requests`, `saved` and `loaded` (paths and token counts of cache files),
    `observers`, `reloads` (options) and `kills`. The next calls of `reload` and `set_observers` each raise
    one of `failures`.
    """

    def __init__(
        self,
        reply: Callable[[str], str] = echo,
        *,
        replies: Sequence[str] | None = None,
        n_context: int = 4096,
        n_parallel: int = 1,
        template: bool = True,
        reasons: bool = False,
        gate: Callable[[int], None] = lambda index: None,
        observations: Mapping[str, Observation] | None = None,
    ) -> None:
        self._reply = reply
        self._replies = None if replies is None else itertools.cycle(replies)
        self._gate = gate
        self._cached: tuple[int, ...] = ()
        self._cancelled: dict[str, bool] = {}
        self._closed = False
        self._killed = False
        self._observed: frozenset[str] | None = None
        self.observations = dict(observations or {})
        self.requests: list[Request] = []
        self.saved: list[tuple[Path, int]] = []
        self.loaded: list[tuple[Path, int]] = []
        self.observers: list[tuple[ObserverOptions, ...]] = []
        self.reloads: list[ModelOptions] = []
        self.failures: list[Exception] = []
        self.kills = 0
        self.crashes = 0
        self.options = ModelOptions(Path("fake.gguf"), n_context=n_context, n_parallel=n_parallel)
        self.info = ModelInfo(
            path=Path("fake.gguf"),
            name="fake",
            architecture="deepseek",
            n_context=n_context,
            n_context_trained=n_context,
            n_vocab=257,
            n_parameters=0,
            n_bytes=0,
            n_routed_experts=64,
            n_experts_per_token=6,
            n_choosable_experts=64,
            n_threads=1,
            template="fake" if template else None,
            n_parallel=n_parallel,
            kernels="all on the CPU, weights repacked",
            kernels_reason="faster for replies",
            template_text=("{{ messages }}" + "</think>" * reasons) if template else None,
            vocabulary="bytes",
            cache_identity=_identity(self.options),
        )
        self._markers = markers_in(self.info.template_text)

    def encode(
        self,
        prompt: Prompt,
        *,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: tuple[Tool, ...] = (),
    ) -> tuple[int, ...]:
        """Return one id for each byte. A conversation has a line for each message: role, then content."""
        self._start_again()
        return self._checked(self._encode(prompt, continue_final_message))

    def _checked(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 <= token_id < self.info.n_vocab for token_id in token_ids):
            raise PromptError("a token id is not in the vocabulary")
        return token_ids

    def _encode(self, prompt: Prompt, continued: bool = True) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(byte + 1 for byte in whole_characters(prompt).encode())
        ids: list[int] = []
        for item in prompt:
            if isinstance(item, Message):
                if self.info.template is None:
                    raise PromptError("the model has no chat template: it only completes text")
                ids += self._encode(f"{item.role}: ")
                ids += self._reply_ids(item, item is prompt[-1] and continued)
                ids += self._encode("\n")
            else:
                ids.append(item)
        if ends_with_reply(prompt) and not continued:
            ids += self._encode("assistant: ")
        return tuple(ids)

    def _reply_ids(self, message: Message, continued: bool) -> tuple[int, ...]:
        if self._markers is None or not message.reasoning_content:
            return message.token_ids or self._encode(message.content)
        if not continued:
            return self._encode(message.content)
        end = f"</think>{message.content}" if message.content else ""
        return message.token_ids or self._encode(f"<think>{message.reasoning_content}{end}")

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        """See TextEngine."""
        if self._closed:
            raise EngineError("the engine is closed")
        if request.id in self._cancelled:
            raise EngineError(f"a request with the id {request.id!r} is already running")
        self._start_again()
        self.requests.append(request)
        self._cancelled[request.id] = False
        return self._generate(request)

    def start(self, request: Request, deliver: Deliver) -> Ticket:
        """See TextEngine: each request runs in a thread of its own."""
        stream = self.submit(request)

        def run() -> None:
            try:
                for event in stream:
                    deliver(event)
                deliver(None)
            except BaseException as error:  # noqa: BLE001 - the receiver's to raise
                deliver(error)

        threading.Thread(target=run, name=f"fake-{request.id}", daemon=True).start()
        return _Ticket(self, request.id)

    def _generate(self, request: Request) -> Iterator[TokenEvent]:
        try:
            prompt = self._checked(self._encode(request.prompt, request.continue_final_message))
            if len(prompt) >= self.info.n_context:
                raise too_long(f"{len(prompt):,} tokens", self.info.n_context, self.info.n_context_trained)
            text = _bytes_of(prompt).decode("utf-8", "replace").rstrip("\n")
            answer = (next(self._replies) if self._replies else self._reply(text)).encode()
            for index in range(request.n):
                for event in self._tokens(request, prompt, answer):
                    yield msgspec.structs.replace(event, index=index)
        finally:
            self._cancelled.pop(request.id, None)

    def _tokens(self, request: Request, prompt: tuple[int, ...], answer: bytes) -> Iterator[TokenEvent]:
        parser = ReasoningParser()
        if self._markers is not None:
            parser = ReasoningParser(
                self._markers, request.start, _bytes_of(prompt).decode("utf-8", "replace")
            )
            answer = _within_budget(answer, request.reasoning_budget)
        tools = None if request.tools is None else ToolParser(HERMES, request.tools)
        stream = TextStream(request.stop, parser, tools)
        stream.begin_after(_bytes_of(prompt[-4:]))
        n_cached = n_common(self._cached, prompt)
        room = None if request.context_shift else self.info.n_context - len(prompt)
        limit = min((each for each in (room, request.max_tokens) if each is not None), default=None)
        held = list(prompt)
        ended_by: int | None = END
        reason = FinishReason.STOP
        done = n_reasoning = 0
        if request.echo:
            scored = tuple(_alternatives(request, token_id - 1) for token_id in prompt)
            text = request.prompt if isinstance(request.prompt, str) else _bytes_of(prompt).decode()
            yield TokenEvent(request.id, text, 0.0, prompt_tokens=scored if request.scores_prompt else ())
        for byte in answer:
            self._gate(done)
            if self._killed:
                raise EngineKilledError("the engine was killed because it did not answer")
            if self._cancelled[request.id]:
                reason, ended_by = FinishReason.CANCELLED, None
                break
            if done == limit:
                full = limit != request.max_tokens
                reason, ended_by = FinishReason.CONTEXT_FULL if full else FinishReason.LENGTH, None
                break
            dropped, dropped_from = self._make_room(request, held)
            held.append(byte + 1)
            done += 1
            in_reasoning = parser.in_reasoning
            parts = stream.feed(bytes([byte]))
            n_reasoning += in_reasoning
            yield TokenEvent(
                request.id,
                parts.answer,
                float(done),
                byte + 1,
                logprob=0.0,
                alternatives=_alternatives(request, byte),
                dropped=dropped,
                dropped_from=dropped_from,
                held=stream.holds,
                reasoning=parts.reasoning,
                in_reasoning=in_reasoning,
                calls=parts.calls,
            )
            if stream.stopped:
                ended_by = None
                break
        self._cached = tuple(held)
        parts = stream.finish(cut=reason is not FinishReason.STOP)
        yield TokenEvent(
            request.id,
            parts.answer,
            float(done),
            ended_by,
            logprob=None if ended_by is None else 0.0,
            alternatives=()
            if ended_by is None or not request.logprobs
            else (_END_SCORE,) * (1 + request.top_logprobs),
            finish_reason=reason,
            usage=Usage(len(prompt), n_cached, done, 0.0, float(done), request.sampling.seed, n_reasoning),
            reasoning=parts.reasoning,
            calls=parts.calls,
            stop=stream.stopped_by,
        )

    def _make_room(self, request: Request, held: list[int]) -> tuple[int, int]:
        """Return how many tokens a context shift drops, and from which index."""
        if len(held) <= self.info.n_context:
            return 0, 0
        start = max(1, request.n_keep)
        count = (self.info.n_context - start) // 2
        del held[start : start + count]
        return count, start

    def cancel(self, request_id: str) -> None:
        """See TextEngine."""
        if request_id in self._cancelled:
            self._cancelled[request_id] = True

    def cancel_all(self) -> None:
        """See ReloadableEngine. There are no loads to stop."""
        self._cancelled = dict.fromkeys(self._cancelled, True)

    def decode(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """See TextEngine."""
        self._start_again()
        ids = self._checked(tuple(token_ids))
        return tuple("<end>" if token_id == END else _text(token_id - 1) for token_id in ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """See TextEngine."""
        self._start_again()
        return _bytes_of(self._checked(tuple(token_ids))).decode("utf-8", "replace")

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        """See TextEngine. Writes a JSON file with the ids and the identity of the cache."""
        count = 0 if self._cancelled or self._killed else n_common(self._cached, token_ids)
        if count <= start:
            return 0
        path.write_text(json.dumps([self.info.cache_identity, start, token_ids[:count]]))
        self.saved.append((path, count))
        return count

    def load_cache(self, path: Path, token_ids: tuple[int, ...]) -> int:
        """See TextEngine."""
        self._start_again()
        try:
            identity, start, stored = json.loads(path.read_text())
        except (OSError, ValueError, TypeError):
            return 0
        held, count = n_common(self._cached, token_ids), n_common(tuple(stored), token_ids)
        if identity != self.info.cache_identity or held < start or count <= held:
            return held
        self._cached = token_ids[:count]
        self.loaded.append((path, count))
        return count

    def set_observers(self, options: tuple[ObserverOptions, ...]) -> None:
        """See TextEngine."""
        self._start_again()
        if self._cancelled:
            raise EngineError("observers cannot be changed while requests are running")
        if self.failures:
            raise self.failures.pop(0)
        self.observers.append(options)
        self.options = replace(self.options, observers=options)
        self._observed = frozenset(option.name for option in options)

    def log(self) -> tuple[str, ...]:
        """See TextEngine: there is no log."""
        return ()

    def observe(self, name: str) -> Observation:
        """See TextEngine."""
        known = self.observations if self._observed is None else self._observed
        if name not in known:
            raise EngineError(f"no observer {name!r} was loaded")
        return self.observations.get(name, {})

    def reload(
        self,
        options: ModelOptions,
        listen: progress.Listener = progress.ignore,
        stop: threading.Event | None = None,
    ) -> None:
        """See ReloadableEngine. Only the context length and the number of experts change."""
        self.reloads.append(options)
        self._cached = ()
        listen(progress.Started("loading fake.gguf", 1))
        listen(progress.Advanced(1))
        listen(progress.Finished("loading"))
        if self.failures:
            raise self.failures.pop(0)
        self._killed = False
        self.options = options
        self._observed = frozenset(option.name for option in options.observers)
        self.info = replace(
            self.info,
            n_context=options.n_context or self.info.n_context,
            n_experts_per_token=options.n_experts_per_token or 6,
            cache_identity=_identity(options),
        )

    def kill(self) -> None:
        """See ReloadableEngine."""
        self.kills += 1
        self._killed = True
        self._cached = ()

    def _start_again(self) -> None:
        if self._killed:
            self._killed = False
            self.crashes += 1

    @property
    def pid(self) -> int:
        """See ReloadableEngine: this process."""
        return os.getpid()

    @property
    def alive(self) -> bool:
        """See ReloadableEngine."""
        return not self._closed and not self._killed

    def close(self) -> None:
        """See TextEngine."""
        self._closed = True
        self.cancel_all()


@dataclass(frozen=True, slots=True)
class _Ticket:
    engine: FakeEngine
    request_id: str

    def cancel(self) -> None:
        self.engine.cancel(self.request_id)


def _alternatives(request: Request, byte: int) -> tuple[TokenLogprob, ...]:
    """Return the token with probability 1 and the tokens before it in the alphabet with probability 0."""
    if not request.logprobs:
        return ()
    others = [max(byte - distance, 0) for distance in range(request.top_logprobs)]
    return tuple(
        TokenLogprob(each + 1, _text(each), 0.0 if each == byte else -math.inf) for each in (byte, *others)
    )


def _within_budget(answer: bytes, budget: int | None) -> bytes:
    head, close, rest = answer.partition(b"</think>")
    if budget is None or not close:
        return answer
    return head[: len("<think>") + budget] + close + rest if budget else rest


def _bytes_of(token_ids: Sequence[int]) -> bytes:
    return bytes(token_id - 1 for token_id in token_ids if token_id != END)


def _text(byte: int) -> str:
    return bytes([byte]).decode("utf-8", "replace")


def _identity(options: ModelOptions) -> str:
    """Return a digest of some of the options that the real cache identity depends on."""
    return f"{options.path} {options.n_experts_per_token} {options.cache_type_k} {options.cache_type_v}"
