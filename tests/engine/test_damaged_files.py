"""Files that observers and the KV cache leave, damaged anywhere: refused in words, or what they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.block_files import resealed
from support.models import tiny_model
from support.mutations import Outcome, damaged_bytes, try_mutants

from dsmoe_local.base.errors import DsmoeError, FormatError
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import ModelOptions, Request, SamplingParameters
from dsmoe_local.evaluate.measure import options_for
from dsmoe_local.evaluate.reference import keep, observer_options, recorders, unpack
from dsmoe_local.evaluate.reference import record as record_reference
from dsmoe_local.evaluate.reference_files import PredictionReader, RoutingReader
from dsmoe_local.evaluate.windows import Windows

GREEDY = SamplingParameters(temperature=0)
IDS = tuple(range(20, 70))
READERS: dict[str, Callable[[Path], PredictionReader | RoutingReader]] = {
    "predictions": PredictionReader,
    "choices": RoutingReader,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind: `predictions`, `choices`, `kept` and `state`."""
    folder = tmp_path_factory.mktemp("written")
    work = folder / "work"
    work.mkdir()
    windows = Windows((IDS[:32], IDS[16:48]), "text", "digest", "vocabulary")
    options = options_for(
        ModelOptions(tiny_model(), n_threads=1, n_ubatch=64, flash_attention="off"),
        32,
        *recorders(work, tiny_model()),
    )
    with Engine.load(options) as engine:
        reference = record_reference(engine, windows, work)[0]
        keep(reference, folder / "kept")
        list(engine.submit(Request("r", IDS[:40], GREEDY, max_tokens=1)))
        assert engine.save_cache(folder / "state", IDS[:40])
    for name in READERS:
        (folder / name).write_bytes((work / name).read_bytes())
    return folder


def contents(reader: PredictionReader | RoutingReader) -> list[Any]:
    """All that a reader finds, in numbers that can be compared."""
    found: list[Any] = []
    for request in ("0", "1"):
        for index in range(34):
            told = reader.find(request, index)
            if told is None:
                found.append(None)
            else:
                values = [getattr(told, name) for name in type(told).__slots__]
                found.append([np.asarray(value).tolist() for value in values])
    return found


def read_mutants(name: str, written: Path, n: int, seed: int) -> Outcome:
    """Damaged copies of a reference. One that is read at all must say what was written."""
    make, path = READERS[name], written / f"damaged {name}"
    content = (written / name).read_bytes()
    whole = make(written / name)
    expected = contents(whole)
    whole.close()
    assert sum(told is not None for told in expected) == 2 * 15

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_bytes(content, rng) if rng.random() < 0.98 else content)
        reader = make(path)
        assert contents(reader) == expected
        reader.close()

    return try_mutants(read, n, seed)


def read_forgeries(name: str, written: Path, n: int, seed: int) -> Outcome:
    """Copies whose numbers were changed by somebody who makes the checksums right again."""
    make, path = READERS[name], written / f"forged {name}"
    content = (written / name).read_bytes()

    def read(rng: random.Random) -> None:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 2, 4))):
            at = rng.randrange(8, len(changed))
            changed[at] = rng.randrange(256)
        try:
            sealed = resealed(bytes(changed))
        except Exception as error:
            raise FormatError("cut") from error  # its lengths are changed: nothing to seal
        path.write_bytes(sealed)
        reader = make(path)
        try:
            contents(reader)
        finally:
            reader.close()

    return try_mutants(read, n, seed)


def compare_mutants(written: Path, n: int, seed: int) -> Outcome:
    """Damaged and forged copies, compared with by a model: each an error of the request that met it."""
    paths = {name: written / f"compared {name}" for name in READERS}

    def read(rng: random.Random) -> None:
        for name, path in paths.items():
            changed = bytearray((written / name).read_bytes())
            if rng.random() < 0.7:
                changed[rng.randrange(12, len(changed))] = rng.randrange(256)
            try:
                path.write_bytes(resealed(bytes(changed)))
            except Exception as error:
                raise FormatError("cut") from error
        engine.set_observers(
            (
                observer_options("divergence", paths["predictions"]),
                observer_options("routing_divergence", paths["choices"]),
            )
        )
        list(engine.submit(Request("0", IDS[:32], GREEDY, max_tokens=1, score_from=0)))
        assert engine.observe("divergence")["tokens"] <= 31

    with Engine.load(ModelOptions(tiny_model(), n_threads=1)) as engine:
        return try_mutants(read, n, seed)


def load_mutants(written: Path, n: int, seed: int) -> tuple[int, int]:
    """Damaged states. What is not values must be right; with other values the engine goes on, or says that
    they are none. Returns how many were refused, and how many loaded.
    """
    path = written / "damaged state"
    content = (written / "state").read_bytes()
    prompt = IDS[:40]
    layout = 56 + 4 * len(prompt) + 64 + 12 * len(prompt)
    refused = loaded = 0
    with Engine.load(ModelOptions(tiny_model(), n_threads=1)) as engine:
        for number in range(n):
            rng = random.Random(f"{seed}:{number}")
            changed = damaged_bytes(content, rng)
            path.write_bytes(changed)
            engine._between_steps(lambda core: core.scheduler.forget_idle())
            count = engine.load_cache(path, prompt)
            engine.check()
            if changed[:layout] != content[:layout] or len(changed) != len(content):
                assert count == 0, f"{seed}:{number}"
            refused, loaded = refused + (not count), loaded + bool(count)
            try:
                assert list(engine.submit(Request("r", prompt, GREEDY, max_tokens=2)))
            except DsmoeError as error:
                if "NaN or infinity" not in str(error):
                    raise
        engine.check()
    return refused, loaded


def unpack_mutants(written: Path, n: int, seed: int) -> Outcome:
    """Damaged kept references. One that is unpacked at all must hold what was kept."""
    content, folder, path = (written / "kept").read_bytes(), written / "again", written / "damaged kept"
    folder.mkdir(exist_ok=True)
    expected = unpack(written / "kept", folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_bytes(content, rng) if rng.random() < 0.98 else content)
        for file in folder.iterdir():
            file.unlink()
        assert unpack(path, folder) == expected
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == files

    return try_mutants(read, n, seed)


@pytest.mark.parametrize("name", READERS)
def test_damaged_references(name: str, written: Path) -> None:
    """Guards: a reference with a changed byte that is compared with, or that ends in a traceback."""
    outcome = read_mutants(name, written, 400, 1)
    assert outcome.refused > 300


@pytest.mark.parametrize("name", READERS)
def test_forged_references(name: str, written: Path) -> None:
    """Guards: a file from elsewhere, with right checksums, that numpy or the reader fails in."""
    read_forgeries(name, written, 400, 2)


def test_references_met_by_a_model(written: Path) -> None:
    """Guards: a damaged reference that ends the engine, or requests that ask for something else."""
    compare_mutants(written, 60, 3)


def test_damaged_states(written: Path) -> None:
    """Guards: a state with a changed layout, or other tokens, that native code reads."""
    refused, loaded = load_mutants(written, 150, 4)
    assert refused
    assert loaded


def test_damaged_kept_references(written: Path) -> None:
    """Guards: an archive with a changed byte that is unpacked as something else, or in a traceback."""
    unpack_mutants(written, 300, 5)


@pytest.mark.soak
def test_soak_damaged_files(written: Path) -> None:
    """The same, tens of thousands of times."""
    for name in READERS:
        sys.stderr.write(f"\n{name}: damaged {read_mutants(name, written, 20_000, 6)}")
        sys.stderr.write(f", forged {read_forgeries(name, written, 10_000, 7)}\n")
    sys.stderr.write(f"compared by a model: {compare_mutants(written, 3_000, 8)}\n")
    sys.stderr.write(f"states: refused, loaded: {load_mutants(written, 5_000, 9)}\n")
    sys.stderr.write(f"kept references: {unpack_mutants(written, 10_000, 10)}\n")
