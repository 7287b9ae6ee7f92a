"""Choosing tokens, against llama.cpp's own sampler chain on the same logits and seed, and against numpy."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp  # noqa: TID251 - the oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import llama_oracle
from support.models import smollm2, tiny_model

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine import native
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.sampling import Choice, TokenSampler, check_request, choose_seed
from dsmoe_local.engine.sampling.likeliest import likeliest, near_top
from dsmoe_local.engine.types import Request, SamplingParameters

PROMPT = "Once upon a time, once upon a time, in a land far, far away, there"


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    with llama_oracle.vocabulary(smollm2()) as vocabulary:
        return vocabulary.encode(PROMPT)


@pytest.fixture(scope="module")
def rows(prompt: list[int]) -> Any:
    """What a real model expects after each token of the prompt."""
    return llama_oracle.logits(smollm2(), prompt)


def sample(chain: Any, row: Any) -> int:
    """What llama_sampler_sample does with a row of logits."""
    data = np.zeros(len(row), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    data["id"], data["logit"] = np.arange(len(row)), row
    pointer = ctypes.cast(data.ctypes.data, llama_cpp.llama_token_data_p)
    array = llama_cpp.llama_token_data_array(pointer, len(row), -1, False)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
    chosen = int(data["id"][array.selected])
    llama_cpp.llama_sampler_accept(chain, chosen)
    return chosen


def chain_of(model: native.Model, stages: list[Any]) -> Any:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for stage in stages:
        llama_cpp.llama_sampler_chain_add(chain, stage)
    return chain


def usual_stages(p: SamplingParameters, seed: int, n_vocab: int) -> list[Any]:
    """llama.cpp's own default order."""
    penalties = llama_cpp.llama_sampler_init_penalties(
        n_vocab, p.repeat_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty
    )
    if p.temperature == 0:
        return [penalties, llama_cpp.llama_sampler_init_greedy()]
    temperature = llama_cpp.llama_sampler_init_temp(p.temperature)
    if p.mirostat == 1:
        last = llama_cpp.llama_sampler_init_mirostat(n_vocab, seed, p.mirostat_tau, p.mirostat_eta, 100)
        return [penalties, temperature, last]
    if p.mirostat == 2:
        last = llama_cpp.llama_sampler_init_mirostat_v2(seed, p.mirostat_tau, p.mirostat_eta)
        return [penalties, temperature, last]
    return [
        penalties,
        llama_cpp.llama_sampler_init_top_k(p.top_k),
        llama_cpp.llama_sampler_init_typical(p.typical_p, 1),
        llama_cpp.llama_sampler_init_top_p(p.top_p, 1),
        llama_cpp.llama_sampler_init_min_p(p.min_p, 1),
        temperature,
        llama_cpp.llama_sampler_init_dist(seed),
    ]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParameters(),
        SamplingParameters(temperature=0),
        SamplingParameters(temperature=0, repeat_penalty=1.3),
        SamplingParameters(temperature=0, presence_penalty=1.5, frequency_penalty=0.7, repeat_last_n=16),
        SamplingParameters(temperature=1.3, repeat_penalty=1.2, presence_penalty=-0.5, frequency_penalty=0.2),
        SamplingParameters(temperature=1.5, top_k=5, top_p=1, min_p=0),
        SamplingParameters(temperature=1.5, top_k=200, top_p=0.99, min_p=0),
        SamplingParameters(temperature=2, top_k=0, top_p=0.9, min_p=0),
        SamplingParameters(temperature=2, top_k=0, top_p=1, min_p=0.02),
        SamplingParameters(temperature=2, top_k=0, top_p=1, min_p=0),
        SamplingParameters(temperature=1.2, top_k=0, typical_p=0.5, top_p=1, min_p=0),
        SamplingParameters(temperature=1.2, top_k=100, typical_p=0.6),
        SamplingParameters(temperature=1, mirostat=1),
        SamplingParameters(temperature=1.4, mirostat=2, mirostat_tau=3, mirostat_eta=0.3),
        SamplingParameters(temperature=1, mirostat=2, repeat_penalty=1.5),
    ],
    ids=str,
)
def test_tokens_equal_those_of_the_chain(
    model: native.Model, context: native.Context, prompt: list[int], rows: Any, sampling: SamplingParameters
) -> None:
    """Guards: a stage missing or out of order, a short list that lacks a candidate, penalties that differ."""
    for seed in (0, 11):
        chain = chain_of(model, usual_stages(sampling, seed, model.n_vocab))
        for token_id in prompt:
            llama_cpp.llama_sampler_accept(chain, token_id)
        sampler = TokenSampler(model, context, Request("r", "", sampling), seed, prompt, None)
        before = rows.copy()
        chosen = [sampler.choose(row).token_id for row in rows]
        np.testing.assert_array_equal(rows, before)
        assert chosen == [sample(chain, row) for row in rows]
        sampler.close()
        llama_cpp.llama_sampler_free(chain)


def test_logit_bias_equals_that_of_the_chain(
    model: native.Model, context: native.Context, prompt: list[int], rows: Any
) -> None:
    """Guards: a bias applied after penalties or after top-k; one of a token that is given twice."""
    sampling = SamplingParameters(temperature=1.5, repeat_penalty=1.4)
    bias = [(prompt[1], 6.0), (500, 16.5), (501, -4.0), (model.eos, -100.0)]
    pairs = [llama_cpp.llama_logit_bias(*pair) for pair in bias]
    array = (llama_cpp.llama_logit_bias * len(bias))(*pairs)
    biased = llama_cpp.llama_sampler_init_logit_bias(model.n_vocab, len(bias), array)
    chain = chain_of(model, [biased, *usual_stages(sampling, 5, model.n_vocab)])
    for token_id in prompt:
        llama_cpp.llama_sampler_accept(chain, token_id)
    # One bias in two parts must be the same.
    request = Request("r", "", sampling, logit_bias=((500, 16.0), *bias[:1], (500, 0.5), *bias[2:]))
    sampler = TokenSampler(model, context, request, 5, prompt, None)
    chosen = [sampler.choose(row).token_id for row in rows]
    assert chosen == [sample(chain, row) for row in rows]
    assert 500 in chosen
    sampler.close()
    llama_cpp.llama_sampler_free(chain)


def test_choosers_of_one_context_do_not_disturb_each_other(
    model: native.Model, context: native.Context
) -> None:
    """Guards: state shared between sequences: the buffer of candidates, penalties, random numbers."""
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 3, (12, model.n_vocab)).astype(np.float32)
    kinds = [
        SamplingParameters(temperature=1.5, repeat_penalty=2, repeat_last_n=4),
        SamplingParameters(temperature=1.5, top_k=0, top_p=1, min_p=0),
        SamplingParameters(temperature=0, presence_penalty=5),
    ]

    def choose_all(sampler: TokenSampler) -> list[Choice]:
        return [sampler.choose(row) for row in rows]

    def make(kind: SamplingParameters) -> TokenSampler:
        return TokenSampler(model, context, Request("r", "", kind), 3, [1, 2], None)

    alone = [choose_all(make(kind)) for kind in kinds]
    mixed = [make(kind) for kind in kinds]
    together = [[sampler.choose(row) for sampler in mixed] for row in rows]
    assert [list(column) for column in zip(*together, strict=True)] == alone


def test_logprobs_and_alternatives(model: native.Model, context: native.Context, rows: Any) -> None:
    """Guards: log-probabilities after biases or temperature, alternatives out of order, one too few."""
    sampling = SamplingParameters(temperature=1.7, top_k=0, min_p=0, top_p=1)
    request = Request("r", "", sampling, logprobs=True, top_logprobs=4, logit_bias=((77, 80.0),))
    choice = TokenSampler(model, context, request, 1, [], None).choose(rows[-1])
    row = rows[-1].astype(np.float64)
    logprobs = row - np.logaddexp.reduce(row)
    assert choice.token_id == 77
    assert choice.logprob == pytest.approx(logprobs[77], abs=1e-5)
    first, *others = choice.alternatives
    assert first.token_id == 77
    assert [item.token_id for item in others] == list(np.argsort(-logprobs, kind="stable")[:4])
    for item in choice.alternatives:
        assert item.logprob == pytest.approx(logprobs[item.token_id], abs=1e-5)
        assert item.text == model.text_of(item.token_id)
    plain = TokenSampler(model, context, Request("r", "", sampling), 1, [], None).choose(rows[-1])
    assert plain.logprob is None
    assert plain.alternatives == ()


@given(
    st.integers(1, 3000),
    st.integers(1, 60),
    st.sampled_from([0.001, 1.0, 100.0]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 3]),
)
@settings(max_examples=200)
def test_likeliest_are_those_of_a_full_sort(
    size: int, count: int, spread: float, seed: int, digits: int
) -> None:
    """Guards: a bound that excludes one of the highest; ties, infinities, lists shorter than asked for."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, spread, size), digits).astype(np.float32)
    logits[rng.random(size) < 0.05] = -np.inf
    wanted = np.argsort(-logits, kind="stable")[:count]
    np.testing.assert_array_equal(likeliest(logits, count), wanted)
    assert set(wanted) <= set(near_top(logits, count))


def test_short_list_is_short() -> None:
    """Guards: the shortcut that is taken for granted, and no longer is one."""
    logits = np.random.default_rng(1).normal(0, 3, 102_400).astype(np.float32)
    assert 40 <= len(near_top(logits, 40)) < 400


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers(
    model: native.Model, context: native.Context, value: float, temperature: float
) -> None:
    """Guards: NaN sorted somewhere and sampled, as if the model had said something."""
    logits = np.zeros(model.n_vocab, np.float32)
    logits[model.n_vocab - 2] = value
    sampler = TokenSampler(
        model, context, Request("r", "", SamplingParameters(temperature=temperature)), 1, [1], None
    )
    with pytest.raises(NativeError, match="NaN"):
        sampler.choose(logits)


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6])
def test_tiny_temperatures_are_greedy(
    model: native.Model, context: native.Context, temperature: float
) -> None:
    """Guards: logits that overflow in the division, whose differences are then NaN: the last token wins."""
    logits = np.linspace(1, 30, model.n_vocab, dtype=np.float32)[::-1].copy()
    sampling = SamplingParameters(temperature=temperature, top_k=0, min_p=0, top_p=1)
    sampler = TokenSampler(model, context, Request("r", "", sampling), 1, [1], None)
    assert sampler.choose(logits).token_id == 0


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**40])
def test_bias_of_no_token_is_refused(token_id: int) -> None:
    """Guards: an index error in the middle of a step, which would fail all requests of it."""
    model = native.Model(tiny_model())
    try:
        check_request(model, Request("r", "x", logit_bias=((0, 1.0), (model.n_vocab - 1, 1.0))))
        with pytest.raises(UsageError, match="logit_bias"):
            check_request(model, Request("r", "x", logit_bias=((token_id, 1.0),)))
    finally:
        model.close()


def test_seeds() -> None:
    """Guards: a seed reported where nothing is random, or not the one that was given."""
    assert choose_seed(SamplingParameters(temperature=0, seed=3)) is None
    assert choose_seed(SamplingParameters(seed=3)) == 3
    assert len({choose_seed(SamplingParameters()) for _ in range(8)}) > 1
