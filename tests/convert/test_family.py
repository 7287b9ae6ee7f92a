"""Every architecture, converted and run by llama.cpp, against its class in transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import llama_oracle
from support.family import MEMBERS, logits, tiny_model, write_member

from dsmoe_convert.convert import convert_folder

IDS = [0, *range(20, 70), 5, 5, 300]
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", MEMBERS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """A tensor split or permuted wrongly; a hyper-parameter that is lost or has another meaning."""
    model = tiny_model(MEMBERS[name])
    folder = write_member(tmp_path / "model", MEMBERS[name], model)
    out = convert_folder(folder, tmp_path / "out.gguf").path
    found, expected = llama_oracle.logits(out, IDS), logits(model, IDS)
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
    assert (found.argmax(1) == expected.argmax(1)).all()
