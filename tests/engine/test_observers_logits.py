"""The observer of log-probabilities against numpy on llama.cpp's logits; options of observers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from support.llama_oracle import logprobs
from support.models import tiny_model
from support.observed import observed

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.errors import EngineError, NativeError
from dsmoe_local.engine.native import Row
from dsmoe_local.engine.observe.logprobs import scored_blocks
from dsmoe_local.engine.observe.observer import Scored
from dsmoe_local.engine.types import ObserverOptions

IDS = [0, *range(20, 58), 5, 5, 300]
OTHER = [0, 5, *range(100, 130)]


def nll(ids: Sequence[int]) -> NDArray[np.float64]:
    return -logprobs(tiny_model(), ids)[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logprobs_equal_numpy(chunk: int) -> None:
    """Guards: targets off by one, and tokens lost where a prompt is cut into chunks."""
    with observed(tiny_model(), ObserverOptions("logprobs")) as model:
        assert model.dispatcher.reads_logits
        assert model.dispatcher.eval_callback is None
        model.score(IDS, chunk=chunk)
        model.score(OTHER, chunk=chunk)
        summary = model.summary("logprobs")
    expected = np.concatenate([nll(IDS), nll(OTHER)])
    assert summary["tokens"] == len(expected)
    assert summary["nll"] == pytest.approx(expected.sum(), rel=1e-4)
    assert summary["nll_squares"] == pytest.approx(np.square(expected).sum(), rel=1e-4)
    perplexity = math.exp(expected.mean())
    assert summary["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    error = perplexity * expected.std(ddof=1) / math.sqrt(len(expected))
    assert summary["perplexity_error"] == pytest.approx(error, rel=1e-3)


def test_only_scored_tokens_count() -> None:
    """Guards: generated tokens, or rows of other requests, taken for the prompt to be scored."""
    with observed(tiny_model(), ObserverOptions("logprobs")) as model:
        part = IDS[:10]
        rows = [Row(0, 0, OTHER[:5], 1), Row(1, 0, part, 4), Row(2, 0, OTHER[:3], 3)]
        model.step(*rows, scored=[None, Scored("r", 7, IDS[7:10]), None])
        model.step(Row(0, 5, [7], 1))
        summary = model.summary("logprobs")
    assert summary["tokens"] == 3
    assert summary["nll"] == pytest.approx(nll(IDS)[6:9].sum(), rel=1e-4)


def test_nothing_scored_is_no_error() -> None:
    """Guards: a division by zero, or NaN in JSON, before the first token."""
    with observed(tiny_model(), ObserverOptions("logprobs")) as model:
        summary = model.summary("logprobs")
    assert (summary["tokens"], summary["perplexity"]) == (0, 1.0)
    json.dumps(summary, allow_nan=False)


def test_logits_that_are_not_finite_are_an_error() -> None:
    """Guards: a perplexity of NaN at the end of a long run."""
    for bad in (np.nan, np.inf):
        logits = np.zeros((1, 8), np.float32)
        logits[0, 3] = bad
        with pytest.raises(NativeError):
            list(scored_blocks([Row(0, 0, [1], 1)], logits, [Scored("r", 1, [2])]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ObserverOptions("nothing"), "no observer"),
        (ObserverOptions("routing", module="dsmoe_local.evaluate.routing_observers"), "no observer"),
        (ObserverOptions("routing", module="dsmoe_local.nothing"), "not a module"),
        (ObserverOptions("routing", module="dsmoe_local.evaluate.text"), "not a module"),
        (ObserverOptions("logprobs", (("path", "x"),)), "takes no"),
        (ObserverOptions("routing", (("trace", True),)), "not valid"),
        (ObserverOptions("routing", (("trace", -1),)), "out of range"),
        (ObserverOptions("routing", (("trace", 1), ("trace", 1))), "not valid"),
    ],
)
def test_wrong_options_are_refused(options: ObserverOptions, message: str) -> None:
    """Guards: a misspelt parameter that is ignored, or that ends in a TypeError."""
    with pytest.raises(UsageError, match=message), observed(tiny_model(), options):
        pass


def test_names_are_unique_and_known() -> None:
    """Guards: the second of two observers of one name replacing the first."""
    with (
        pytest.raises(UsageError, match="given twice"),
        observed(tiny_model(), ObserverOptions("logprobs"), ObserverOptions("logprobs")),
    ):
        pass
    with observed(tiny_model(), ObserverOptions("logprobs")) as model, pytest.raises(EngineError):
        model.summary("routing")
