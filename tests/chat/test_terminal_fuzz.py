"""Random keys, pastes, resizes and signals: the chat never dies, loses no turn, and shows what it drew."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chat_fuzz import Played, play

_SOAK_CHATS = 130


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_keys(seed: int, tmp_path: Path) -> None:
    """Guards: keys that end the chat or are lost; turns that are lost; a screen that shows something else."""
    played = play(seed, 200, tmp_path)
    assert played.keys >= 200


@pytest.mark.soak
def test_soak_of_random_keys(tmp_path: Path) -> None:
    """Guards: the same, in situations that a short run does not reach."""
    total = Played()
    for seed in range(_SOAK_CHATS):
        (folder := tmp_path / str(seed)).mkdir()
        total.add(play(seed, 1000, folder))
        print(seed, total, flush=True)
