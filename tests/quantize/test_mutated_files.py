"""Files that the quantizer reads, mutated: an error in words or a result, soon, in bounded memory."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from support.imatrices import random_imatrix
from support.mutations import damaged_bytes, damaged_json, damaged_text, try_mutants
from support.tiny_gguf import MOE

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError
from dsmoe_local.base.progress import ignore
from dsmoe_local.model.ggml import GgmlType, Tensor
from dsmoe_local.model.gguf_writer import plan_gguf
from dsmoe_quantize.budget.sensitivity import Probe, Probes, Sensitivity, TensorErrors
from dsmoe_quantize.budget.sensitivity_file import read_sensitivity, write_sensitivity
from dsmoe_quantize.imatrix_file import read_imatrix, write_imatrix
from dsmoe_quantize.policy.named_recipes import RECIPES
from dsmoe_quantize.policy.recipe_file import read_recipe, render_recipe
from dsmoe_quantize.policy.recipes import recipe_for
from dsmoe_quantize.policy.types import resolve_for
from dsmoe_quantize.write.unfinished import UnfinishedOutput, journal_of

COUNTS = [300, pytest.param(50_000, marks=pytest.mark.soak)]
ODD = (
    b"nan",
    b"[[types]]",
    b"[types.x]",
    b'"""',
    b"=",
    b"9" * 5000,
    b"{" * 2000,
    b"[" * 2000,
    b"\xff",
    b"\0",
)


@pytest.mark.parametrize("n", COUNTS)
def test_imatrix_in_gguf_form(n: int, tmp_path: Path) -> None:
    """A header, or values, that make a reader raise what nobody catches."""
    path = tmp_path / "m.imatrix.gguf"
    matrix = random_imatrix(MOE)
    write_imatrix(replace(matrix, entries=dict(list(matrix.entries.items())[-4:])), path)
    whole = path.read_bytes()

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_bytes(whole, rng))
        found = read_imatrix(path)
        found.digest()
        for name, entry in found.entries.items():
            found.importance(name, (len(entry.counts), 1, entry.sums.shape[1]))

    try_mutants(read, n, seed=1)


@pytest.mark.parametrize("n", COUNTS)
def test_imatrix_in_the_old_form(n: int, tmp_path: Path) -> None:
    """As above: numbers of four bytes, each of which says how much follows."""
    path = tmp_path / "m.dat"
    entry = struct.pack("<i", 5) + b"blk.0" + struct.pack("<ii4f", 3, 4, 1, 2, 3, 4)
    whole = (
        struct.pack("<i", 2) + entry + entry.replace(b"blk.0", b"blk.1") + struct.pack("<ii", 3, 4) + b"text"
    )

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_bytes(whole, rng))
        found = read_imatrix(path)
        for name, each in found.entries.items():
            found.importance(name, (1, each.sums.shape[1]))

    try_mutants(read, n, seed=2)


@pytest.mark.parametrize("n", COUNTS)
def test_recipes(n: int, tmp_path: Path) -> None:
    """A recipe that makes its reader raise what nobody catches, or that cannot be written again."""
    path = tmp_path / "recipe.toml"
    text = render_recipe(replace(recipe_for(RECIPES["q4"], 3), name="mine")).encode()

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_text(text, rng, ODD))
        recipe = read_recipe(path)
        path.write_text(render_recipe(recipe))
        # What it tells about itself is shortened.
        assert replace(read_recipe(path), about={}) == replace(recipe, about={})
        resolve_for(recipe, MOE)

    try_mutants(read, n, seed=3)


@pytest.mark.parametrize("n", COUNTS)
def test_sensitivities(n: int, tmp_path: Path) -> None:
    """A measurement that makes its reader raise what nobody catches, or that cannot be written again."""
    path = tmp_path / "sensitivity.json"
    errors = {GgmlType.Q4_K: 0.5, GgmlType.Q8_0: 0.001}
    probes = Probes(
        "text", "12", 512, 8, (GgmlType.Q4_0,), 1e-9, {"output": {GgmlType.Q4_0: Probe(0.1, 0.2, 0.01)}}, 9
    )
    tensors = {f"blk.{layer}.attn_q.weight": TensorErrors(64, 32, 2.5, errors) for layer in (1, 2)}
    write_sensitivity(
        Sensitivity("source", "", "0.3", 32, tensors, {"output": 1.0, "routed-down.1": 0.5}, probes), path
    )
    seed = json.loads(path.read_text())

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_json(seed, rng))
        found = read_sensitivity(path)
        write_sensitivity(found, path)
        assert read_sensitivity(path) == found

    try_mutants(read, n, seed=4)


@pytest.mark.parametrize("n", COUNTS)
def test_journals(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged journal that is believed: tensors with holes that are taken for finished ones."""
    monkeypatch.setattr(durable, "sync", lambda descriptor: None)
    monkeypatch.setattr(durable, "sync_folder", lambda folder: None)
    out = tmp_path / "out.gguf"
    plan = plan_gguf({}, [Tensor(f"blk.{number}", (32,), GgmlType.F32) for number in range(9)])
    finished = ["blk.1", "blk.2", "blk.3"]

    def opened() -> UnfinishedOutput:
        return UnfinishedOutput(out, [plan], {"the source": [1, 2]}, ignore, force=False)

    with opened() as part:
        part.journal.append(*finished[:2])
        part.journal.append(*finished[2:])
    whole = journal_of(out).read_bytes()

    def read(rng: random.Random) -> None:
        content = damaged_bytes(whole, rng)
        if rng.random() < 0.3:
            lines = whole.splitlines(keepends=True)
            content = b"".join(rng.choices(lines, k=rng.randrange(6)))
        journal_of(out).write_bytes(content)
        with opened() as part:
            assert part.done == frozenset(finished[: len(part.done)])
            if not part.done:
                raise FileError("the run starts over")

    try_mutants(read, n, seed=5)
