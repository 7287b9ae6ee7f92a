"""Models without a table: what they generate is what llama.cpp computes, whatever is reused."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import llama_oracle
from support.other_models import OTHERS, WINDOW, write_other

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.progress import ignore
from dsmoe_local.engine import native
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineCrashError, ModelLoadError
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.schedule.scheduler import Scheduler
from dsmoe_local.engine.types import ModelOptions, ObserverOptions, Request, SamplingParameters, TokenEvent

EXACT: dict[str, Any] = {
    "n_threads": 1,
    "cache_type_k": "f32",
    "cache_type_v": "f32",
    "flash_attention": "off",
}
RECURRENT = ("mamba", "lfm2", "lfm2 with a window")
WINDOWED = ("gemma3", "gpt-oss")


@pytest.fixture(scope="module", params=OTHERS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other(tmp_path_factory.mktemp("others") / "model.gguf", request.param)


@pytest.fixture
def kind(path: Path, request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["path"])


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine.load(ModelOptions(path, n_parallel=4, **EXACT)) as loaded:
        yield loaded
        loaded.check()


def run(
    engine: Engine, prompts: Sequence[Sequence[int]], count: int = 4, **more: Any
) -> list[list[TokenEvent]]:
    """The events of each prompt, all of them in flight at once."""
    arrived: queue.SimpleQueue[tuple[str, TokenEvent | BaseException | None]] = queue.SimpleQueue()
    events: dict[str, list[TokenEvent]] = {}
    for number, prompt in enumerate(prompts):
        request = Request(
            str(number),
            tuple(prompt),
            sampling=SamplingParameters(temperature=0),
            max_tokens=count,
            logprobs=True,
            **more,
        )
        events[request.id] = []
        engine.start(request, lambda event, name=request.id: arrived.put((name, event)))  # type: ignore[misc]
    n_open = len(prompts)
    while n_open:
        name, event = arrived.get(timeout=60)
        if isinstance(event, TokenEvent):
            events[name].append(event)
        else:
            if event is not None:
                raise event
            n_open -= 1
    return list(events.values())


def check(path: Path, prompt: Sequence[int], events: Sequence[TokenEvent], index: int = 0) -> list[int]:
    """Compare a reply with the logits of llama.cpp, which reads both at once; return the reply."""
    reply = [e for e in events if e.token_id is not None and e.index == index]
    ids = [event.token_id for event in reply if event.token_id is not None]
    wanted = expected(path, (*prompt, *ids))[len(prompt) - 1 :]
    found = [event.logprob for event in reply]
    assert found == pytest.approx([row[token] for row, token in zip(wanted, ids, strict=True)], abs=1e-3)
    assert all(row[token] >= row.max() - 1e-3 for row, token in zip(wanted, ids, strict=True))
    return ids


@cache
def expected(path: Path, ids: tuple[int, ...]) -> Any:
    return llama_oracle.logprobs(path, ids)


def n_cached(events: Sequence[TokenEvent]) -> int:
    return max(event.usage.cached_tokens for event in events if event.usage is not None)


def text(seed: int, count: int) -> list[int]:
    return [random.Random(seed).randrange(2, 600)] + [
        random.Random(f"{seed}:{index}").randrange(2, 600) for index in range(count - 1)
    ]


def test_a_conversation(path: Path, kind: str, engine: Engine) -> None:
    """Guards: a state that is continued after tokens were taken back; a turn that reads all again."""
    prompt = text(1, 3 * WINDOW)
    said = check(path, prompt, run(engine, [prompt])[0])
    following = [*prompt, *said, *text(2, 10)]
    events = run(engine, [following])[0]
    check(path, following, events)
    assert n_cached(events) >= len(prompt) + len(said) - 1
    for other in ([*prompt[:-5], 7, 8], prompt, prompt[: WINDOW + 3], [*prompt[:WINDOW], 9]):
        events = run(engine, [other])[0]
        check(path, other, events)
        assert kind not in RECURRENT or n_cached(events) == 0


def test_many_at_once(path: Path, engine: Engine) -> None:
    """Guards: a prefix that is shared although the cache cannot; replies that mix."""
    shared = text(3, 2 * WINDOW)
    prompts = [[*shared, *text(seed, seed)] for seed in range(4, 12)] + [text(12, 1), text(13, 5)]
    for prompt, events in zip(prompts, run(engine, prompts, 6), strict=True):
        check(path, prompt, events)
    for index in range(3):
        check(path, shared, run(engine, [shared], n=3)[0], index)


def test_a_full_cache(path: Path, kind: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: cells outside the sliding window that were overwritten, taken for the prefix of a prompt."""
    restarted: list[object] = []
    restart = Scheduler.restart

    def noted(scheduler: Scheduler, sequence: Any) -> None:
        restarted.append(sequence)
        restart(scheduler, sequence)

    monkeypatch.setattr(Scheduler, "restart", noted)
    rng = random.Random(kind)
    texts = [text(seed, 100) for seed in range(3)]
    for _ in range(30):
        prompts = [rng.choice(texts)[: rng.randint(1, 100)] for _ in range(rng.randint(1, 4))]
        for prompt, events in zip(prompts, run(engine, prompts, 2), strict=True):
            check(path, prompt, events)
    assert bool(restarted) == (kind in WINDOWED)


def test_aborted_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a state of an unknown number of tokens that is continued as if nothing had happened."""
    n_steps = 0
    decode = native.Context.decode

    def sometimes_aborted(context: native.Context, rows: Sequence[native.Row]) -> int:
        nonlocal n_steps
        n_steps += 1
        if n_steps % 20 in (3, 9, 15):
            context.abort()
        return decode(context, rows)

    monkeypatch.setattr(native.Context, "decode", sometimes_aborted)
    prompts = [text(seed, 30) for seed in range(20, 24)]
    with Engine.load(ModelOptions(path, n_parallel=2, n_batch=8, n_ubatch=8, **EXACT)) as engine:
        for prompt, events in zip(prompts, run(engine, prompts, 20), strict=True):
            check(path, prompt, events)
        engine.check()
    assert n_steps > 20


def test_deterministic(path: Path, kind: str) -> None:
    """Guards: replies that depend on what else runs; a recurrent state that padding changes."""
    options = ModelOptions(path, n_parallel=3, n_ubatch=32, deterministic=True, **EXACT)
    if kind in RECURRENT:
        with pytest.raises(UsageError, match="not possible with") as refused:
            Engine.load(options)
        assert str(path) in str(refused.value)
        return
    prompts = [[*text(30, 70), *text(seed, 9)] for seed in range(31, 35)]
    with Engine.load(options) as engine:
        alone = [run(engine, [prompt])[0] for prompt in prompts]
        together = run(engine, prompts)
    for prompt, *both in zip(prompts, alone, together, strict=True):
        logprobs = [[event.logprob for event in events if event.token_id is not None] for events in both]
        assert logprobs[0] == logprobs[1]
        check(path, prompt, both[0])


def test_the_cache_as_a_file(path: Path, kind: str, engine: Engine, tmp_path: Path) -> None:
    """Guards: a part of a state that is taken for all of it."""
    prompt = tuple(text(40, 60))
    check(path, prompt, run(engine, [prompt])[0])
    saved = engine.save_cache(tmp_path / "cache", prompt)
    assert saved == (0 if kind in (*RECURRENT, *WINDOWED) else len(prompt))
    run(engine, [text(41, 200)])
    assert engine.load_cache(tmp_path / "cache", prompt) >= saved
    check(path, prompt, run(engine, [prompt])[0])


def test_shifting(path: Path, kind: str, engine: Engine) -> None:
    """Guards: positions that are shifted in a state that has none."""
    prompt = text(42, 250)
    if kind in (*RECURRENT, *WINDOWED):
        with pytest.raises(UsageError, match="cannot be shifted"):
            run(engine, [prompt], 20, context_shift=True)
    else:
        run(engine, [prompt], 20, context_shift=True)
    check(path, prompt[:200], run(engine, [prompt[:200]])[0])


def test_observers(path: Path, kind: str, engine: Engine) -> None:
    """Guards: experts that are looked for in nodes by the names of another graph; a cache that is lost."""
    prompt = text(43, 40)
    with pytest.raises(UsageError) as refused:
        engine.set_observers((ObserverOptions("routing"),))
    if kind != "llama with biases":
        assert str(refused.value).startswith("the experts view is not available for this ")
    engine.set_observers((ObserverOptions("logprobs"),))
    check(path, prompt, run(engine, [prompt])[0])
    engine.set_observers(())
    check(path, prompt, run(engine, [prompt])[0])


@pytest.mark.parametrize(
    ("observer", "purpose"), [("routing", "the experts view"), ("activations", "an importance matrix")]
)
def test_what_needs_a_table_says_so_before_it_loads(observer: str, purpose: str, tmp_path: Path) -> None:
    """Guards: a load of minutes that ends with a refusal."""
    path = write_other(tmp_path / "model.gguf", "mixtral")
    events: list[object] = []
    with pytest.raises(UsageError, match=f"^{purpose} is not available for this llama model"):
        Engine.load(ModelOptions(path, observers=(ObserverOptions(observer),)), events.append)
    with pytest.raises(UsageError, match=r"^--active-experts is not available for this llama model"):
        Engine.load(ModelOptions(path, n_experts_per_token=1), events.append)
    assert not events


def test_an_architecture_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    """Guards: a refusal that names neither the file nor the reason."""
    path = write_other(tmp_path / "model.gguf", "qwen2")
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"qwen9"))
    with pytest.raises(ModelLoadError, match=r"model\.gguf\n.*unknown model architecture: 'qwen9'"):
        Engine.load(ModelOptions(path))


def test_a_model_that_llama_cpp_aborts_on(tmp_path: Path) -> None:
    """Guards: an abort that ends the program, or is reported without the file or llama.cpp's reason."""
    path = write_other(tmp_path / "odd.gguf", "qwen3", **{"rope.dimension_count": 64})
    with pytest.raises((EngineCrashError, ModelLoadError)) as failed:
        EngineClient.load(ModelOptions(path), ignore)
    lines = str(failed.value).splitlines()
    assert "odd.gguf" in lines[0]
    assert "GGML_ASSERT" in lines[1]
    assert len(lines) == 3
    assert isinstance(failed.value, DsmoeError)
