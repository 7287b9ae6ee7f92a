"""The engine on real files, against llama.cpp driven barely: tokens, text, reuse of the cache, endings."""

from __future__ import annotations

import codecs
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import llama_oracle
from support.endless import held
from support.models import smollm2, tiny_model

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine import native
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineError, PromptError
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    ModelOptions,
    Prompt,
    Request,
    SamplingParameters,
    TokenEvent,
)

GREEDY = SamplingParameters(temperature=0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(ModelOptions(tiny_model(), n_threads=2, chat_template="deepseek-moe")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def real_engine() -> Iterator[Engine]:
    with Engine.load(ModelOptions(smollm2(), n_context=2048, n_threads=2)) as loaded:
        yield loaded


def generate(engine: Engine, prompt: Prompt, count: int = 24, **more: Any) -> list[TokenEvent]:
    values: dict[str, Any] = {"sampling": GREEDY, "max_tokens": count, **more}
    return list(engine.submit(Request("r", prompt, **values)))


def forget(engine: Engine) -> None:
    """Drop what idle sequences hold."""
    engine._between_steps(lambda core: core.scheduler.forget_idle())


def ids(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events[:-1] if event.token_id is not None]


def text(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)


@pytest.mark.parametrize("prompt", ["The quick brown fox", "人工智能", "def f(x):\n    return", "a"])
def test_greedy_tokens_equal_the_bare_loop(engine: Engine, prompt: str) -> None:
    """Guards: a token, position or output row passed wrongly to llama_decode."""
    forget(engine)  # a cold cache, as the oracle's
    with llama_oracle.vocabulary(tiny_model()) as vocabulary:
        expected_prompt = vocabulary.encode(prompt, add_special=True)
    assert list(engine.encode(prompt)) == expected_prompt
    events = generate(engine, prompt)
    assert ids(events) == llama_oracle.greedy(tiny_model(), expected_prompt, 24)


def test_a_prompt_of_messages_and_ids_is_refused(engine: Engine) -> None:
    """Guards: one half of such a prompt dropped without a word."""
    with pytest.raises(UsageError, match="the prompt has a wrong type"):
        engine.encode((Message("user", "a"), 5))


def test_real_weights_greedy_equals_the_bare_loop(real_engine: Engine) -> None:
    """Guards: anything that only a trained model shows, such as a wrong template or a missing BOS."""
    events = generate(real_engine, "The capital of France is", 16)
    prompt = real_engine.encode("The capital of France is")
    assert ids(events) == llama_oracle.greedy(smollm2(), prompt, 16)
    assert "Paris" in text(events)


def test_text_is_the_bytes_of_the_tokens(engine: Engine) -> None:
    """Guards: half characters, text that is lost or doubled at the end."""
    for seed in range(4):
        sampling = SamplingParameters(temperature=2.0, seed=seed, top_k=0, top_p=1, min_p=0)
        events = generate(engine, "x", 40, sampling=sampling)
        with llama_oracle.vocabulary(tiny_model()) as vocabulary:
            raw = b"".join(vocabulary.piece(token_id) for token_id in ids(events))
        controls = [name.encode() for name in ("<｜begin▁of▁sentence｜>",)]
        for control in controls:
            raw = raw.replace(control, b"")
        # What a cut leaves of a character is not shown.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        cut = events[-1].finish_reason is not FinishReason.STOP
        assert text(events) == decoder.decode(raw, not cut)


def test_second_turn_reads_only_its_new_tokens(engine: Engine) -> None:
    """Guards: re-tokenized replies, which would throw the KV cache away on every turn."""
    first = (Message("user", "Hello there"),)
    events = generate(engine, first, 12)
    reply = Message("assistant", text(events), tuple(ids(events)))
    second = (*first, reply, Message("user", "And now?"))
    prompt = engine.encode(second)
    events = generate(engine, second, 8)
    usage = events[-1].usage
    assert usage is not None
    before = engine.encode(first) + reply.token_ids
    assert prompt[: len(before)] == before
    # All but the reply's last token, which was sampled but never decoded.
    assert usage.cached_tokens == len(before) - 1
    assert ids(events) == llama_oracle.greedy(tiny_model(), prompt, 8)


def test_same_prompt_again_gives_the_same_reply(engine: Engine) -> None:
    """Guards: a cache that does not match what it claims to hold."""
    first, again = (generate(engine, "The quick brown fox jumps", 10) for _ in range(2))
    assert ids(first) == ids(again)
    assert again[-1].usage is not None
    assert again[-1].usage.cached_tokens == again[-1].usage.prompt_tokens - 1


@pytest.mark.parametrize("n_ubatch", [1, 7, 64])
def test_chunked_prefill_agrees_with_the_oracle(n_ubatch: int) -> None:
    """Guards: chunk boundaries: an output row or a position lost between two steps."""
    prompt = "The quick brown fox jumps over the lazy dog. " * 3
    with Engine.load(ModelOptions(tiny_model(), n_ubatch=n_ubatch, n_threads=2)) as engine:
        events = generate(engine, prompt, 6)
        progress = [event.progress for event in events if event.progress is not None]
        total = len(engine.encode(prompt))
        assert [step.done for step in progress] == list(range(n_ubatch, total, n_ubatch))
        assert ids(events) == llama_oracle.greedy(tiny_model(), engine.encode(prompt), 6)


def test_logprobs_are_those_of_the_model(engine: Engine) -> None:
    """Guards: probabilities taken after sampling parameters, or of the wrong step."""
    events = generate(engine, "soft as water", 5, logprobs=True)
    prompt = engine.encode("soft as water")
    rows = llama_oracle.logits(tiny_model(), [*prompt, *ids(events)])[len(prompt) - 1 :]
    for event, row in zip(events[:5], rows, strict=False):
        assert event.token_id is not None
        assert event.logprob is not None
        expected = row[event.token_id] - np.logaddexp.reduce(row.astype(np.float64))
        assert event.logprob == pytest.approx(expected, abs=0.02)


def test_seed_fixes_a_sampled_reply(engine: Engine) -> None:
    """Guards: a seed that is ignored, or not reported."""
    hot = SamplingParameters(temperature=1.5, seed=7)
    first, again = (generate(engine, "x", 16, sampling=hot) for _ in range(2))
    assert ids(first) == ids(again)
    other = generate(engine, "x", 16, sampling=SamplingParameters(temperature=1.5, seed=8))
    assert ids(other) != ids(first)
    free = generate(engine, "x", 16, sampling=SamplingParameters(temperature=1.5))
    assert free[-1].usage is not None
    seed = free[-1].usage.seed
    repeated = generate(engine, "x", 16, sampling=SamplingParameters(temperature=1.5, seed=seed))
    assert ids(repeated) == ids(free)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParameters(temperature=1, top_k=1),
        SamplingParameters(temperature=1, top_k=0, top_p=1e-9, min_p=0),
        SamplingParameters(temperature=1, top_k=0, top_p=1, min_p=1),
        SamplingParameters(temperature=1e-6, top_k=0, top_p=1, min_p=0),
    ],
)
def test_samplers_at_their_limit_are_greedy(engine: Engine, sampling: SamplingParameters) -> None:
    """Guards: a sampling parameter that never reaches its sampler."""
    assert ids(generate(engine, "dog", 8, sampling=sampling)) == ids(generate(engine, "dog", 8))


def test_penalties_count_with_greedy(engine: Engine) -> None:
    """Guards: the argmax shortcut taken although penalties change the order."""
    harsh = SamplingParameters(temperature=0, presence_penalty=100, repeat_last_n=200)
    penalized = ids(generate(engine, "dog", 24, sampling=harsh))
    assert len(set(penalized)) == 24


def test_stop_string_that_straddles_tokens(real_engine: Engine) -> None:
    """Guards: a stop string found only within one token, or partly printed."""
    plain = text(generate(real_engine, "The capital of France is", 24))
    stop = plain[10:14]
    events = generate(real_engine, "The capital of France is", 24, stop=(stop,))
    assert text(events) == plain[: plain.index(stop)]
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].token_id is None


def test_endings(engine: Engine) -> None:
    """Guards: a reply that ends without saying why."""
    assert generate(engine, "dog", 3)[-1].finish_reason is FinishReason.LENGTH
    full = generate(engine, "dog", 10_000)
    assert full[-1].finish_reason in (FinishReason.CONTEXT_FULL, FinishReason.STOP)
    assert full[-1].usage is not None
    used = full[-1].usage.prompt_tokens + full[-1].usage.completion_tokens
    assert used <= engine.info.n_context


def test_real_model_stops_by_itself(real_engine: Engine) -> None:
    """Guards: end-of-reply tokens printed or ignored."""
    events = generate(real_engine, (Message("user", "Say only the word: yes"),), 200)
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].token_id is not None
    assert "<|im_end|>" not in text(events)


def test_prompt_that_fills_the_context_is_refused(engine: Engine) -> None:
    """Guards: silent truncation."""
    with pytest.raises(PromptError, match="not sent: the prompt has 256 tokens, the context holds 256"):
        generate(engine, tuple([5] * 256))
    assert ids(generate(engine, tuple([5] * 255)))  # one token of room is enough


def test_cancel_in_the_middle_of_a_reply_keeps_the_cache(engine: Engine) -> None:
    """Guards: an interrupted reply that throws away what was read."""
    numbers, go = itertools.count(), threading.Event()
    stream = held(engine, Request("c", "The quick brown fox", GREEDY), lambda _: next(numbers) >= 20, go)
    seen = [next(stream) for _ in range(5)]
    engine.cancel("c")
    go.set()
    rest = list(stream)
    assert rest[-1].finish_reason is FinishReason.CANCELLED
    again = generate(engine, engine.encode("The quick brown fox") + tuple(ids([*seen, *rest])), 4)
    assert again[-1].usage is not None
    assert again[-1].usage.cached_tokens >= len(engine.encode("The quick brown fox"))


def in_the_middle(event: TokenEvent, length: int) -> bool:
    """True if at least half of a prompt has been read."""
    return event.progress is not None and event.progress.done >= length / 2


def test_abort_in_prefill_leaves_an_exact_cache() -> None:
    """Guards: Ctrl-C that waits for a long prompt, and a cache that then holds half a step."""
    prompt = tuple(3 + index % 200 for index in range(1900))
    with Engine.load(ModelOptions(smollm2(), n_context=2048, n_ubatch=256, n_threads=2)) as engine:
        events: list[TokenEvent] = []
        go = threading.Event()
        request = Request("p", prompt, GREEDY, max_tokens=4)
        # It may read on meanwhile, but not to the end.
        for event in held(engine, request, lambda event: in_the_middle(event, len(prompt)), go):
            events.append(event)
            if event.progress is not None:
                engine.cancel("p")
                go.set()
        assert events[-1].finish_reason is FinishReason.CANCELLED
        read = [event.progress.done for event in events if event.progress]
        assert read[-1] < len(prompt)
        session, core = engine._require_loaded(), engine._core
        assert core is not None
        cached = core.scheduler.cells.tokens(0)
        assert len(cached) == session.context.n_cached(0)
        assert list(prompt[: len(cached)]) == cached
        engine.check()
        # What is cached must be right, not only counted.
        short = prompt[:300]
        events = generate(engine, short, 6)
        assert ids(events) == llama_oracle.greedy(smollm2(), short, 6, n_context=2048)


def test_native_abort_flag_stops_a_running_step() -> None:
    """Guards: the strlen callback no longer being called by a newer llama.cpp."""
    prompt = tuple(3 + index % 200 for index in range(1900))
    with Engine.load(ModelOptions(smollm2(), n_context=2048, n_ubatch=2048, n_threads=1)) as engine:
        context = engine._require_loaded().context
        timer = threading.Timer(0.1, context.abort)
        timer.start()
        # One single step, which takes seconds when nothing stops it.
        assert context.decode([native.Row(0, 0, prompt, 1)]) == native.ABORTED
        timer.join()
        assert context.n_cached(0) == 0
        context.clear_abort()


def test_closing_the_iterator_cancels(engine: Engine) -> None:
    """Guards: an abandoned reply that keeps running and delays the next one."""
    stream = engine.submit(Request("left", "The quick", GREEDY))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert generate(engine, "dog", 2)[-1].finish_reason is FinishReason.LENGTH


def test_requests_wait_their_turn_and_can_be_cancelled_before(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: two requests mixed in one sequence; cancelling one ending the other."""
    go = threading.Event()
    monkeypatch.setattr(engine, "after_step", lambda: go.wait(60))  # called before a prompt is read, too
    first = engine.submit(Request("one", "dog", GREEDY, max_tokens=30))
    second = engine.submit(Request("two", "fox", GREEDY, max_tokens=30))
    engine.cancel("two")
    with pytest.raises(EngineError, match="already running"):
        engine.submit(Request("one", "dog", GREEDY))
    go.set()
    assert [event.finish_reason for event in second][-1] is FinishReason.CANCELLED
    assert [event.finish_reason for event in first][-1] in (FinishReason.LENGTH, FinishReason.STOP)
    engine.cancel("unknown")


def test_a_failed_request_does_not_end_the_engine(engine: Engine) -> None:
    """Guards: the engine's thread dying of one bad prompt."""
    with pytest.raises(PromptError, match="empty"):
        generate(engine, ())
    with pytest.raises(PromptError, match="vocabulary"):
        generate(engine, (10**6,))
    assert ids(generate(engine, "dog", 2))


def test_closed_engine_says_so() -> None:
    """Guards: native handles used after they were freed."""
    engine = Engine.load(ModelOptions(tiny_model()))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.submit(Request("r", "x"))


@pytest.mark.parametrize("count", [1, 8])
def test_active_experts_change_the_logits_as_llama_cpp_does(count: int, tmp_path: Path) -> None:
    """Guards: an override that llama.cpp does not know and ignores."""
    with Engine.load(ModelOptions(tiny_model(), n_experts_per_token=count)) as engine:
        assert engine.info.n_experts_per_token == count
        some = generate(engine, "The quick brown", 12, logprobs=True)
    with Engine.load(ModelOptions(tiny_model())) as engine:
        usual = generate(engine, "The quick brown", 12, logprobs=True)
    assert some[0].logprob != pytest.approx(usual[0].logprob, abs=1e-6)


@pytest.mark.parametrize("count", [0, -1, 9])
def test_active_experts_out_of_range(count: int) -> None:
    """Guards: llama.cpp aborting the process on more experts than there are."""
    with pytest.raises(UsageError, match="out of range"):
        Engine.load(ModelOptions(tiny_model(), n_experts_per_token=count))


@pytest.mark.parametrize(
    ("cache_type", "flash_attention"), [("q8_0", "auto"), ("f32", "off"), ("q4_0", "on"), ("bf16", "auto")]
)
def test_kv_types_and_flash_attention(cache_type: str, flash_attention: str) -> None:
    """Guards: a KV type number that is another type's."""
    options = ModelOptions(
        smollm2(),
        n_context=512,
        cache_type_k=cache_type,
        cache_type_v=cache_type,
        flash_attention=flash_attention,
        n_threads=2,
    )
    with Engine.load(options) as engine:
        assert text(generate(engine, "The capital of France is", 3)).strip().startswith("Paris")


def test_seconds_and_usage_are_consistent(engine: Engine) -> None:
    """Guards: times that run backwards and counts that do not add up."""
    events = generate(engine, "fox", 6)
    times = [event.seconds for event in events]
    assert times == sorted(times)
    usage = events[-1].usage
    assert usage is not None
    assert usage.completion_tokens == len(ids(events))
    assert math.isclose(usage.prompt_seconds + usage.completion_seconds, events[-1].seconds)


def test_events_tell_whether_text_is_held_back(engine: Engine) -> None:
    """Guards: a reply stored while it grows whose text is not that of its tokens."""
    plain = generate(engine, "dog", 40)
    whole = "".join(event.text for event in plain)
    # Some stop strings begin in the reply, but none is in it.
    stops = tuple(f"{letter}\0\0" for letter in {*whole})
    told, ids, held = "", [], 0
    for event in generate(engine, "dog", 40, stop=stops)[:-1]:
        told += event.text
        assert event.token_id is not None
        ids.append(event.token_id)
        text = whole_text(engine, ids)
        assert event.held == (told != text)
        held += event.held
    assert held > 5
    assert not any(event.held for event in plain)


def whole_text(engine: Engine, token_ids: Sequence[int]) -> str:
    """The text of tokens, without half a character at its end."""
    session = engine._loaded
    assert session is not None
    content = b"".join(map(session.model.piece, token_ids))
    return codecs.getincrementaldecoder("utf-8")("replace").decode(content)
