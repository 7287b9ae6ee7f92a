"""How many requests to decode at once, for a workload and an amount of KV cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import smollm2, tiny_model
from support.tiny_gguf import FILES, write_tiny

from dsmoe_local.engine.load import parallel
from dsmoe_local.engine.load.parallel import (
    DETERMINISTIC_PARALLEL,
    Workload,
    arrange,
    choose_parallel,
)
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.cost import kv_bytes_per_token
from dsmoe_local.model.gguf_model import loaded_tensors, read_model


@given(
    n_requests=st.integers(1, 10_000),
    longest=st.one_of(st.none(), st.integers(1, 20_000)),
    mean=st.integers(1, 3000),
    wanted=st.integers(1, 64),
    room=st.integers(512, 300_000),
    trained=st.sampled_from([512, 2048, 4096, 8192]),
)
def test_every_request_that_the_model_can_hold_fits(
    n_requests: int, longest: int | None, mean: int, wanted: int, room: int, trained: int
) -> None:
    """Guards: a prompt that does not fit because the caches, or the shared one, are too small."""
    chosen = arrange(
        Workload(n_requests, longest, n_requests * mean),
        least=1,
        most=wanted,
        available=room,
        n_trained=trained,
    )
    assert 1 <= chosen.n_parallel <= wanted
    assert chosen.n_context <= room
    of_one = chosen.n_context if chosen.unified else chosen.n_context // chosen.n_parallel
    assert of_one >= min(trained, longest or trained, room // 256 * 256)
    full = arrange(
        Workload(n_requests, longest, n_requests * mean),
        least=1,
        most=wanted,
        available=room,
        n_trained=trained,
        stated=True,
    )
    of_one = full.n_context if full.unified else full.n_context // full.n_parallel
    assert of_one >= min(trained, room // full.n_parallel // 256 * 256)
    assert full.n_context <= room


def test_short_requests_get_separate_caches_and_rare_long_ones_a_shared_one() -> None:
    """Guards: a shared cache where separate ones fit; few sequences where many fit into a shared one."""
    short = arrange(Workload(100, 300, 100 * 200), least=1, most=16, available=32_768, n_trained=4096)
    assert (short.n_parallel, short.unified) == (16, False)
    mixed = arrange(Workload(100, 4000, 100 * 300), least=1, most=16, available=16_384, n_trained=4096)
    assert (mixed.n_parallel, mixed.unified) == (16, True)
    assert mixed.n_context >= 4096


def test_little_memory_means_few_at_once() -> None:
    """Guards: many sequences that constantly preempt each other."""
    tight = arrange(Workload(100, 4000, 100 * 3000), least=1, most=16, available=8192, n_trained=4096)
    assert tight.n_parallel == 2


def test_a_given_number_is_kept() -> None:
    """Guards: --parallel 16 that is reduced; a shared cache where sixteen separate ones fit."""
    asked = arrange(Workload(3, 300, 600), least=16, most=16, available=32_768, n_trained=4096)
    assert (asked.n_parallel, asked.unified) == (16, False)
    tight = arrange(Workload(3, 4000, 9000), least=16, most=16, available=8192, n_trained=4096)
    assert (tight.n_parallel, tight.unified) == (16, True)


def test_the_deterministic_width_does_not_follow_the_work() -> None:
    """Guards: a resumed run with fewer lines left that computes other bits."""
    options = ModelOptions(tiny_model(), deterministic=True)
    first, resumed = (choose_parallel(options, Workload(count, 100, 90 * count)) for count in (1000, 1))
    assert first == resumed
    assert (first.n_parallel, first.unified) == (DETERMINISTIC_PARALLEL, False)


@pytest.mark.parametrize("name", FILES)
def test_as_many_as_fit_beside_the_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: caches of MLA planned as large as others; weights that are not loaded; several engines on a
    machine that each use all of its memory.
    """
    path = write_tiny(tmp_path / "tiny.gguf", replace(FILES[name], n_context=256))
    file, hp = read_model(path)
    weights = sum(tensor.n_bytes for tensor in loaded_tensors(file, hp))
    for n_parallel, n_engines in ((3, 1), (7, 1), (3, 4)):
        # Half of what is left is for the cache.
        room = 2 * n_parallel * 256 * kv_bytes_per_token(hp)
        monkeypatch.setattr(parallel, "available_memory", lambda each=weights + room, n=n_engines: n * each)
        chosen = choose_parallel(ModelOptions(path), Workload(100, None, 100 * 256), n_engines=n_engines)
        assert (chosen.n_parallel, chosen.unified, chosen.n_context) == (n_parallel, False, n_parallel * 256)


@pytest.mark.parametrize(("deterministic", "n_parallel"), [(False, 1), (False, 2), (True, 2)])
def test_a_stated_context_is_used(deterministic: bool, n_parallel: int) -> None:
    """Guards: -c 8192 of which a request may use only 256 tokens, since the lines are short."""
    options = ModelOptions(smollm2(), deterministic=deterministic, n_context=1024)
    n_trained = read_model(options.path)[1].n_context
    chosen = choose_parallel(options, Workload(3, 20, 60), n_parallel)
    assert chosen.n_context is not None
    assert chosen.n_context // n_parallel >= min(n_trained, 1024 // n_parallel)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("loop", [False, True])
def test_the_text_of_a_template_is_counted(tmp_path: Path, deterministic: bool, loop: bool) -> None:
    """Guards: every line refused as too long, since the template's own text was not counted."""
    preamble, turn = "word " * 30, "{{ m.content }}"
    inside = preamble + turn if loop else turn
    template = tmp_path / "long.jinja"
    template.write_text(("" if loop else preamble) + "{% for m in messages %}" + inside + "{% endfor %}")
    options = ModelOptions(smollm2(), deterministic=deterministic, chat_template=str(template))
    plain, short, long = (
        choose_parallel(options, Workload(2, 100, 200, n_messages), 2).n_context or 0
        for n_messages in (0, 1, 2)
    )
    assert plain == 2 * 256
    assert short >= 2 * (100 + 150)
    assert long >= 2 * (100 + 150 * (1 + loop))
