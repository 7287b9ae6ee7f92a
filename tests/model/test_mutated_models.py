"""GGUF headers and config.json files, mutated: an error in words or a result, soon, in bounded memory."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import TINY
from support.mutated_gguf import write_damaged, write_senseless
from support.mutations import damaged_json, try_mutants

from dsmoe_local.model.config_json import config_values
from dsmoe_local.model.report import as_json, report_on

COUNTS = [400, pytest.param(50_000, marks=pytest.mark.soak)]


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("write", [write_damaged, write_senseless])
def test_model_files(write: Callable[[Path, random.Random], None], n: int, tmp_path: Path) -> None:
    """A header that makes the reader raise what nobody catches, run on, or fill the memory."""
    path = tmp_path / "model.gguf"

    def read(rng: random.Random) -> None:
        write(path, rng)
        json.dumps(as_json(report_on(str(path))))

    try_mutants(read, n, seed=1)


@pytest.mark.parametrize("n", COUNTS)
def test_configurations(n: int, tmp_path: Path) -> None:
    """As above, of a config.json with all that one may have."""
    path = tmp_path / "config.json"
    values = config_values(TINY, bos_token_id=0, head_dim=16, quantization_config=None)
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "mscale": 1}
    seeds = [values, values | {"rope_scaling": scaling}]

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_json(rng.choice(seeds), rng))
        json.dumps(as_json(report_on(str(tmp_path))))

    try_mutants(read, n, seed=2)
