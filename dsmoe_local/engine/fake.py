"""A fake engine with the real one's interface, for tests of what is built on it. No model, no native code."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_local.engine.errors import EngineError, PromptError
from dsmoe_local.engine.stream import TextStream
from dsmoe_local.engine.types import (
    Deliver,
    FinishReason,
    Message,
    ModelInfo,
    Observation,
    Prompt,
    Request,
    Ticket,
    TokenEvent,
    TokenLogprob,
    Usage,
)

END = 0  # the id of the token that ends a reply; a byte b has the id b + 1


def echo(prompt: str) -> str:
    """The default reply: the prompt's last line."""
    return prompt.rsplit("\n", 1)[-1]


class FakeEngine:
    """Answers with `reply(prompt text)`, one byte a token, so that characters straddle tokens.

    `replies` instead are given in turn. `template` False makes a base model. `gate`, when given, is called
    before each token: a test can wait in it, cancel, or raise. `requests` collects what was submitted.
    `observations` is what its observers have seen, by their names.
    """

    def __init__(
        self,
        reply: Callable[[str], str] = echo,
        *,
        replies: Sequence[str] | None = None,
        n_context: int = 4096,
        n_parallel: int = 1,
        template: bool = True,
        gate: Callable[[int], None] = lambda index: None,
        observations: Mapping[str, Observation] | None = None,
    ) -> None:
        self._reply = reply
        self._replies = None if replies is None else itertools.cycle(replies)
        self._gate = gate
        self._observations = dict(observations or {})
        self._cached: tuple[int, ...] = ()
        self._cancelled: dict[str, bool] = {}
        self._closed = False
        self.requests: list[Request] = []
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
            n_threads=1,
            template="fake" if template else None,
            n_parallel=n_parallel,
        )

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """One id a byte; a conversation is its contents on lines, each after its role."""
        if isinstance(prompt, str):
            return tuple(byte + 1 for byte in prompt.encode())
        ids: list[int] = []
        for item in prompt:
            if isinstance(item, Message):
                if self.info.template is None:
                    raise PromptError("the model has no chat template: it only completes text")
                ids += self.encode(f"{item.role}: ")
                ids += item.token_ids or self.encode(item.content)
                ids += self.encode("\n")
            else:
                ids.append(item)
        return tuple(ids)

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        """See TextEngine."""
        if self._closed:
            raise EngineError("the engine is closed")
        if request.id in self._cancelled:
            raise EngineError(f"a request with the id {request.id!r} is already running")
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
            prompt = self.encode(request.prompt)
            room = self.info.n_context - len(prompt)
            if room < 1:
                raise PromptError(
                    f"the prompt has {len(prompt)} tokens, the context holds {self.info.n_context}"
                )
            text = bytes(token_id - 1 for token_id in prompt).decode("utf-8", "replace").rstrip("\n")
            answer = (next(self._replies) if self._replies else self._reply(text)).encode()
            for index in range(request.n):
                limit = min(room, request.max_tokens or room)
                for event in self._tokens(request, prompt, answer, limit):
                    yield replace(event, index=index)
        finally:
            self._cancelled.pop(request.id, None)

    def _tokens(
        self, request: Request, prompt: tuple[int, ...], answer: bytes, limit: int
    ) -> Iterator[TokenEvent]:
        stream = TextStream(request.stop)
        stream.begin_after(bytes(token_id - 1 for token_id in prompt[-4:]))
        n_cached = _common(self._cached, prompt)
        ended_by: int | None = END
        reason = FinishReason.STOP
        done = 0
        for byte in answer:
            self._gate(done)
            if self._cancelled[request.id]:
                reason, ended_by = FinishReason.CANCELLED, None
                break
            if done == limit:
                full = limit != request.max_tokens
                reason, ended_by = FinishReason.CONTEXT_FULL if full else FinishReason.LENGTH, None
                break
            done += 1
            yield TokenEvent(
                request.id,
                stream.feed(bytes([byte])),
                float(done),
                byte + 1,
                logprob=0.0,
                alternatives=_alternatives(request, byte),
            )
            if stream.stopped:
                ended_by = None
                break
        self._cached = (*prompt, *(byte + 1 for byte in answer[:done]))
        yield TokenEvent(
            request.id,
            stream.finish(cut=reason is not FinishReason.STOP),
            float(done),
            ended_by,
            finish_reason=reason,
            usage=Usage(len(prompt), n_cached, done, 0.0, float(done), request.sampling.seed),
        )

    def cancel(self, request_id: str) -> None:
        """See TextEngine."""
        if request_id in self._cancelled:
            self._cancelled[request_id] = True

    def log(self) -> tuple[str, ...]:
        """See TextEngine: there is no log."""
        return ()

    def observe(self, name: str) -> Observation:
        """See TextEngine."""
        if name not in self._observations:
            raise EngineError(f"no observer {name!r} was loaded")
        return self._observations[name]

    def close(self) -> None:
        """See TextEngine."""
        self._closed = True
        self._cancelled = dict.fromkeys(self._cancelled, True)


@dataclass(frozen=True, slots=True)
class _Ticket:
    engine: FakeEngine
    request_id: str

    def cancel(self) -> None:
        self.engine.cancel(self.request_id)


def _alternatives(request: Request, byte: int) -> tuple[TokenLogprob, ...]:
    """The token, which is certain, and the ones before it in the alphabet, which are not possible."""
    if not request.logprobs:
        return ()
    others = [max(byte - distance, 0) for distance in range(request.top_logprobs)]
    return tuple(
        TokenLogprob(each + 1, bytes([each]).decode("utf-8", "replace"), 0.0 if each == byte else -math.inf)
        for each in (byte, *others)
    )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
