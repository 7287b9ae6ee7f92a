"""The end of a server, and the engine's: signals, crashes, and the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from support.configured import complaint
from support.fake_engine import FakeEngine
from support.models import tiny_model
from support.serving import DEFAULTS, HELLO, Gate, serving

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.cli import serve
from dsmoe_local.cli.commands import load_command
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.serve.models import ModelSource, ServedModel
from dsmoe_local.serve.server import listen

START = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


def test_running_replies_are_finished() -> None:
    """Guards: a stream that SIGTERM cuts; a server that goes on taking requests meanwhile."""
    gate = Gate()
    with serving(FakeEngine(gate=gate), grace=60.0) as server:
        with closing(server.connect()) as connection, connection.makefile("rb") as file:
            body = json.dumps({"prompt": "abc", "stream": True}).encode()
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
                + body
            )
            gate.wait()
            server.stop()
            while True:  # until the listening socket is closed
                try:
                    server.connect().close()
                except (ConnectionRefusedError, ConnectionResetError):
                    break
            assert server.log[-1].endswith("waiting up to 60 s for 1 reply; Ctrl-C again ends at once")
            gate.open()
            assert b"[DONE]" in file.read()
        server.thread.join(60)
        assert not server.thread.is_alive()


def test_replies_that_exceed_the_grace() -> None:
    """Guards: a server that waits forever; a client that is not told why its reply ends."""
    gate = Gate()
    engine = FakeEngine(gate=gate)
    cancel = engine.cancel

    def cancel_and_open(request_id: str) -> None:
        cancel(request_id)
        gate.open()

    engine.cancel = cancel_and_open  # type: ignore[method-assign]
    with serving(engine, grace=0.1) as server:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.chat)
            gate.wait()
            server.stop()
            answer = asked.result()
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        server.thread.join(60)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_a_crash_of_the_engine(stream: bool) -> None:
    """Guards: requests that hang after a crash; a server that serves nothing afterwards."""
    options = ModelOptions(tiny_model(), n_parallel=2, n_threads=1, n_context=256)
    with EngineClient.load(options) as engine, serving(engine) as server:
        first = threading.Event()
        killed = engine.pid

        def kill() -> None:
            os.kill(killed, signal.SIGKILL)
            first.set()

        # A reply without an end: the token 1, which is banned, would end it.
        body: dict[str, Any] = {
            "prompt": "a",
            "logit_bias": {"1": -100},
            "stream": stream,
            "context_shift": True,
        }
        start = engine.start

        def start_and_kill(request: Any, deliver: Any) -> Any:
            def watched(event: Any) -> None:
                deliver(event)
                if not first.is_set() and getattr(event, "token_id", None) is not None:
                    kill()

            return start(request, watched)

        engine.start = start_and_kill  # type: ignore[method-assign]
        answer = server.send("/v1/completions", body)
        if stream:
            assert answer.status == 200
            *_, last = answer.body.decode().strip().split("\n\n")
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert answer.status == 503
            error = answer.error
        assert error["code"] == "engine_crash_error"
        assert "SIGKILL" in error["message"]
        assert server.send("/v1/completions", {"prompt": "a", "max_tokens": 3}).status == 200
        assert engine.pid != killed
        assert "dsmoe_engine_crashes 1.0" in server.send("/metrics").body.decode()


def test_the_command(tmp_path: Path) -> None:
    """Guards: wiring that only the command has; an exit status of 143 after a clean end."""
    shutil.copy(tiny_model(), tmp_path / "other.gguf")
    command = [sys.executable, "-c", START, "serve", str(tiny_model()), "--port", "0", "--keep", "2"]
    command.append("--experts")
    with subprocess.Popen(
        [*command, "-t", "1", "--temp", "0"],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
    ) as process:
        assert process.stderr is not None
        url = next(line.split()[1] for line in process.stderr if "http://" in line)
        with OpenAI(base_url=url, api_key="-", timeout=60) as client:
            asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
            first = client.chat.completions.create(**asked)
            assert first.usage is not None
            assert first.usage.completion_tokens == 3
            chunks = list(client.chat.completions.create(**asked, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == first.choices[0].message.content
            assert "other" in [model.id for model in client.models.list()]
            other = client.chat.completions.create(**{**asked, "model": "other"})
            assert (other.model, other.choices[0].message.content) == ("other", text)
            # 3 tokens may be over before the counts are read.
            found = httpx.get(f"{url}/experts/last").json()
            assert "completion_tokens" in found or found["error"]["code"] == "no_experts"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()


def test_only_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: clients that load any model of the computer, although the user wants to serve one."""
    sources: list[ModelSource] = []

    async def end(first: ServedModel, source: ModelSource, *others: object) -> None:
        sources.append(source)

    shutil.copy(tiny_model(), tmp_path / "other.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsmoe_local.serve.server.serve", end)
    for flags in ([], ["--only"]):
        arguments = [str(tiny_model()), "--port", "0", "-t", "1", *flags]
        load_command("serve").main(arguments, standalone_mode=False)
    assert ["other" in source.known() for source in sources] == [True, False]


def test_mistakes_with_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a model that is loaded for minutes before the port turns out to be taken."""
    model = str(tiny_model())
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port} cannot be used" in complaint(capsys, "serve", model, "--port", port)
    assert "0.0.0.0 can be reached" in complaint(capsys, "serve", model, "--host", "0.0.0.0")
    assert "not an address" in complaint(
        capsys, "serve", model, "--host", "no.such.host.invalid", "--insecure"
    )
    with pytest.raises(DsmoeError, match="not an address of this computer"):
        listen("300.1.1.1", 0)


@pytest.mark.parametrize("seconds", ["inf", "nan", "-1", "1e30"])
def test_seconds(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a server that runs for days and fails when it is to end."""
    assert "--grace" in complaint(capsys, "serve", str(tiny_model()), "--grace", seconds)


@pytest.mark.parametrize(("is_first", "template", "n_experts"), [(True, "chatml", 2), (False, None, None)])
def test_options_of_one_model(
    is_first: bool, template: str | None, n_experts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a model with the chat template of another one."""
    loaded: list[ModelOptions] = []

    def load(options: ModelOptions, *arguments: object, **named: object) -> None:
        loaded.append(options)

    monkeypatch.setattr(EngineClient, "load", load)
    monkeypatch.setattr(serve, "_complete", lambda options, n_parallel: options)
    arguments = ["m.gguf", "--chat-template", "chatml", "--active-experts", "2", "-t", "3"]
    values = load_command("serve").make_context("serve", arguments).params
    serve._load(Path("m.gguf"), values, 1, threading.Event(), is_first=is_first)
    (options,) = loaded
    assert (options.chat_template, options.n_experts_per_token) == (template, n_experts)
    assert options.n_threads == 3


def test_prompts_of_harnesses() -> None:
    """Guards: a server that processes echoed prompts token by token."""
    assert serve._complete(ModelOptions(tiny_model(), n_context=256), 1).scores_prompts


def test_the_size_of_a_split_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a model of several files that is loaded beside another one, although it does not fit."""
    paths = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path in paths:
        path.write_bytes(bytes(100))
    for free, fits in ((301, True), (300, False)):
        monkeypatch.setattr("dsmoe_local.engine.load.machine.available_memory", lambda free=free: free)
        assert serve._fits(paths[0]) == fits


def test_the_default_options() -> None:
    """Guards: defaults that are open to the network."""
    from dsmoe_local.serve.options import ServeOptions

    assert ServeOptions(DEFAULTS).host == "127.0.0.1"
    assert ServeOptions(DEFAULTS).cors_origins == ()
