"""The engine under measurement, as chat and batch hold it: requests in, events out, timed by the caller.

Greedy. Tokens that would end a reply are banned, so that all contenders generate the same number of tokens.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Prompt, Request, SamplingParameters, TokenEvent, Usage

GREEDY = SamplingParameters(temperature=0)
_BAN = -1000.0


def load_in_process(options: ModelOptions) -> TextEngine:
    """Load the engine in this process."""
    # The import costs memory, which the client does not need.
    from dsmoe_local.engine.engine import Engine

    return Engine.load(options)


LOADERS: dict[str, Callable[[ModelOptions], TextEngine]] = {
    "client": EngineClient.load,
    "in-process": load_in_process,
}
"""The engine in a child process, as the commands have it, or in this process."""


@dataclass(slots=True)
class Reply:
    """A reply, and when each of its tokens arrived, in seconds of the caller's clock."""

    started: float
    arrivals: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    usage: Usage | None = None

    @property
    def first_token_seconds(self) -> float:
        """The seconds from the request to its first token."""
        return self.arrivals[0] - self.started

    @property
    def decode_rate(self) -> float:
        """The tokens per second after the first token."""
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])


def steady_rate(replies: Sequence[Reply]) -> float:
    """Return the tokens per second from the begin of the last reply to the end of the first one."""
    begin = max(reply.arrivals[0] for reply in replies)
    end = min(reply.arrivals[-1] for reply in replies)
    if end <= begin:
        raise SystemExit("the replies were not decoded together: more new tokens are needed")
    count = sum(begin < arrival <= end for reply in replies for arrival in reply.arrivals)
    return count / (end - begin)


class Ours:
    """A loaded engine. `ends` are the ids that would end a reply, `kind` is one of LOADERS."""

    def __init__(self, options: ModelOptions, ends: Sequence[int], kind: str = "client") -> None:
        self.engine = LOADERS[kind](options)
        self._bans = tuple((token_id, _BAN) for token_id in ends)
        self._numbers = itertools.count()

    def reply(self, prompt: Prompt, n_new: int) -> Reply:
        """Return one reply of `n_new` tokens."""
        return self.replies([prompt], n_new, 1)[0]

    def replies(
        self, prompts: Sequence[Prompt], n_new: int, n_clients: int, *, exact: bool = True
    ) -> list[Reply]:
        """Return replies, at most `n_clients` at a time. `exact`: SystemExit if one is shorter."""
        free = threading.Semaphore(n_clients)
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        replies = []
        for prompt in prompts:
            free.acquire()
            reply = Reply(time.perf_counter())
            name = f"benchmark-{next(self._numbers)}"
            request = Request(name, prompt, GREEDY, max_tokens=n_new, logit_bias=self._bans)
            self.engine.start(request, _collector(reply, free, ended))
            replies.append(reply)
        for _ in prompts:
            error = ended.get()
            if error is not None:
                raise error
        for reply in replies:
            if exact and len(reply.arrivals) != n_new:
                raise SystemExit(f"a reply has {len(reply.arrivals)} tokens, {n_new} were asked for")
        return replies

    def decode_rate(self, prompt: Prompt, n_new: int) -> float:
        """Return the tokens per second of one stream."""
        return self.reply(prompt, n_new).decode_rate

    def steady_rate(self, prompts: Sequence[Prompt], n_new: int) -> float:
        """Return the tokens per second while all prompts are being decoded."""
        return steady_rate(self.replies(prompts, n_new, len(prompts)))

    def throughput(self, prompts: Sequence[Prompt], n_new: int, n_clients: int) -> float:
        """Return the new tokens per second from the first request to the last reply, with prompts."""
        started = time.perf_counter()
        self.replies(prompts, n_new, n_clients)
        return len(prompts) * n_new / (time.perf_counter() - started)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()


def _collector(
    reply: Reply, free: threading.Semaphore, ended: queue.SimpleQueue[BaseException | None]
) -> Callable[[TokenEvent | BaseException | None], None]:
    """Return what takes the events of a reply, in the engine's own thread."""

    def take(event: TokenEvent | BaseException | None) -> None:
        if not isinstance(event, TokenEvent):
            ended.put(event)
            free.release()
        elif event.finish_reason is not None:
            reply.usage = event.usage
            reply.pieces.append(event.text)
        elif event.token_id is not None:
            reply.arrivals.append(time.perf_counter())
            reply.token_ids.append(event.token_id)
            reply.pieces.append(event.text)

    return take
