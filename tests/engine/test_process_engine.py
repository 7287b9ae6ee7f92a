"""The real engine through its process: the same text and errors as without one, crashes, interruptions."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import hosted, hosted_native, llama_oracle
from support.models import smollm2, tiny_model

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineCrashError, PromptError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    ModelOptions,
    Request,
    SamplingParameters,
    TokenEvent,
)

GREEDY = SamplingParameters(temperature=0)


def tiny_options() -> ModelOptions:
    return ModelOptions(tiny_model(), n_context=2048, n_threads=2, chat_template="deepseek-moe")


@pytest.fixture(scope="module")
def client() -> Iterator[EngineClient]:
    with EngineClient.load(tiny_options()) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def here() -> Iterator[Engine]:
    with Engine.load(tiny_options()) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def trained() -> Iterator[EngineClient]:
    with EngineClient.load(ModelOptions(smollm2(), n_context=2048, n_ubatch=256, n_threads=2)) as loaded:
        yield loaded


def ids(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events[:-1] if event.token_id is not None]


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def test_greedy_tokens_equal_the_bare_loop(trained: EngineClient) -> None:
    """Guards: a request that arrives changed, such as without its sampling parameters."""
    prompt = trained.encode("The capital of France is")
    events = list(trained.submit(Request("r", prompt, GREEDY, max_tokens=16, logprobs=True)))
    assert ids(events) == llama_oracle.greedy(smollm2(), prompt, 16)
    assert all(event.logprob is not None and event.logprob <= 0 for event in events[:-1])
    assert trained.info.path == smollm2()


def test_second_turn_reads_only_its_new_tokens(trained: EngineClient) -> None:
    """Guards: exact ids of a reply lost on the way, which would throw the cache away on every turn."""
    first = (Message("user", "Say hello."),)
    events = list(trained.submit(Request("r", first, GREEDY, max_tokens=8)))
    reply = Message("assistant", text(events), tuple(ids(events)))
    second = (*first, reply, Message("user", "And now?"))
    usage = list(trained.submit(Request("r", second, GREEDY, max_tokens=2)))[-1].usage
    assert usage is not None
    assert usage.cached_tokens >= len(trained.encode(first)) + len(reply.token_ids) - 1


@pytest.mark.parametrize(
    "prompt",
    ["x" * 200_000, "y" * 30_000, "7" * 60_000, " " * 60_000, "-" * 60_000, "中" * 30_000],
    ids=lambda text: text[0],
)
def test_endless_words(client: EngineClient, prompt: str) -> None:
    """Guards: llama.cpp's pre-tokenizer, which recurses once a letter, overflowing the stack."""
    pid = client.pid
    token_ids = client.encode(prompt)
    with llama_oracle.vocabulary(tiny_model()) as vocabulary:
        assert b"".join(map(vocabulary.piece, token_ids)).decode().endswith(prompt)
    with pytest.raises(PromptError, match="the context holds 2,048"):
        list(client.submit(Request("r", prompt)))
    assert client.pid == pid


@pytest.mark.parametrize(
    "prompt",
    [
        "<｜end▁of▁sentence｜>",
        "\u2028\u2029\x85",
        "\ud83d",
        "a\0b",
        "\N{GRINNING FACE}é中",
        (),
        (10**6,),
        "x" * 300_000,
    ],
    ids=["special", "separators", "half a pair", "nul", "beyond ASCII", "empty", "no token", "long word"],
)
def test_prompts_are_judged_as_in_this_process(
    client: EngineClient, here: Engine, prompt: str | tuple[int, ...]
) -> None:
    """Guards: a text changed by its way through the pipe, or an error by its."""
    assert outcome(client, prompt) == outcome(here, prompt)
    if isinstance(prompt, str):
        messages = (Message("user", prompt),)
        assert outcome(client, messages) == outcome(here, messages)


def outcome(engine: TextEngine, prompt: object) -> object:
    """What becomes of a prompt: its ids, or the error."""
    try:
        return engine.encode(prompt)  # type: ignore[arg-type]
    except DsmoeError as error:
        return (type(error), str(error), error.exit_code)


@pytest.mark.parametrize(
    "number",
    [signal.SIGSEGV, signal.SIGABRT, pytest.param(signal.SIGKILL, marks=pytest.mark.any_device)],
)
def test_engine_killed_in_the_middle_of_a_reply(trained: EngineClient, number: signal.Signals) -> None:
    """Guards: a crash in native code that ends more than what was in flight."""
    stream = trained.submit(Request("r", "Once upon a time", GREEDY))
    next(stream)
    os.kill(trained.pid, number)
    with pytest.raises(EngineCrashError, match=number.name) as caught:
        list(stream)
    assert "llama" in "\n".join(caught.value.log)
    events = list(trained.submit(Request("r", "The capital of France is", GREEDY, max_tokens=3)))
    assert "Paris" in text(events)


@pytest.mark.parametrize(
    ("factory", "name", "last"),
    [
        (hosted_native.ABORTING, "SIGABRT", "its log ends: ggml.c:7: GGML_ASSERT(a == b) failed"),
        (hosted_native.READING_NOTHING, "SIGSEGV", "its log ends: "),
    ],
)
def test_native_code_that_crashes(factory: str, name: str, last: str) -> None:
    """Guards: llama.cpp's own last words lost, or hidden behind what a debugger prints."""
    with EngineClient.load(ModelOptions(tiny_model()), factory=factory) as client:
        with pytest.raises(EngineCrashError, match=f"killed by {name}") as caught:
            client.encode("x")
        assert caught.value.where.startswith(last)


def test_cancelling_in_prefill_keeps_what_was_read() -> None:
    """Guards: Ctrl-C that waits for the end of a long prompt, or throws away what was read of it."""
    prompt = tuple(3 + index % 200 for index in range(1900))
    events: list[TokenEvent] = []
    options = ModelOptions(smollm2(), n_context=2048, n_ubatch=256, n_threads=2)
    with EngineClient.load(options, factory=hosted.PREFILL_HELD) as client:
        for event in client.submit(Request("p", prompt, GREEDY, max_tokens=4)):
            events.append(event)
            if event.progress is not None:
                client.cancel("p")
        assert events[-1].finish_reason is FinishReason.CANCELLED
        read = [event.progress.done for event in events if event.progress is not None]
        assert read[-1] < len(prompt)
        short = prompt[:300]
        events = list(client.submit(Request("q", short, GREEDY, max_tokens=6)))
    assert events[-1].usage is not None
    assert events[-1].usage.cached_tokens >= read[0]
    assert ids(events) == llama_oracle.greedy(smollm2(), short, 6, n_context=2048)


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "cut", "other"])
def test_files_are_refused_as_in_this_process(damage: str, tmp_path: Path) -> None:
    """Guards: a malformed file that reaches llama.cpp, which aborts, or an error that lost its words."""
    path = tmp_path / "model.gguf"
    whole = tiny_model().read_bytes()
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "other": b"GGUF" + b"\xff" * 100}
    if damage == "folder":
        path.mkdir()
    elif damage in contents:
        path.write_bytes(contents[damage])
    caught: list[tuple[type, str]] = []
    for load in (Engine.load, EngineClient.load):
        with pytest.raises(DsmoeError) as error:
            load(ModelOptions(path))
        caught.append((error.type, str(error.value)))
    assert caught[0] == caught[1]


def test_log_of_llama_cpp_reaches_the_client(client: EngineClient, tmp_path: Path) -> None:
    """Guards: the log kept where it dies with the process."""
    path = tmp_path / "llama.log"
    with EngineClient.load(ModelOptions(tiny_model()), log_file=path) as other:
        assert any("n_ctx" in line for line in other.log())
        assert path.read_text().splitlines()[-1] == other.log()[-1]


def test_a_grammar_of_thousands_of_rules_ends_no_process(client: EngineClient) -> None:
    """Guards: rules that follow each other so far that compiling them overflows the stack."""
    rules = [f'a{number} ::= "x" a{number + 1} | "y"' for number in range(4_000)]
    grammar = "\n".join(["root ::= a0", *rules, 'a4000 ::= "(" root ")" | "z"'])
    events = list(client.submit(Request("many", "a", GREEDY, max_tokens=2, grammar=grammar)))
    assert set("".join(event.text for event in events)) <= {"x", "y"}
    assert events[-1].finish_reason is not None
