"""KV caches as files: what is read again is what was computed, and what is no such file is refused."""

from __future__ import annotations

import errno
import os
import queue
import random
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.endless import ENDLESS
from support.models import family_model, smollm2, tiny_model
from support.tiny_gguf import patch_weight

from dsmoe_local.base import progress
from dsmoe_local.base.errors import FormatError
from dsmoe_local.engine import cache_file
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import PromptError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import NO_TEMPLATE, ModelOptions, ObserverOptions, Request, SamplingParameters
from dsmoe_local.model.gguf_file import read_gguf

GREEDY = SamplingParameters(temperature=0)
SHARED = "The quick brown fox jumps over the lazy dog. " * 8
SHAPES: list[Any] = [
    {},
    {"cache_type_k": "f32", "cache_type_v": "f32"},
    {"flash_attention": "off"},
    pytest.param({"n_parallel": 3}, marks=pytest.mark.any_device),
    {"architecture": "deepseek2"},
    pytest.param(
        {"architecture": "deepseek2", "cache_type_k": "q8_0", "cache_type_v": "q8_0"},
        marks=pytest.mark.any_device,
    ),
    {"architecture": "deepseek2", "flash_attention": "off"},
    {"architecture": "deepseek2", "n_parallel": 3},
]


def options(path: Path | None = None, architecture: str = "", **more: Any) -> ModelOptions:
    model = family_model(architecture) if architecture else tiny_model()
    return ModelOptions(path or model, n_threads=1, **{"chat_template": NO_TEMPLATE, **more})


def reply(engine: TextEngine, prompt: tuple[int, ...], count: int = 12) -> list[tuple[int, float | None]]:
    """Ids and log-probabilities, bit by bit."""
    events = engine.submit(Request("r", prompt, GREEDY, max_tokens=count, logprobs=True))
    return [(event.token_id, event.logprob) for event in events if event.token_id is not None]


def n_cached(engine: TextEngine, prompt: tuple[int, ...]) -> int:
    usage = list(engine.submit(Request("r", prompt, GREEDY, max_tokens=1)))[-1].usage
    assert usage is not None
    return usage.cached_tokens


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, tuple[int, ...]]:
    """A file, and the tokens it holds."""
    path = tmp_path / "state"
    with Engine.load(options()) as engine:
        prompt = engine.encode(SHARED)
        reply(engine, prompt, 1)
        assert engine.save_cache(path, prompt) == len(prompt)
    return path, prompt


@pytest.mark.parametrize("more", SHAPES, ids=str)
def test_goes_on_as_if_never_closed(more: dict[str, Any], tmp_path: Path) -> None:
    """Guards: a restored conversation that answers otherwise, or is read again."""
    path = tmp_path / "state"
    with Engine.load(options(**more)) as engine:
        prompt = engine.encode(SHARED)
        told = tuple(token_id for token_id, _ in reply(engine, prompt))
        turn = (*prompt, *told, *engine.encode("And then?"))
        saved = engine.save_cache(path, turn)
        assert saved >= len(prompt)
        expected = reply(engine, turn)
    with Engine.load(options(**more)) as engine:
        assert engine.load_cache(path, turn) == saved
        engine.check()
        assert reply(engine, turn) == expected
        engine.check()
    with Engine.load(options(**more)) as engine:
        engine.load_cache(path, turn)
        assert n_cached(engine, turn) == saved


@pytest.mark.parametrize("more", SHAPES, ids=str)
def test_parts_make_a_whole(more: dict[str, Any], tmp_path: Path) -> None:
    """Guards: a cache of parts that answers otherwise than one that was read; parts that hold more than they
    should; the cache changed by saving a part of it.
    """
    ends = (40, 41, 80)
    with Engine.load(options(**more)) as engine:
        prompt = engine.encode(SHARED)
        reply(engine, prompt, 1)
        expected = reply(engine, prompt[:81])
        for start, end in pairwise((0, *ends)):
            assert engine.save_cache(tmp_path / str(end), prompt[:end], start) == end
            assert engine.save_cache(tmp_path / "none", prompt[:end], end) == 0
            engine.check()
        sizes = [(tmp_path / str(end)).stat().st_size for end in ends]
        assert sizes[1] < sizes[0] / 10
        assert n_cached(engine, prompt[:81]) == 80
        assert reply(engine, prompt[:81]) == expected
    with Engine.load(options(**more)) as engine:
        # Not before what they follow.
        assert engine.load_cache(tmp_path / "41", prompt) == 0
        for end in ends:
            assert engine.load_cache(tmp_path / str(end), prompt) == end
            engine.check()
        assert n_cached(engine, prompt[:81]) == 80
        assert reply(engine, prompt[:81]) == expected
    other = (*prompt[:60], *prompt[70:])
    with Engine.load(options(**more)) as engine:
        # A part that is wanted only in part, behind a slot that holds something else there.
        told = [token_id for token_id, _ in reply(engine, other)]
        reply(engine, tuple(reversed(prompt)), 1)
        reply(engine, prompt[:45], 8)
        for end in ends:
            engine.load_cache(tmp_path / str(end), other)
            engine.check()
        assert n_cached(engine, other) >= 60
        assert [token_id for token_id, _ in reply(engine, other)] == told


@pytest.mark.parametrize("architecture", ["", "deepseek2"])
def test_parts_of_a_random_order(architecture: str, tmp_path: Path) -> None:
    """Guards: books that say more than the cache holds, whatever is saved and loaded in whatever order."""
    generator = random.Random(11)
    with Engine.load(options(architecture=architecture, n_parallel=2, n_context=128)) as engine:
        prompts = [engine.encode(SHARED)[:90], engine.encode("A lazy dog. " + SHARED)[:100]]
        expected = [[token_id for token_id, _ in reply(engine, prompt, 6)] for prompt in prompts]
        files: list[tuple[Path, int, int, int]] = []
        for step in range(120):
            which = generator.randrange(2)
            prompt = prompts[which]
            action = generator.choice(("reply", "save", "load"))
            if action == "reply":
                assert [token_id for token_id, _ in reply(engine, prompt, 6)] == expected[which]
            elif action == "save":
                start, end = sorted(generator.sample(range(91), 2))
                path = tmp_path / str(step)
                count = engine.save_cache(path, prompt[:end], start)
                assert path.exists() == (count > start)
                if count:
                    files.append((path, which, start, count))
            elif files:
                path, which, _, count = generator.choice(files)
                assert engine.load_cache(path, prompts[which]) <= 100
            engine.check()
    assert len(files) > 10


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_real_model_goes_on_too(kind: str, tmp_path: Path) -> None:
    """Guards: a cache of several heads and layers, or of quantized values, restored in another order."""
    path = tmp_path / "state"
    more = {"cache_type_k": kind, "cache_type_v": kind}
    with EngineClient.load(options(smollm2(), n_context=512, **more)) as engine:
        prompt = engine.encode("The capital of France is a city on the river")
        reply(engine, prompt, 1)
        turn = (*prompt, *engine.encode(" which"))
        saved = engine.save_cache(path, turn)
        expected = reply(engine, turn)
    with EngineClient.load(options(smollm2(), n_context=1024, **more)) as engine:
        assert engine.load_cache(path, turn) == saved == len(prompt)
        assert reply(engine, turn) == expected


def test_only_the_common_beginning_is_taken(stored: tuple[Path, tuple[int, ...]]) -> None:
    """Guards: a cache that holds tokens of another conversation behind the common ones."""
    path, prompt = stored
    other = (*prompt[:30], *prompt[40:])
    with Engine.load(options()) as engine:
        reply(engine, prompt, 1)
        expected = reply(engine, other)
    with Engine.load(options()) as engine:
        assert engine.load_cache(path, other) == 30
        engine.check()
        assert reply(engine, other) == expected
        assert engine.load_cache(path, (*prompt[1:],)) == 0
        assert engine.load_cache(path, ()) == 0


def test_what_the_cache_holds_is_no_reason_to_read(stored: tuple[Path, tuple[int, ...]]) -> None:
    """Guards: a longer conversation in the cache replaced by its own beginning."""
    path, prompt = stored
    longer = (*prompt, *prompt[:20])
    with Engine.load(options()) as engine:
        reply(engine, longer, 1)
        assert engine.load_cache(path, longer) == len(longer)
        assert n_cached(engine, longer) == len(longer) - 1


def test_others_make_room(stored: tuple[Path, tuple[int, ...]]) -> None:
    """Guards: more cells promised than there are; a file that is larger than the cache."""
    path, prompt = stored
    with Engine.load(options(n_parallel=2, n_context=128, flash_attention="off")) as engine:
        others = tuple(reversed(prompt))
        reply(engine, others, 1)
        reply(engine, tuple(token_id + 1 for token_id in prompt), 1)
        assert engine.load_cache(path, prompt) == len(prompt)
        engine.check()
        assert reply(engine, prompt, 5)
    with Engine.load(options(n_context=64)) as engine:
        assert engine.load_cache(path, prompt) == 0
        engine.check()
        assert reply(engine, prompt[:40], 5)


def test_nothing_is_written_where_nothing_is_held(tmp_path: Path) -> None:
    """Guards: an empty file taken for a conversation; a cache in parts, whose parts cannot be copied."""
    path = tmp_path / "state"
    with Engine.load(options()) as engine:
        prompt = engine.encode(SHARED)
        assert engine.save_cache(path, prompt) == 0
        reply(engine, prompt, 1)
        assert engine.save_cache(path, prompt[1:]) == 0
    parts: list[dict[str, Any]] = [{"deterministic": True}, {"unified": False}]
    for more in parts:
        with Engine.load(options(n_parallel=2, **more)) as engine:
            reply(engine, prompt[:40], 1)
            assert engine.save_cache(path, prompt[:40]) == 0
            assert engine.load_cache(path, prompt[:40]) == 0
    assert not path.exists()


def test_not_while_a_request_runs(stored: tuple[Path, tuple[int, ...]]) -> None:
    """Guards: cells written or taken that a running step changes."""
    path, prompt = stored
    with Engine.load(options()) as engine:
        stream = engine.submit(Request("r", prompt, GREEDY, n_keep=len(prompt), **ENDLESS))
        next(stream)
        assert engine.save_cache(path.with_name("other"), prompt) == 0
        assert engine.load_cache(path, prompt) == 0
        engine.cancel("r")
        list(stream)
        assert engine.save_cache(path.with_name("other"), prompt) == len(prompt)


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Copies of a file that something happened to where its structure is."""
    for length in (0, 1, 7, 63, 64, 68, len(content) // 2, len(content) - 1):
        yield f"cut at {length}", content[:length]
    yield "longer", content + b"\0"
    yield "without its header", bytes(64) + content[64:]
    rare = random.Random(4)
    n_tokens = int.from_bytes(content[40:48], "little")
    layout = 64 + 4 * n_tokens + 64 + 12 * n_tokens
    for place in sorted({*range(64), *rare.sample(range(64, layout), 200)}):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rare.randrange(8)
        yield f"a bit flipped at {place}", bytes(flipped)


def test_damaged_files_are_refused(stored: tuple[Path, tuple[int, ...]]) -> None:
    """Guards: a layout that llama.cpp asserts on, and a cache that a half-read file leaves behind."""
    path, prompt = stored
    with Engine.load(options()) as engine:
        for what, content in damaged(path.read_bytes()):
            (broken := path.with_name("broken")).write_bytes(content)
            assert engine.load_cache(broken, prompt) == 0, what
        engine.check()
        assert engine.load_cache(path.with_name("missing"), prompt) == 0
        assert engine.load_cache(path.parent, prompt) == 0
        assert engine.load_cache(path, prompt) == len(prompt)


def test_forged_contents_leave_a_sane_cache(
    stored: tuple[Path, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: books that say more than the cache holds, after native code refused a file half-way."""
    path, prompt = stored
    content = bytearray(path.read_bytes())
    start = 64 + 4 * len(prompt) + 64 + 12 * len(prompt)
    # The types of rows lie behind the cells: zeros are the type of another cache.
    content[start - 64 : start + 200] = bytes(264)
    path.write_bytes(content)
    monkeypatch.setattr(cache_file, "_digest", lambda *_: bytes(content[24:40]))
    with Engine.load(options()) as engine:
        expected = reply(engine, prompt)
        reply(engine, tuple(reversed(prompt)), 1)
        assert engine.load_cache(path, prompt) == 0
        engine.check()
        assert reply(engine, prompt) == expected


@pytest.mark.parametrize(
    "more",
    [{"cache_type_k": "f32"}, {"n_experts_per_token": 2}, {"path": "other"}],
    ids=str,
)
def test_files_of_another_shape_are_refused(
    more: dict[str, Any], stored: tuple[Path, tuple[int, ...]]
) -> None:
    """Guards: keys and values of another model, or of other experts, taken for this one's."""
    path, prompt = stored
    if "path" in more:
        more = {"path": tiny_model("{{ messages[0].content }}")}
    with Engine.load(options(**more)) as engine:
        assert engine.load_cache(path, prompt) == 0
        assert reply(engine, prompt, 3)


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_states_end_with_the_file(how: str, tmp_path: Path) -> None:
    """Guards: keys and values of weights that are no longer there: garbage, on every turn."""
    model, path = tmp_path / "model.gguf", tmp_path / "state"
    shutil.copy2(tiny_model(), model)
    with Engine.load(options(model)) as engine:
        prompt = engine.encode(SHARED)
        reply(engine, prompt, 1)
        before = engine.info.cache_identity
        assert engine.save_cache(path, prompt) == len(prompt)
    with Engine.load(options(model)) as engine:
        assert engine.info.cache_identity == before
        assert engine.load_cache(path, prompt) == len(prompt)
    status = model.stat()
    if how == "in place":
        tensor = "blk.1.ffn_up_exps.weight"
        patch_weight(model, tensor, read_gguf(model).tensors[tensor].n_weights // 2, 0.5)
    else:
        shutil.copy2(tiny_model(), tmp_path / "new")
        (tmp_path / "new").replace(model)
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    with Engine.load(options(model)) as engine:
        assert engine.info.cache_identity != before
        assert engine.load_cache(path, prompt) == 0
        assert n_cached(engine, prompt) == 0


def test_what_a_state_depends_on(tmp_path: Path) -> None:
    """Guards: a state of other numbers, or of another layout, taken; one refused that is as good as any."""

    def identity(**more: Any) -> str:
        with Engine.load(options(**more)) as engine:
            return engine.info.cache_identity

    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    same: list[dict[str, Any]] = [
        {},
        {"n_context": 99, "n_batch": 40, "n_ubatch": 20, "n_threads_batch": 2},
        {"n_parallel": 3, "flash_attention": "off"},
        {"chat_template": str(template), "observers": (ObserverOptions("routing"),)},
        {"n_experts_per_token": 3},  # the file's own
    ]
    others: list[dict[str, Any]] = [
        {"n_experts_per_token": 2},
        {"cache_type_k": "f32"},
        {"cache_type_v": "f32"},
        {"flash_attention": "on"},
    ]
    (ours,) = {identity(**more) for more in same}
    assert len({ours, *(identity(**more) for more in others)}) == 1 + len(others)


def test_a_file_that_changes_while_it_is_loaded(tmp_path: Path) -> None:
    """Guards: weights of two files in one model, and its states kept under the name of either."""
    model = tmp_path / "model.gguf"
    shutil.copy2(tiny_model(), model)

    def replace_it(event: progress.Event) -> None:
        if isinstance(event, progress.Started):
            shutil.copy2(tiny_model(), tmp_path / "new")
            (tmp_path / "new").replace(model)

    with pytest.raises(FormatError, match="has changed since"):
        Engine.load(options(model), replace_it)


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a partial file, or a crash from writing to a mapping of a full disk."""
    path = tmp_path / "state"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Engine.load(options()) as engine:
        prompt = engine.encode(SHARED)
        reply(engine, prompt, 1)
        monkeypatch.setattr(os, "posix_fallocate", full)
        assert engine.save_cache(path, prompt) == 0
        assert not path.exists()
        path.write_bytes(b"mine")
        assert engine.save_cache(path, prompt) == 0
        assert path.read_bytes() == b"mine"


def test_files_are_the_users_alone(stored: tuple[Path, tuple[int, ...]]) -> None:
    """Guards: a conversation that others on the machine can read."""
    assert stored[0].stat().st_mode & 0o777 == 0o600


def test_tokens_as_they_are_shown() -> None:
    """Guards: texts that differ from those of log-probabilities; ids beyond the vocabulary."""
    with EngineClient.load(options()) as engine:
        events = list(
            engine.submit(Request("r", "dog", GREEDY, max_tokens=8, logprobs=True, top_logprobs=20))
        )
        shown = {token.token_id: token.text for event in events for token in event.alternatives}
        assert engine.decode(tuple(shown)) == tuple(shown.values())
        assert engine.decode((0,)) != ("",), "special tokens have names"
        assert engine.decode(()) == ()
        for wrong in (-1, engine.info.n_vocab):
            with pytest.raises(PromptError):
                engine.decode((wrong,))


def test_a_shift_tells_what_it_dropped_and_spares_what_is_kept() -> None:
    """Guards: a caller's books that drift from the engine's; a system text dropped, or read again."""
    n_context, n_keep = 64, 20
    with Engine.load(options(n_context=n_context)) as engine:
        ends = tuple((token_id, -100.0) for token_id in range(10))
        prompt = engine.encode(SHARED)[:30]
        books = list(prompt)
        core = engine._core
        assert core is not None
        tokens: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        finish = core.scheduler.finish

        def spy(sequence: Any) -> None:
            tokens.put(list(sequence.tokens))
            finish(sequence)

        core.scheduler.finish = spy  # type: ignore[method-assign]
        request = Request(
            "r", prompt, GREEDY, max_tokens=150, logit_bias=ends, context_shift=True, n_keep=n_keep
        )
        shifts = []
        for event in engine.submit(request):
            if event.dropped:
                shifts.append((event.dropped, event.dropped_from))
                del books[event.dropped_from : event.dropped_from + event.dropped]
            if event.token_id is not None and event.finish_reason is None:
                books.append(event.token_id)
        # The last token is chosen, and never appended.
        assert books[:-1] == tokens.get(timeout=60)
        assert len(shifts) > 2
        assert set(shifts) == {((n_context - n_keep) // 2, n_keep)}
        assert books[:n_keep] == list(prompt[:n_keep])
        assert n_cached(engine, (*books[:n_keep], 99, 98)) == n_keep
        engine.check()


def test_vocabularies_are_told_apart_and_templates_are_not() -> None:
    """Guards: token ids of one tokenizer read with another; ids thrown away for a template's sake."""
    template = "{{ messages[0].content }}"
    own_template = options(tiny_model(template), chat_template=None)
    with Engine.load(options()) as plain, Engine.load(own_template) as templated:
        assert plain.info.vocabulary == templated.info.vocabulary
        assert plain.info.template_text != templated.info.template_text == template
        with Engine.load(options(smollm2(), n_context=64)) as other:
            assert other.info.vocabulary != plain.info.vocabulary
