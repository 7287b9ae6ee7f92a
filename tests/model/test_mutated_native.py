"""Mutated model files that our reader accepts, loaded and run by llama.cpp: it never dies of one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.llama_child import LlamaChild
from support.mutated_gguf import write_damaged, write_senseless
from support.raw_gguf import Q8_0, Tensor, tiny_model

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.model.gguf_model import read_any_model


@pytest.mark.parametrize("n", [150, pytest.param(50_000, marks=pytest.mark.soak)])
def test_what_is_accepted_can_be_run(n: int, tmp_path: Path) -> None:
    """A value that our reader knows nothing of, and on which llama.cpp aborts."""
    path = tmp_path / "model.gguf"
    n_accepted = 0
    with LlamaChild() as child:
        for number in range(n):
            rng = random.Random(f"native:{number}")
            rng.choice((write_damaged, write_senseless, write_senseless))(path, rng)
            try:
                read_any_model(path)
            except DsmoeError:
                continue
            n_accepted += 1
            assert child.survives(path), f"llama.cpp dies of the mutant native:{number}"
    assert n_accepted >= n // 20


def test_a_death_is_noticed(tmp_path: Path) -> None:
    """A child whose death is taken for an answer."""
    path = tmp_path / "model.gguf"
    with LlamaChild() as child:
        assert child.survives(tiny_model().write(path))
        assert not child.survives(
            tiny_model().with_tensor(Tensor("output_norm.weight", (64,), Q8_0)).write(path)
        )
        assert child.survives(tiny_model().write(path))
