"""The Python API: replies, streams and batches, sync and async; crashes, mistakes, and ends of processes."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.hosted import FAKE, HALTING, WAITING
from support.models import tiny_model
from support.processes import is_gone

import dsmoe_local
from dsmoe_local.api.errors import PARAMETERS
from dsmoe_local.api.options import NOT_OPTIONS, LoadOptions, ReplyOptions
from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, UsageError
from dsmoe_local.base.paths import data_folder
from dsmoe_local.cli.commands import load_command
from dsmoe_local.engine.errors import EngineCrashError, EngineError, PromptError
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import Message, ModelOptions, Prompt, Request, SamplingParameters
from dsmoe_local.model.discovery import recent_models
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.fields import HONOURED

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GREEDY: Mapping[str, Any] = {"temperature": 0, "max_tokens": 12}
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def path() -> Path:
    return tiny_model(TEMPLATE)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[dsmoe_local.Model]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(path.parent / "data"))
        opened = dsmoe_local.open_model(path, n_parallel=4)
    with opened:
        yield opened


@pytest.fixture(scope="module")
def expected(path: Path) -> dict[str, str]:
    """Greedy replies of the engine itself, by prompt."""
    greedy = SamplingParameters(temperature=0)
    prompts: dict[str, Prompt] = {"chat": (Message("user", "Hello"),), "complete": "Hello"}
    with EngineClient.load(ModelOptions(path)) as engine:
        return {
            name: "".join(e.text for e in engine.submit(Request(name, prompt, greedy, max_tokens=12)))
            for name, prompt in prompts.items()
        }


def hosted(factory: str) -> dsmoe_local.Model:
    """A model with a fake engine, in a real child process."""
    return dsmoe_local.Model(EngineClient.load(ModelOptions(Path("x")), factory=factory))


def test_replies_are_the_engines(model: dsmoe_local.Model, expected: Mapping[str, str]) -> None:
    """Guards: another prompt, another sampler or a lost piece between the engine and the caller."""
    assert expected["chat"] != expected["complete"]
    reply = model.chat("Hello", **GREEDY)
    assert reply.text == expected["chat"]
    assert reply.message == {"role": "assistant", "content": expected["chat"]}
    assert reply.n_completion_tokens <= 12
    assert model.chat([{"role": "user", "content": "Hello"}], **GREEDY).text == expected["chat"]
    assert model.complete("Hello", **GREEDY).text == expected["complete"]
    stream = model.stream("Hello", **GREEDY)
    assert "".join(stream) == expected["chat"]
    assert stream.reply.text == expected["chat"]
    assert len(model.chat("Hello", n=3, seed=1, max_tokens=5).choices) == 3
    # Values as Python has them.
    other = model.complete("Hello", stop=("x", "y"), logit_bias={65: 100}, temperature=0, max_tokens=1)
    assert other.text != expected["complete"][:1]


def test_a_batch(model: dsmoe_local.Model, expected: Mapping[str, str]) -> None:
    """Guards: a request that is lost, answered twice or given another's reply; one that ends the others."""
    requests: list[Any] = [
        {"id": "c", "messages": [{"role": "user", "content": "Hello"}], **GREEDY},
        {"prompt": "Hello", "label": 7, **GREEDY},
        {"prompt": "Hello", "temperature": "hot"},
        {"custom_id": "o", "method": "POST", "body": {"prompt": "Hello", **GREEDY}},
        {"nothing": 1},
        {"prompt": "x" * 5000},
        "no mapping",
        *({"prompt": "Hello", **GREEDY} for _ in range(10)),
    ]
    results = {result.index: result for result in model.batch(iter(requests))}
    assert sorted(results) == [*range(17)]
    assert [results[index].id for index in range(4)] == ["c", "1", "2", "o"]
    assert results[1].request["label"] == 7
    texts = [result.reply.text if result.reply else "" for _, result in sorted(results.items())]
    text = expected["complete"]
    assert texts == [expected["chat"], text, "", text, "", "", "", *[text] * 10]
    errors = {index: result.error for index, result in results.items() if result.error}
    kinds: dict[int, type[DsmoeError]] = {
        2: RequestError,
        4: RequestError,
        5: PromptError,
        6: RequestError,
    }
    assert errors.keys() == kinds.keys()
    assert all(isinstance(errors[index], kind) for index, kind in kinds.items())


def test_a_batch_is_lazy(model: dsmoe_local.Model) -> None:
    """Guards: an endless iterator that is read to its end; replies that go on when nobody wants them."""
    taken = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal taken
        while True:
            taken += 1
            yield {"prompt": "Hello", "max_tokens": 2}

    results = model.batch(endless())
    for _ in range(3):
        next(results)
    results.close()
    assert taken <= 3 + model.info.n_parallel + 2


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda model: model.chat("x", temprature=1), TypeError, "did you mean temperature?"),
        (lambda model: model.complete("x", messages=[]), TypeError, "complete"),
        (lambda model: model.stream("x", n=2), UsageError, "a stream has one reply"),
        (lambda model: model.chat([]), RequestError, "not a list of messages"),
        (lambda model: model.chat([{"content": "x"}]), RequestError, "role and content"),
        (lambda model: model.chat("x", top_p=3), UsageError, "out of range"),
        (lambda model: model.chat("x", temperature=float("nan")), RequestError, "not a finite number"),
        (lambda model: model.chat("x", json_schema={"enum": {1}}), RequestError, "json_schema is not JSON"),
        (lambda model: model.complete("x" * 5000), PromptError, "the context holds"),
    ],
)  # fmt: skip
def test_mistakes(call: Any, error: type[Exception], words: str, model: dsmoe_local.Model) -> None:
    """Guards: an option that is ignored, or a message that does not name the mistake."""
    with pytest.raises(error, match=words):
        call(model)


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("nobody", {}, UsageError, "no model is called"),
        ("owner/name", {}, DsmoeError, "dsmoe pull owner/name"),
        ("tiny", {"n_ctx": 100}, TypeError, "did you mean n_context?"),
        ("tiny", {"path": "x"}, TypeError, "no option 'path'"),
    ],
)
def test_models_that_cannot_be_opened(
    name: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Guards: a process that starts for a mistake; a mistake that llama.cpp reports."""
    with pytest.raises(error) as caught:
        dsmoe_local.open_model(name, **options)
    assert words in str(caught.value)


def test_a_name_and_the_context(path: Path) -> None:
    """Guards: names that only commands know; a context beyond what the model was trained for; a warning
    whose line is not the script's.
    """
    folder = data_folder() / "models"
    folder.mkdir(parents=True)
    (folder / "small.gguf").symlink_to(path)
    with pytest.warns(UserWarning, match="n_context is 256") as warned:
        opened = dsmoe_local.open_model("SMALL", n_context=9999)
    with opened:
        assert opened.info.n_context == 256

    async def open_it() -> int:
        async with dsmoe_local.open_model_async("SMALL", n_context=9999) as model:
            return model.info.n_context

    with pytest.warns(UserWarning, match="n_context is 256") as warned_async:
        assert asyncio.run(open_it()) == 256
    assert {each.filename for each in (*warned, *warned_async)} == {__file__}
    assert recent_models() == [folder / "small.gguf"]


def test_errors_name_parameters(path: Path) -> None:
    """Guards: advice to use -c, an option of the command line, to the author of a script."""
    long = "word " * 200
    told = re.escape("use a longer context (n_context, at most")

    async def streamed(model: dsmoe_local.AsyncModel) -> None:
        async for _ in model.stream(long):
            pass

    with dsmoe_local.open_model(path, n_context=64) as model:
        same = dsmoe_local.AsyncModel(model._engine)
        calls: list[Callable[[], object]] = [
            lambda: model.chat(long),
            lambda: list(model.stream(long)),
            lambda: asyncio.run(same.complete(long)),
            lambda: asyncio.run(streamed(same)),
        ]
        for call in calls:
            with pytest.raises(PromptError, match=told):
                call()
        (result,) = model.batch([{"prompt": long}])
        assert re.search(told, str(result.error))
    with pytest.raises(UsageError, match=r"^n_gpu_layers -7 is out of range"):
        dsmoe_local.open_model(path, n_gpu_layers=-7)


def test_every_option_in_messages_has_a_parameter() -> None:
    """Guards: an option in a message of the engine that the table lacks, or has as another parameter."""
    sources = "".join(path.read_text() for path in (ROOT / "dsmoe_local" / "engine").rglob("*.py"))
    for option in load_command("batch").params:
        for flag in option.opts:
            named = re.search(rf"[\"'( ]{flag}[\"' ,:)]", sources)
            if option.name in LoadOptions.__annotations__ and named:
                assert PARAMETERS[flag] == option.name


def test_options_are_those_of_the_engine() -> None:
    """Guards: an option that only one of the definitions has."""
    names = {field.name for field in fields(ModelOptions)} - NOT_OPTIONS
    assert LoadOptions.__annotations__.keys() == names | {"log_file"}
    assert ReplyOptions.__annotations__.keys() <= HONOURED.keys()
    (listed,) = re.findall(r"<!-- options -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == names | {"log_file"}


def test_leaving_a_stream_cancels_it() -> None:
    """Guards: a reply that goes on for nobody, and holds the slot of the next one."""
    with hosted(WAITING) as model:
        for text in model.stream("a long reply"):
            assert text
            break
        # The fake engine answers this only if a request was cancelled.
        assert model._engine.observe("cancelled") == {"cancelled": True}


def test_cancel_from_another_thread() -> None:
    """Guards: a call that nothing ends; a cancelled reply that looks complete."""
    with hosted(WAITING) as model:
        stream = model.stream("a long reply")
        next(stream)
        with pytest.raises(InterruptedRunError):
            _ = stream.reply
        model.cancel()
        list(stream)
        with pytest.raises(InterruptedRunError):
            _ = stream.reply


def test_a_crash() -> None:
    """Guards: a call that hangs when the engine dies; a model that is lost afterwards."""
    with hosted(FAKE) as model:
        with pytest.raises(EngineCrashError, match="SIGSEGV"):
            model.complete("signal SIGSEGV")
        assert model.complete("hello").text == "hello"
        results = [*model.batch([{"prompt": "signal SIGSEGV"}, {"prompt": "hello"}])]
        assert isinstance(next(each.error for each in results if each.index == 0), EngineCrashError)
        assert model.complete("hello").text == "hello"
    with pytest.raises(EngineError, match="closed"):
        model.complete("hello")


def ended(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_gone(pid)


def test_forgetting_the_model_ends_its_process() -> None:
    """Guards: a process that stays in a notebook where nobody wrote `with`; one that ends below a stream."""
    model = hosted(HALTING)
    pid = model._engine.pid
    stream = model.stream("hello")
    next(stream)
    del model
    gc.collect()
    next(stream)
    assert not is_gone(pid)
    del stream
    gc.collect()
    assert ended(pid)


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_the_end_of_a_script(ending: str, status: int, path: Path) -> None:
    """Guards: a script that hangs at its end, or leaves a process behind, since nobody closed the model."""
    code = f"""
import dsmoe_local
model = dsmoe_local.open_model({str(path)!r})
stream = model.stream("hello")
next(stream)
print(model._engine.pid, flush=True)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr == ""
    assert ended(int(done.stdout))


def test_the_import_is_cheap() -> None:
    """Guards: an import of the package that loads the engine or numpy."""
    code = "import sys, dsmoe_local; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()} - {*sys.stdlib_module_names}
    assert "dsmoe_local.base" not in done.stdout
    assert not loaded & {"numpy", "msgspec", "click", "llama_cpp"}
    assert all(hasattr(dsmoe_local, name) for name in dsmoe_local.__all__)
    with pytest.raises(AttributeError, match="open_modle"):
        _ = dsmoe_local.open_modle  # type: ignore[attr-defined]


def test_async_replies_are_the_engines(path: Path, expected: Mapping[str, str]) -> None:
    """Guards: a method that differs from the sync one; replies that wait for each other."""

    async def lines() -> AsyncIterator[dict[str, Any]]:
        for label in "abc":
            yield {"prompt": "Hello", "id": label, **GREEDY}
        yield {"prompt": 3}

    async def run() -> None:
        async with dsmoe_local.open_model_async(path, n_parallel=4) as model:
            pid = model._engine.pid
            replies = await asyncio.gather(*(model.chat("Hello", **GREEDY) for _ in range(6)))
            assert [reply.text for reply in replies] == [expected["chat"]] * 6
            assert (await model.complete("Hello", **GREEDY)).text == expected["complete"]
            async with model.stream("Hello", **GREEDY) as stream:
                assert "".join([text async for text in stream]) == expected["chat"]
            assert stream.reply.text == expected["chat"]
            results = {result.id: result async for result in model.batch(lines())}
            assert sorted(results) == ["3", "a", "b", "c"]
            texts = {result.reply.text for result in results.values() if result.reply}
            assert texts == {expected["complete"]}
            assert isinstance(results["3"].error, RequestError)
            assert [result.id async for result in model.batch([{"prompt": "x", "max_tokens": 1}])] == ["0"]
        assert ended(pid)
        opened = await dsmoe_local.open_model_async(path)
        await opened.close()

    asyncio.run(run())


def test_async_cancellation() -> None:
    """Guards: a cancelled task whose request goes on; an async loop that is left early."""

    async def run() -> None:
        engine = EngineClient.load(ModelOptions(Path("x")), factory=WAITING)
        model = dsmoe_local.AsyncModel(engine)
        stream = model.stream("a long reply")
        await anext(stream)
        del stream
        gc.collect()
        assert engine.observe("cancelled") == {"cancelled": True}
        await model.close()
        engine = EngineClient.load(ModelOptions(Path("x")), factory=WAITING)
        model = dsmoe_local.AsyncModel(engine)
        begun = model.stream("another")
        for _ in range(3):
            await anext(begun)
        task = asyncio.create_task(begun.__anext__())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.observe("cancelled") == {"cancelled": True}
        await model.close()

    asyncio.run(run())


def test_async_batch_ends() -> None:
    """Guards: an error of the source of requests that is lost; a crash; a loop that is left early."""

    async def failing() -> AsyncIterator[dict[str, Any]]:
        yield {"prompt": "hello"}
        raise ValueError("no more")

    async def run() -> None:
        model = dsmoe_local.AsyncModel(EngineClient.load(ModelOptions(Path("x")), factory=FAKE))
        results = model.batch(failing())
        assert (await anext(results)).index == 0
        with pytest.raises(ValueError, match="no more"):
            await anext(results)
        crashed = [each async for each in model.batch([{"prompt": "signal SIGSEGV"}])]
        assert isinstance(crashed[0].error, EngineCrashError)
        endless = ({"prompt": "hello"} for _ in iter(int, 1))
        results = model.batch(endless)
        await anext(results)
        await results.aclose()
        assert (await model.complete("hello")).text == "hello"
        await model.close()

    asyncio.run(run())


EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_there_are_examples() -> None:
    """Guards the next test against a pattern that finds nothing."""
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: f"{len(text)} characters")
def test_the_examples_of_the_page(example: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards examples that do not run as they are."""
    folder = data_folder() / "models"
    folder.mkdir(parents=True)
    (folder / "Qwen3-30B-A3B-Q4_K_M.gguf").symlink_to(path)
    # The tiny model was trained for fewer tokens.
    code = example.replace("n_context=8192", "n_context=256")
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
