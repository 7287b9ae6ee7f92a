"""Observers loaded with a model: in the engine, in its child process, and in the fake engine."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import llama_oracle
from support.fake_engine import FakeEngine
from support.models import tiny_model

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineCrashError, EngineError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.observe.arrays import unpack
from dsmoe_local.engine.observe.registry import OBSERVERS
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import NO_TEMPLATE, ModelOptions, ObserverOptions, Request, SamplingParameters
from dsmoe_local.evaluate import prediction_observers, routing_observers
from dsmoe_local.evaluate.reference import observer_options
from dsmoe_local.evaluate.reference_files import PredictionReader

IDS = (0, *range(20, 58), 5, 5, 300)
GREEDY = SamplingParameters(temperature=0)
Load = Callable[[ModelOptions], Any]


def options(*observers: ObserverOptions, **more: Any) -> ModelOptions:
    return ModelOptions(tiny_model(), n_threads=1, chat_template=NO_TEMPLATE, observers=observers, **more)


def nll_sum(first: int) -> float:
    """Return the negative log-likelihood of the tokens after index `first`."""
    logits = llama_oracle.logits(tiny_model(), IDS).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -float(logprobs[np.arange(len(IDS) - 1), IDS[1:]][first:].sum())


def score(engine: TextEngine, *starts: int) -> None:
    streams = [
        engine.submit(Request(f"r{index}", IDS, GREEDY, max_tokens=4, score_from=start))
        for index, start in enumerate(starts)
    ]
    for stream in streams:
        list(stream)


@pytest.mark.parametrize("load", [Engine.load, EngineClient.load], ids=["in this process", "in a child"])
@pytest.mark.parametrize(
    "more",
    [{}, {"n_parallel": 4}, {"n_parallel": 3, "n_ubatch": 16}, {"n_parallel": 2, "deterministic": True}],
    ids=["alone", "together", "in chunks", "deterministic"],
)
def test_prompts_are_scored(load: Load, more: dict[str, Any]) -> None:
    """Guards: tokens left out because the cache held their prefix, scored twice, or with other logits."""
    with load(options(ObserverOptions("logprobs"), **more)) as engine:
        score(engine, 0, 10, 0)
        score(engine, 10)
        list(engine.submit(Request("not scored", IDS, GREEDY, max_tokens=4)))
        seen = engine.observe("logprobs")
    assert seen["tokens"] == 2 * (len(IDS) - 1) + 2 * (len(IDS) - 11)
    # The cache is F16 here, the oracle's F32.
    assert seen["nll"] == pytest.approx(2 * nll_sum(0) + 2 * nll_sum(10), rel=2e-3)


@pytest.mark.parametrize("load", [Engine.load, EngineClient.load], ids=["in this process", "in a child"])
def test_a_reply_is_traced(load: Load) -> None:
    """Guards: a trace that misses the first token of the reply, or mixes in the prompt."""
    with load(options(ObserverOptions("routing", (("trace", 100),)))) as engine:
        events = list(engine.submit(Request("r", IDS, GREEDY, max_tokens=6)))
        trace = engine.observe("routing")["trace"]
        with pytest.raises(EngineError, match="no observer"):
            engine.observe("logprobs")
    ids = [event.token_id for event in events[:-1]]
    # The last token was chosen, but never read.
    assert trace["token_ids"] == ids[:-1]
    assert trace["positions"] == list(range(len(IDS), len(IDS) + 5))
    assert unpack(trace["experts"]).shape == (5, 2, 3)


@pytest.mark.parametrize("load", [Engine.load, EngineClient.load], ids=["in this process", "in a child"])
def test_unknown_observers_are_refused_at_load(load: Load) -> None:
    """Guards: a misspelt observer that is reported only at the end."""
    with pytest.raises(UsageError, match="no observer 'rooting'"):
        load(options(ObserverOptions("rooting")))


def test_a_reference_is_begun_anew_after_a_crash(tmp_path: Path) -> None:
    """Guards: a file of the dead process that keeps the model from being loaded again."""
    path = tmp_path / "reference"
    with EngineClient.load(options(observer_options("reference", path))) as engine:
        score(engine, 0)
        os.kill(engine.pid, signal.SIGKILL)
        # It may be told of the death, or find it when it asks.
        with contextlib.suppress(EngineCrashError):
            score(engine, 0)
        score(engine, 10)
        n_tokens = engine.observe("reference")["tokens"]
        assert n_tokens in (len(IDS) - 11, 2 * len(IDS) - 12)
    reader = PredictionReader(path)
    assert reader.n_tokens == n_tokens
    reader.close()
    assert list(tmp_path.iterdir()) == [path]


def test_scoring_needs_an_observer_of_logits() -> None:
    """Guards: a scored request that nobody scores."""
    with Engine.load(options(ObserverOptions("routing"))) as engine, pytest.raises(UsageError):
        score(engine, 0)


def test_the_fake_observes_what_it_is_told() -> None:
    """Guards: a fake with observers that were not loaded."""
    engine = FakeEngine(observations={"routing": {"layers": []}})
    assert engine.observe("routing") == {"layers": []}
    with pytest.raises(EngineError, match="no observer 'logprobs' was loaded"):
        engine.observe("logprobs")


def keys_of(value: Any) -> set[str]:
    """Return all field names of a summary, without those of packed arrays."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    if not isinstance(value, dict) or "base64" in value:
        return set()
    return {key for key in value if key.isidentifier()} | set().union(*map(keys_of, value.values()))


def test_documentation_names_every_observer_and_field(tmp_path: Path) -> None:
    """Guards: an undocumented observer, parameter or field."""
    text = (Path(__file__).parents[2] / "docs" / "observers.md").read_text()
    tables = [OBSERVERS, prediction_observers.OBSERVERS, routing_observers.OBSERVERS]
    predictions, choices = tmp_path / "predictions", tmp_path / "choices"
    steps = [
        [observer_options("reference", predictions), observer_options("routing_reference", choices)],
        [
            *(ObserverOptions(name, (("trace", 8),) if name == "routing" else ()) for name in OBSERVERS),
            observer_options("divergence", predictions),
            observer_options("routing_divergence", choices),
        ],
    ]
    fields = set()
    with Engine.load(options()) as engine:
        for observers in steps:
            engine.set_observers(tuple(observers))
            score(engine, 0)
            fields |= {key for each in observers for key in keys_of(engine.observe(each.name))}
    assert {"kl_upper", "captured_mass", "positions", "counts", "perplexity", "tail_mass"} <= fields
    for table in tables:
        fields |= set(table) | {name for entry in table.values() for name in entry.parameters}
    assert {name for name in fields if f"`{name}`" not in text} == set()
