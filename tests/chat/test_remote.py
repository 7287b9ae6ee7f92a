"""A chat with a model on a server: our own server, and servers that misbehave."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from support.bad_server import Answer, bad_server, chunk, page, stream
from support.configured import chat, complaint
from support.fake_engine import FakeEngine
from support.serving import serving

from benchmarks.support.tools import free_port
from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.one_shot import answer
from dsmoe_local.chat.remote.connection import Server, ServerError
from dsmoe_local.chat.remote.engine import RemoteEngine
from dsmoe_local.chat.settings import ChatSettings
from dsmoe_local.engine.errors import ContextLengthError, EngineError
from dsmoe_local.engine.types import FinishReason, SamplingParameters, TokenEvent, Tool, Tools

DONE = b"data: [DONE]\n\n"
STOP = chunk(finish_reason="stop")
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}\n\n'


def talk(url: str, settings: ChatSettings | None = None, model: str | None = None) -> Conversation:
    """Return a conversation with the model of a server."""
    return Conversation(RemoteEngine(Server.at(url), model), settings or ChatSettings())


def said(conversation: Conversation) -> str:
    """Return the last turn."""
    return conversation.turns[-1].content


def test_our_own_server() -> None:
    """Guards: a conversation, its system text or a reply that the server does not get or that is not kept."""
    engine = FakeEngine(reply=lambda prompt: prompt, n_context=512)
    with serving(engine) as server:
        conversation = talk(server.url)
        conversation.set_system("Be brief.")
        assert (conversation.engine.info.name, conversation.engine.info.n_context) == ("fake", 512)
        list(conversation.send("Héllo"))
        assert said(conversation) == "system: Be brief.\nuser: Héllo"
        list(conversation.send("Go on"))
        messages = [(item.role, item.content) for item in engine.requests[-1].prompt]  # type: ignore[union-attr]
        assert messages[0] == ("system", "Be brief.")
        assert [role for role, _ in messages[1:]] == ["user", "assistant", "user"]
        usage = conversation.usage
        assert usage is not None
        assert conversation.n_used == usage.prompt_tokens + usage.completion_tokens
        assert conversation.finish_reason is FinishReason.STOP


def test_settings_are_sent() -> None:
    """Guards: a temperature that the server never hears of; defaults of ours in place of the server's."""
    engine = FakeEngine(replies=["abcdef"])
    sampling = SamplingParameters(temperature=0.25, top_k=7, seed=3)
    with serving(engine) as server:
        conversation = talk(server.url, ChatSettings(sampling, max_tokens=4, stop=("d",)))
        list(conversation.send("x"))
        assert said(conversation) == "abc"
        request = engine.requests[-1]
        assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.25, 7, 3)
        assert (request.max_tokens, request.stop) == (4, ("d",))
        list(talk(server.url).send("x"))
    with bad_server(stream(STOP, DONE)) as bad:
        list(talk(bad.url).send("x"))
        assert bad.bodies[0].keys() == {"model", "messages", "stream", "stream_options"}


def test_a_cut_reply_is_continued() -> None:
    """Guards: /continue that begins a new reply."""
    engine = FakeEngine(replies=["abcdef"])
    with serving(engine) as server:
        conversation = talk(server.url, ChatSettings(max_tokens=3))
        list(conversation.send("x"))
        assert conversation.finish_reason is FinishReason.LENGTH
        list(conversation.continue_reply())
        assert said(conversation) == "abcabc"
        assert engine.requests[-1].continue_final_message


def test_reasoning() -> None:
    """Guards: reasoning in the answer, or sent back to the server."""
    parts = (
        b'data: {"choices": [{"index": 0, "delta": {"reasoning_content": "Hm"}}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {"reasoning": "m."}}]}\n\n',
    )
    with bad_server(stream(*parts, chunk("Yes"), STOP, USAGE, DONE)) as server:
        conversation = talk(server.url)
        list(conversation.send("x"))
        last = conversation.turns[-1]
        assert (last.content, last.reasoning) == ("Yes", "Hmm.")
        list(conversation.send("y"))
        assert server.bodies[-1]["messages"][1] == {"role": "assistant", "content": "Yes"}


def test_tools_and_schemas() -> None:
    """Guards: tools or a schema that only a local model gets."""
    engine = FakeEngine(replies=['<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'])
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
    with serving(engine) as server:
        conversation = talk(server.url)
        conversation.tools = Tools((Tool("f", "does", schema),))
        list(conversation.send("x"))
        assert said(conversation).startswith("```tool_call\nf {")
        conversation.tools, conversation.json_schema = None, schema
        list(conversation.send("y"))
        assert json.loads(engine.requests[-1].json_schema or "") == json.loads(schema)


WHOLE = b'{"choices": [{"index": 0, "message": {"content": "Blue."}, "finish_reason": "stop"}]}'
GOOD: dict[str, Answer] = {
    "no [DONE]": stream(chunk("Blue."), STOP),
    "no finish reason": stream(chunk("Blue."), DONE),
    "text with the finish reason": stream(chunk("Blue.", finish_reason="stop"), DONE),
    "single bytes": stream(*(bytes([byte]) for byte in chunk("Blue.") + STOP + DONE)),
    "all at once": stream(chunk("Bl") + chunk("ue.") + STOP + DONE),
    "CRLF, comments, names": stream(
        b": hi\r\n\r\nevent: x\r\nid: 1\r\n" + chunk("Blue.").replace(b"\n", b"\r\n") + STOP + DONE
    ),
    "data on two lines": stream(
        b'data: {"choices": [{"index": 0,\ndata:"delta": {"content": "Blue."}}]}\n\n', STOP, DONE
    ),
    "other choices": stream(chunk("Red", index=1), chunk("Blue."), STOP, DONE),
    "no stream": page(WHOLE),
    "nulls": stream(
        b'data: {"choices": [{"delta": {"content": null, "tool_calls": null}}], "usage": null}\n\n',
        chunk("Blue."),
        STOP,
        DONE,
    ),
    "more after the end": stream(chunk("Blue."), STOP, DONE, b"garbage\n"),
}


@pytest.mark.parametrize("name", GOOD)
def test_unusual_streams(name: str) -> None:
    """Guards: a reply that is lost because a server is not exactly like ours."""
    with bad_server(GOOD[name]) as server:
        conversation = talk(server.url)
        events = list(conversation.send("x"))
        assert said(conversation) == "Blue."
        ends = [event for event in events if isinstance(event, TokenEvent) and event.finish_reason]
        assert [end.finish_reason for end in ends] == [FinishReason.STOP]


def test_characters_in_pieces() -> None:
    """Guards: a character that is torn where the network cuts."""
    raw = chunk("Grüße 😀") + STOP + DONE
    with bad_server(stream(*(raw[at : at + 3] for at in range(0, len(raw), 3)))) as server:
        conversation = talk(server.url)
        list(conversation.send("x"))
        assert said(conversation) == "Grüße 😀"


LOST = "lost during the reply"
BROKEN: dict[str, tuple[Answer, str]] = {
    "closes early": (stream(chunk("Blu")), LOST),
    "closes within an event": (
        stream(chunk("Blu"), b'data: {"choi'),
        "something else than a chat completion",
    ),
    "closes within a chunked body": (
        lambda connection: connection.sendall(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            + b"%x\r\n%b\r\n" % (len(chunk("Blu")), chunk("Blu"))
            + b"ff\r\nxx"
        ),
        "something else|lost during the reply",
    ),
    "garbage": (stream(chunk("Blu"), b"\x00\xff nonsense\n\n"), "something else than a chat completion"),
    "not JSON": (stream(chunk("Blu"), b"data: {nope}\n\n"), "something else than a chat completion"),
    "a list": (stream(chunk("Blu"), b"data: [1]\n\n"), "something else than a chat completion"),
    "content is no text": (stream(chunk("Blu"), chunk().replace(b"{}", b'{"content": 5}')), "something else"),
    "an error": (
        stream(chunk("Blu"), b'data: {"error": {"message": "the engine was killed"}}\n\n'),
        "the engine was killed",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_replies_that_break(name: str) -> None:
    """Guards: text that is lost with the connection; a reply that ends early and looks complete."""
    answer, expected = BROKEN[name]
    with bad_server(answer) as server:
        conversation = talk(server.url)
        with pytest.raises(ServerError, match=expected):
            list(conversation.send("x"))
        assert said(conversation) == "Blu"
        assert conversation.turns[-1].unfinished
        server.answer = stream(chunk("e."), STOP, DONE)
        list(conversation.continue_reply())
        assert said(conversation) == "Blue."


def refused(status: str, message: str = "no", code: str = "x", *headers: str) -> Answer:
    """Answer with OpenAI's error object."""
    error = {"error": {"message": message, "code": code}}
    return page(json.dumps(error).encode(), status, "application/json", *headers)


REFUSALS: dict[str, tuple[Answer, str]] = {
    "401": (refused("401 Unauthorized", "wrong key"), "refuses the request: wrong key\n.*DSMOE_API_KEY"),
    "404 model": (refused("404 Not Found", "no model x", "model_not_found"), "does not have the model"),
    "404": (page(b"<html>", "404 Not Found", "text/html"), "has no /chat/completions\n.*ends with /v1"),
    "429": (refused("429 Too Many", "full", "x", "retry-after: 7"), "is busy: full\n.*again in 7 seconds"),
    "429 without a time": (refused("429 Too Many"), "try again later"),
    "500": (page(b"\x00", "500 Oh"), "failed with status 500"),
    "503": (refused("503 No", "the engine crashed"), "failed with status 503: the engine crashed"),
    "400": (refused("400 Bad", "top_k: unknown"), "refuses the request with status 400: top_k: unknown"),
    "301": (page(b"", "301 Moved", "text/html", "location: http://b/v1"), "try --server http://b/v1"),
    "not HTTP": (lambda connection: connection.sendall(b"SSH-2.0\r\n"), "sends no answer: what came is not"),
    "nothing": (lambda connection: None, "sends no answer: the connection was closed"),
    "escapes": (refused("400 Bad", "\x1b]0;title\x07"), "status 400"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    """Guards: an error without a cause or a remedy; a message that is lost because a server is busy."""
    answer, expected = REFUSALS[name]
    with bad_server(answer) as server:
        conversation = talk(server.url)
        with pytest.raises(ServerError) as raised:
            list(conversation.send("x"))
        shown = str(raised.value)
        assert "\x1b" not in shown
        assert re.search(expected, shown, re.DOTALL), shown
        assert conversation.unanswered
        server.answer = stream(chunk("Blue."), STOP, DONE)
        list(conversation.continue_reply())
        assert said(conversation) == "Blue."


def test_a_prompt_that_is_too_long() -> None:
    """Guards: a message that can never be answered and stays in the conversation."""
    with serving(FakeEngine(n_context=64)) as server:
        conversation = talk(server.url)
        with pytest.raises(ContextLengthError, match="64 tokens"):
            list(conversation.send("x" * 100))
        assert not conversation.turns


def test_connections_that_fail() -> None:
    """Guards: a traceback in place of a reason."""
    with pytest.raises(ServerError, match="cannot be reached: Connection refused"):
        RemoteEngine(Server.at(f"127.0.0.1:{free_port()}"))
    with pytest.raises(ServerError, match="name of the computer is not known"):
        RemoteEngine(Server.at("http://no.such.host.invalid"))
    with serving(FakeEngine()) as server, pytest.raises(ServerError, match="no secure connection"):
        RemoteEngine(Server.at(server.url.replace("http:", "https:")))


def test_silent_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a chat that waits for ever, or a wrong reason."""
    wait = threading.Event()
    post_chat = Server.post_chat

    @contextmanager
    def impatient_reader(
        server: Server, body: Mapping[str, Any], connected: Callable[[socket.socket], None]
    ) -> Iterator[http.client.HTTPResponse]:
        sockets: list[socket.socket] = []
        with post_chat(server, body, sockets.append) as response:
            sockets[0].settimeout(0.05)
            yield response

    with bad_server(stream(then=wait.wait)) as server:
        conversation = talk(server.url)
        monkeypatch.setattr(Server, "post_chat", impatient_reader)
        with pytest.raises(ServerError, match="lost during the reply: nothing came in time"):
            list(conversation.send("x"))
        monkeypatch.setattr("dsmoe_local.chat.remote.connection.SILENT_SECONDS", 0.05)
        server.models = stream(then=wait.wait)
        with pytest.raises(ServerError, match="sends no answer: nothing came in time"):
            RemoteEngine(Server.at(server.url))
        wait.set()


def test_a_stopped_reply() -> None:
    """Guards: Ctrl-C that waits for the next byte of a slow server; a server that goes on generating."""
    gone = threading.Event()

    def answer(connection: socket.socket) -> None:
        stream(chunk("Blu"))(connection)
        assert connection.recv(1) == b""
        gone.set()

    with bad_server(answer) as server:
        conversation = talk(server.url)
        events = conversation.send("x")
        while not (isinstance(event := next(events), TokenEvent) and event.text):
            pass
        conversation.cancel()
        (end,) = events
        assert isinstance(end, TokenEvent)
        assert end.finish_reason is FinishReason.CANCELLED
        assert said(conversation) == "Blu"
        assert gone.wait(60)


def test_a_server_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a chat that waits after the reply, since the server neither says [DONE] nor hangs up."""
    monkeypatch.setattr("dsmoe_local.chat.remote.engine._LAST_SECONDS", 0.05)
    wait = threading.Event()
    with bad_server(stream(chunk("Blue."), STOP + USAGE, then=wait.wait)) as server:
        conversation = talk(server.url)
        list(conversation.send("x"))
        wait.set()
        assert said(conversation) == "Blue."
        assert conversation.n_used == 9


@pytest.mark.parametrize(
    ("models", "name", "expected"),
    [
        (b'{"data": [{"id": "a"}]}', None, "a"),
        (b'{"data": [{"id": "a"}, {"id": "b", "loaded": true}]}', None, "b"),
        (b'{"data": [{"id": "a"}, {"id": "b"}]}', "b", "b"),
        (b'{"data": [{"id": "llama3:latest"}]}', "llama3", "llama3"),
        (b'{"data": []}', "a", "a"),
        (b'{"data": [{"id": "a"}, {"id": "b"}]}', None, "must be named\nit has: a, b"),
        (b'{"data": [{"id": "a"}]}', "b", "has no model 'b'\nit has: a"),
        (b'{"data": []}', None, "must be named"),
        (b"<html>", None, "something else than JSON\n<html>"),
        (b"[]", None, "no list of models"),
    ],
)
def test_the_model(models: bytes, name: str | None, expected: str) -> None:
    """Guards: another model than the user believes to talk to."""
    with bad_server(stream(STOP, DONE), page(models)) as server:
        if expected in ("a", "b", "llama3"):
            list(talk(server.url, model=name).send("x"))
            assert server.bodies[-1]["model"] == expected
        else:
            with pytest.raises(DsmoeError) as raised:
                talk(server.url, model=name)
            assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost:8080", "http://localhost:8080/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/api/v1/chat/completions", "https://h/api/v1"),
        ("http://[::1]:8080", "http://[::1]:8080/v1"),
        ("ftp://h", ""),
        ("http://", ""),
        ("http://h:99999", ""),
        ("http://h\r\nx: y", ""),
    ],
)
def test_urls(text: str, url: str) -> None:
    """Guards: a header that a URL smuggles in; an address that only works with /v1 at its end."""
    if url:
        assert Server.at(text).url == url
    else:
        with pytest.raises(UsageError, match="not the URL of a server"):
            Server.at(text)


def test_the_key() -> None:
    """Guards: a key that is not sent, or breaks the request."""
    with serving(FakeEngine(), api_key="secret") as server:
        with pytest.raises(ServerError, match=r"refuses the request: .*missing or wrong"):
            talk(server.url)
        with pytest.raises(ServerError, match="refuses the API key"):
            RemoteEngine(Server.at(server.url, "wrong"))
        conversation = Conversation(RemoteEngine(Server.at(server.url, "secret")), ChatSettings())
        list(conversation.send("hi"))
        assert said(conversation) == "user: hi"
    with pytest.raises(UsageError, match="API key has characters"):
        Server.at(server.url, "a\nb")


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.encode("a"),
        lambda engine: engine.decode((1,)),
        lambda engine: engine.detokenize((1,)),
        lambda engine: engine.set_observers(()),
        lambda engine: engine.observe("routing"),
    ],
)
def test_what_needs_the_model_here(call: Callable[[RemoteEngine], object]) -> None:
    """Guards: wrong figures where there are none."""
    with (
        bad_server(stream(STOP)) as server,
        pytest.raises(EngineError, match="on this computer, not on a server"),
    ):
        call(RemoteEngine(Server.at(server.url)))


def test_one_answer() -> None:
    """Guards: -p that differs between a model here and one on a server."""
    with serving(FakeEngine(replies=[" Blue."])) as server:
        out = io.StringIO()
        answer(talk(server.url), "q", out)
        assert out.getvalue() == "Blue.\n"
        out = io.StringIO()
        answer(talk(server.url), "q", out, as_json=True)
        assert json.loads(out.getvalue())["model"] == "fake"


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a local model that is loaded, or looked for, although a server is named."""
    with serving(FakeEngine(replies=["Blue."]), api_key="k") as server:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
        monkeypatch.setenv("DSMOE_API_KEY", "k")
        monkeypatch.setenv("DSMOE_MODEL", "not-there.gguf")
        chat("--server", server.url, "-p", "q")
        assert capsys.readouterr().out == "Blue.\n"
        chat("fake", "--server", server.url, "-p", "q", "-n", "2")
        assert capsys.readouterr().out == "Bl\n"
        arguments = ("chat", "--server", server.url, "-p", "q")
        assert "it has: fake" in complaint(capsys, *arguments, "other")
        for flag in (("-c", "100"), ("--experts",), ("-t", "2")):
            assert "needs the model on this computer" in complaint(capsys, *arguments, *flag)
