"""Damaged frames between the engine's process and its client, either way: a refusal or an end, in words."""

from __future__ import annotations

import itertools
import json
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import hosted
from support.fake_engine import FakeEngine
from support.models import tiny_model
from support.mutations import Outcome, damaged_bytes, damaged_json, try_mutants

from dsmoe_local.base.progress import Advanced, Started
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineCrashError, EngineError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.process import child, wire
from dsmoe_local.engine.process.client import NATIVE, EngineClient
from dsmoe_local.engine.process.log import LogKeeper
from dsmoe_local.engine.process.spawn import spawn_engine
from dsmoe_local.engine.types import (
    Message,
    ModelOptions,
    ObserverOptions,
    Request,
    SamplingParameters,
    TokenEvent,
)

PATIENCE = 60  # seconds, for what takes less than one unless it hangs
GREEDY = SamplingParameters(temperature=0)
CONTROL = Request("control", "The quick brown fox", GREEDY, max_tokens=6)
FIRST_CONTROL = 10_000_019
NOT_UNDERSTOOD = "a malformed message"


def list_of(*messages: Any) -> list[Any]:
    """As they arrive: of JSON's own types."""
    plain: list[Any] = json.loads(json.dumps(messages))
    return plain


def call(method: str, /, **arguments: object) -> tuple[Any, ...]:
    return "call", 7, method, wire.to_plain(arguments)


REQUESTS = (
    Request("a", "dog", max_tokens=4, stop=("x", "yz"), n=2),
    Request("b", (5, 6, 7), SamplingParameters(seed=3), 3, logit_bias=((5, 1.5), (6, -100.0))),
    Request(
        "c", (Message("user", "Hi"), Message("assistant", "Ho", (5, 6)), Message("user", "?")), GREEDY, 3
    ),
    Request("d", "x", max_tokens=3, logprobs=True, top_logprobs=2, grammar='root ::= "a"+'),
    Request("e", "x", max_tokens=3, json_schema='{"type": "integer"}'),
    Request("f", tuple(range(5, 60)), GREEDY, 4, context_shift=True, n_keep=3, score_from=2),
)
MESSAGES: list[Any] = list_of(
    *(("start", 7, wire.to_plain(request)) for request in REQUESTS * 3),
    call("encode", prompt=REQUESTS[2].prompt, continue_final_message=False),
    call("encode", prompt="dog", continue_final_message=False),
    call("decode", token_ids=(5, 6, 7)),
    call("load_cache", path="no such file", token_ids=(5, 6, 7)),
    call("observe", name="routing"),
    call("cancel", request_id="control"),  # not in the table
    call("set_observers", options=(ObserverOptions("routing", (("trace", 3),)),)),
)


def frame(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


def damaged_message(rng: random.Random) -> bytes:
    """Of nine in ten only what is asked for is damaged: it must be refused, and the process live on."""
    *head, asked = rng.choice(MESSAGES)
    if rng.random() < 0.1:
        return damaged_json([*head, asked], rng)
    while True:
        with suppress(ValueError, RecursionError):
            return json.dumps([*head, json.loads(damaged_json(asked, rng))]).encode()


class RawHost:
    """The engine's process, and our end of its socket."""

    def __init__(self, factory: str, options: ModelOptions) -> None:
        self.process, self.channel = spawn_engine()
        # Read all the time: a full pipe would halt the process.
        self._log = LogKeeper(None)
        self._keeper = threading.Thread(target=self._log.read, args=(self.process.stdout,), daemon=True)
        self._keeper.start()
        self.channel.settimeout(PATIENCE)
        self.source = self.channel.makefile("rb")
        self.channel.sendall(wire.pack(("load", factory, wire.to_plain(options))))
        while (message := self.receive())[0] != "loaded":
            assert message[0] == "progress", message

    def receive(self) -> list[Any]:
        message = wire.receive(self.source)
        if message is None:
            raise EOFError
        return message

    def reply(self, number: int, request: Request) -> list[TokenEvent]:
        """All events of a request. EOFError if the process ends before."""
        self.channel.sendall(wire.pack(("start", number, wire.to_plain(request))))
        events: list[TokenEvent] = []
        while True:
            kind, *arguments = self.receive()
            for event in arguments[0] if kind == "events" else ():
                if event[0] != number:
                    continue
                if len(event) == wire.END_LENGTH:
                    assert event[1] is None, event
                    return events
                events.append(wire.event_from_plain(request.id, event))

    def end(self) -> tuple[int, str]:
        """Close the socket; the exit status, and the log."""
        self.source.close()
        self.channel.close()
        status = self.process.wait(PATIENCE)
        self._keeper.join(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status, "\n".join(self._log.lines())


@dataclass(slots=True)
class Counts:
    """How many frames were answered or passed over, and how many ended the process."""

    survived: int = 0
    ended: int = 0


def told(events: Sequence[TokenEvent]) -> list[Any]:
    return [(event.text, event.token_id, event.finish_reason) for event in events]


def throw_frames(factory: str, options: ModelOptions, engine: TextEngine, n: int, seed: int) -> Counts:
    """Damaged frames to an engine's process, each with a request behind it whose reply must be as ever."""
    expected = told(list(engine.submit(CONTROL)))
    engine.close()
    counts, numbers = Counts(), itertools.count(FIRST_CONTROL)
    host = RawHost(factory, options)
    try:
        for number in range(n):
            name = f"{seed}:{number}"
            rng = random.Random(name)
            body = damaged_message(rng)
            try:
                host.channel.sendall(frame(body))
                assert told(host.reply(next(numbers), CONTROL)) == expected, (name, body)
                counts.survived += 1
            except TimeoutError:
                pytest.fail(f"nothing is answered behind {name}: {body!r}")
            except (EOFError, ConnectionError):
                status, log = host.end()
                assert status == 1, (name, body, status, log[-2000:])
                assert NOT_UNDERSTOOD in log, (name, body, log[-2000:])
                counts.ended += 1
                host = RawHost(factory, options)
    finally:
        host.process.kill()
        host.end()
    return counts


def fake_options() -> ModelOptions:
    return ModelOptions(Path("fake.gguf"))


def real_options() -> ModelOptions:
    return ModelOptions(
        tiny_model(),
        n_threads=1,
        n_parallel=4,
        n_context=1024,
        deterministic=True,
        chat_template="deepseek-moe",
        observers=(ObserverOptions("routing"), ObserverOptions("logprobs")),
    )


def test_damaged_frames_to_the_process() -> None:
    """Guards: a frame that ends the process without a word, or that it waits for ever behind."""
    counts = throw_frames(hosted.FAKE, fake_options(), FakeEngine(), 100, 1)
    assert counts.survived > counts.ended > 0


def test_damaged_frames_to_a_real_engine() -> None:
    """Guards: a field of a wrong type, or out of range, that ends native code and every request in it."""
    options = real_options()
    counts = throw_frames(NATIVE, options, Engine.load(options), 50, 2)
    assert counts.survived > counts.ended > 0


@pytest.mark.soak
def test_soak_damaged_frames_to_the_process() -> None:
    """The same, thousands of times."""
    counts = throw_frames(hosted.FAKE, fake_options(), FakeEngine(), 4_000, 3)
    sys.stderr.write(f"\nframes to a fake engine: {counts}\n")
    options = real_options()
    counts = throw_frames(NATIVE, options, Engine.load(options), 2_000, 4)
    sys.stderr.write(f"frames to a real engine: {counts}\n")


# --- the other way ---


Change = Callable[[int, bytes], bytes]


class Peer:
    """In the place of the engine's process: says what a fake engine does, in frames that `change` makes of
    their number and their content. It ends after `seconds` without a message.
    """

    def __init__(self, change: Change, seconds: float) -> None:
        self._change = change
        self._seconds = seconds
        self._n_sent = 0
        self._engine = FakeEngine(observations={"routing": {"layers": [1, 2.5, None]}})
        # It is there, and ends when it is killed, as the real one.
        self.process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ours, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._theirs, self._theirs.makefile("rb") as source:
            self._theirs.settimeout(self._seconds)
            try:
                while (message := wire.receive(source)) is not None and message[0] != "close":
                    for answer in self._answers(*message):
                        self._theirs.sendall(self._change(self._n_sent, wire.pack(answer)[4:]))
                        self._n_sent += 1
            except OSError:
                return  # the client waits for what was damaged: the process ends

    def _answers(self, kind: str, number: Any, *arguments: Any) -> Iterator[Any]:
        if kind == "load":
            yield "progress", wire.progress_to_plain(Started("loading", 3))
            yield "progress", wire.progress_to_plain(Advanced(3))
            yield "loaded", wire.to_plain(self._engine.info)
        elif kind == "start":
            request = wire.from_plain(Request, arguments[0])
            events = [wire.event_to_plain(number, event) for event in self._engine.submit(request)]
            yield "events", events[:2]
            yield "events", [*events[2:], (number, None)]
        elif arguments[0] == "encode":
            yield "answer", number, [5, 6]
        elif arguments[0] == "observe":
            yield "answer", number, self._engine.observe("routing")
        elif kind == "call":
            yield "refusal", number, wire.error_to_plain(ValueError("not mine"))

    def end(self) -> None:
        """Everything of it is gone."""
        self.process.kill()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE)


def damaged_once(rng: random.Random) -> Change:
    """Damages one of the frames."""
    victim = rng.randrange(8)

    def change(number: int, body: bytes) -> bytes:
        if number != victim:
            return frame(body)
        if rng.random() < 0.8:
            body = damaged_json(json.loads(body), rng)
        return frame(body) if rng.random() < 0.9 else damaged_bytes(frame(body), rng)

    return change


def listen(change: Change, monkeypatch: pytest.MonkeyPatch, seconds: float = PATIENCE) -> None:
    """All that a client asks, and the types of what it is told. Raises what it does.

    `seconds`: see Peer. A client that waits for the rest of a damaged frame waits that long.
    """
    peer = Peer(change, seconds)
    monkeypatch.setattr(child, "_EXIT_SECONDS", 0.01)
    monkeypatch.setattr(child, "spawn_engine", lambda: (peer.process, peer.ours))
    try:
        with EngineClient.load(fake_options()) as client:
            assert client.info.n_context
            for event in client.submit(Request("r", "abcdef", GREEDY, max_tokens=4, logprobs=True)):
                assert isinstance(event.text, str)
            assert all(type(token_id) is int for token_id in client.encode("x"))
            assert isinstance(client.observe("routing"), dict)
            with pytest.raises(EngineError):
                client.decode((5,))
    finally:
        peer.end()


@pytest.mark.parametrize(
    ("number", "body"),
    [
        (0, b'["progress",[1,2,3]]'),
        (1, b'["progress",["Note",[5]]]'),
        (4, b'["events",[[1,true]]]'),
        (4, b'["events",[[1,["PromptError",1,"","",1]]]]'),
        (4, b'["events",[[9,"x",0.5,1]]]'),
        (4, b'["events",[[1,5,0.5,1]]]'),
        (5, b'["answer",2,["x"]]'),
        (6, b'["answer",3,null]'),
    ],
)
def test_what_a_client_cannot_understand(number: int, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a load, a stream or a call that never ends, or ends with an unexpected error, after one of its
    frames is damaged.
    """
    with pytest.raises(EngineCrashError, match="malformed message"):
        listen(lambda sent, content: frame(body if sent == number else content), monkeypatch)
    listen(lambda _, content: frame(content), monkeypatch)


def hear_frames(monkeypatch: pytest.MonkeyPatch, n: int, seed: int) -> Outcome:
    """Damaged frames from an engine's process: calls and streams end as they should, or with an error."""
    return try_mutants(lambda rng: listen(damaged_once(rng), monkeypatch, 0.3), n, seed)


def test_damaged_frames_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a stream or a call that waits for ever, or ends with an unexpected error, after the process has
    sent a damaged frame.
    """
    hear_frames(monkeypatch, 200, 5)


@pytest.mark.soak
def test_soak_damaged_frames_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, thousands of times."""
    sys.stderr.write(f"\nframes to the client: {hear_frames(monkeypatch, 2_000, 6)}\n")
