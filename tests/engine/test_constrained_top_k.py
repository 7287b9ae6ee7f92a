"""The tokens that a draw under a grammar chooses from: as many as were asked for, if there are as many."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.models import smollm2

from dsmoe_local.engine import native
from dsmoe_local.engine.native.samplers import Candidates
from dsmoe_local.engine.sampling import TokenSampler, check_request
from dsmoe_local.engine.types import Request, SamplingParameters

GROUPS = 'root ::= ([a-z]{0,9} [0-9]{0,9}){0,30} "."'
AFTER_GROUPS = rb"[a-z0-9]+\.?|\."
RULES = 50
WORDS = f"root ::= {' | '.join(f's{i}' for i in range(RULES))}\n" + "".join(
    f's{i} ::= [a-z] [a-z] "Z" "{i}"\n' for i in range(RULES)
)
AFTER_WORDS = rb"[a-z]{1,2}|[a-z]{2}Z[0-9]?"


@pytest.fixture(scope="module")
def model() -> Iterator[native.Model]:
    loaded = native.Model(smollm2())
    yield loaded
    loaded.close()


@pytest.mark.parametrize("top_k", [1, 40, 1000])
@pytest.mark.parametrize(("grammar", "permitted"), [(GROUPS, AFTER_GROUPS), (WORDS, AFTER_WORDS)])
def test_a_draw_chooses_from_all_that_is_permitted(
    grammar: str, permitted: bytes, top_k: int, model: native.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: top-k under a costly grammar that leaves permitted tokens out, or says that there are none
    where the likeliest ones are all forbidden.
    """
    pieces = [model.piece(i) for i in range(model.n_vocab)]
    allowed = np.array([bool(re.fullmatch(permitted, piece)) for piece in pieces])
    row = np.random.default_rng(5).normal(0, 3, model.n_vocab).astype(np.float32)
    row[[i for i, piece in enumerate(pieces) if re.fullmatch(rb"[a-z]{2}[^Z].*", piece)]] += 20
    row[~allowed] += 30
    drawn: list[int] = []

    def fill(self: Candidates, logits: Any, ids: Any = None) -> None:
        drawn[:] = range(model.n_vocab) if ids is None else ids.tolist()
        real_fill(self, logits, ids)

    real_fill = Candidates.fill
    monkeypatch.setattr(Candidates, "fill", fill)
    request = Request("r", "", SamplingParameters(top_k=top_k), grammar=grammar)
    context = native.Context(model, native.ContextOptions(256, 256, 256, 1, 1))
    sampler = TokenSampler(model, context, request, 7, [], check_request(model, request))
    chosen = sampler.choose(row).token_id
    sampler.close()
    context.close()
    ids = np.flatnonzero(allowed)
    expected = ids[np.argsort(-row[ids], kind="stable")][:top_k].tolist()
    assert sorted(drawn) == sorted(expected)
    assert chosen in expected
