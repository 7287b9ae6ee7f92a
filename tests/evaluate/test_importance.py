"""Collected importance matrices against torch; resuming, merging, and the coverage of experts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.checkpoints import TINY, random_weights
from support.models import tiny_model
from support.observed import stacked_squares, torch_inputs

from dsmoe_local.base.errors import FileError, InterruptedRunError, LockedError
from dsmoe_local.base.progress import Advanced, Event, Note
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineCrashError, EngineError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Observation
from dsmoe_local.evaluate.importance import ACTIVATIONS, Collected, collect, importance_file
from dsmoe_local.evaluate.importance_coverage import coverage_of
from dsmoe_local.evaluate.measure import options_for
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_local.evaluate.windows import Windows, cut_windows
from dsmoe_quantize.imatrix import MIN_TOKENS, Imatrix, Statistics, merged
from dsmoe_quantize.imatrix_file import read_imatrix

N_CONTEXT = 64
TEXT = Text("a text", built_in().content[1000:1600])


def options(**more: Any) -> ModelOptions:
    """Options to compute as torch does: an F32 cache, no flash attention. Two windows share a step."""
    exact = ModelOptions(
        tiny_model(), n_threads=1, cache_type_k="f32", cache_type_v="f32", flash_attention="off", n_ubatch=128
    )
    return options_for(replace(exact, **more), N_CONTEXT, ACTIVATIONS)


@pytest.fixture(scope="module")
def windows() -> Windows:
    with Engine.load(options()) as engine:
        found = cut_windows(engine, TEXT, N_CONTEXT)
    assert len(found.tokens) >= 7
    return found


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.load(options()) as loaded:
        yield loaded


def run(engine: TextEngine, windows: Windows, out: Path, **more: Any) -> Collected:
    with importance_file(out) as place:
        return collect(engine, windows, place, **more)


def part(windows: Windows, first: int, last: int) -> Windows:
    return replace(windows, tokens=windows.tokens[first:last])


def assert_alike(found: Imatrix, expected: Imatrix) -> None:
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
        np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=1e-5)


def of_torch(windows: Windows) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Return sums and counts of each matrix's inputs, computed by torch."""
    total: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
    for window in windows.tokens:
        seen = stacked_squares(torch_inputs(random_weights(TINY), TINY, list(window)), TINY)
        for name, (sums, counts) in seen.items():
            before = total.get(name, (np.zeros_like(sums), np.zeros(len(counts), np.int64)))
            total[name] = before[0] + sums, before[1] + counts
    return total


@pytest.mark.parametrize("with_output", [False, True], ids=["layers", "output, too"])
def test_sums_are_torchs(tmp_path: Path, engine: Engine, windows: Windows, with_output: bool) -> None:
    """Guards: tokens that the last layer leaves out, experts mixed up, a window's first token read once for
    all, sums of means, the output matrix in a file that should not have it.
    """
    out = tmp_path / "a.imatrix.gguf"
    collected = run(engine, windows, out, with_output=with_output)
    expected = of_torch(windows)
    wanted = {name for name in expected if name.startswith("blk.") or with_output}
    for imatrix in (collected.imatrix, read_imatrix(out)):
        assert imatrix.entries.keys() == wanted
        assert (imatrix.n_chunks, imatrix.chunk_size) == (len(windows.tokens), N_CONTEXT)
        assert imatrix.datasets == ("a text",)
        for name in wanted:
            entry = imatrix.entries[name]
            assert entry.counts.tolist() == expected[name][1].tolist(), name
            scale = expected[name][0].max()
            np.testing.assert_allclose(entry.sums, expected[name][0], rtol=2e-3, atol=1e-5 * scale)
    assert collected.perplexity > 1
    assert collected.n_windows == len(windows.tokens)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_coverage_counts_what_torch_chose(tmp_path: Path, engine: Engine, windows: Windows) -> None:
    """Guards: experts in the wrong order, layers without routers counted, shares instead of tokens."""
    imatrix = run(engine, windows, tmp_path / "a").imatrix
    found, expected = coverage_of(imatrix), of_torch(windows)
    assert found.n_tokens == len(windows.tokens) * N_CONTEXT
    assert [layer.layer for layer in found.layers] == list(range(TINY.n_dense_layers, TINY.n_layers))
    every = []
    for layer in found.layers:
        counts = expected[f"blk.{layer.layer}.ffn_gate_exps.weight"][1].tolist()
        assert list(layer.counts) == counts
        assert sum(counts) == found.n_tokens * TINY.n_experts_per_token
        assert [counts[expert] for expert in layer.coldest] == sorted(counts)
        every += [(count, layer.layer, expert) for expert, count in enumerate(counts)]
    assert found.coldest(5) == sorted(every)[:5]
    assert found.n_cold == sum(count < MIN_TOKENS for count, _, _ in every)
    told = found.as_json()
    assert told["experts"] == len(every)
    assert told["layers"][0]["counts"] == list(found.layers[0].counts)


def test_experts_that_were_never_chosen() -> None:
    """Guards: an expert without tokens that is reported as warm, or left out."""
    entry = Statistics(np.zeros((3, 4), np.float32), np.array([MIN_TOKENS, 0, MIN_TOKENS - 1]))
    (layer,) = coverage_of(Imatrix({"blk.3.ffn_down_exps.weight": entry}, (), 1, MIN_TOKENS)).layers
    assert (layer.layer, layer.coldest, layer.n_cold, layer.n_unseen) == (3, (1, 2, 0), 2, 1)


def test_an_interrupted_run_goes_on(tmp_path: Path, windows: Windows) -> None:
    """Guards: windows read twice or never, sums of a window that was not finished, a part left behind."""
    stop = threading.Event()
    notes: list[Event] = []
    out, expected = tmp_path / "out", tmp_path / "expected"
    n_read = 0

    def listen(event: Event) -> None:
        nonlocal n_read
        n_read += event.amount if isinstance(event, Advanced) else 0
        if n_read > 4 * N_CONTEXT:
            stop.set()

    kept = f"4 of {len(windows.tokens)} windows are kept"
    with Engine.load(options()) as engine, pytest.raises(InterruptedRunError, match=kept):
        run(engine, windows, out, save_every=2, stop=stop, listen=listen)
    assert not out.exists()
    with Engine.load(options()) as engine:
        collected = run(engine, windows, out, save_every=2, listen=notes.append)
    assert collected.n_windows == len(windows.tokens) - 4
    assert Note(f"continuing an interrupted run: 4 of {len(windows.tokens)} windows are done") in notes
    with Engine.load(options()) as engine:
        whole = run(engine, windows, expected)
    assert_alike(read_imatrix(out), read_imatrix(expected))
    assert collected.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


@pytest.mark.parametrize(
    "what", ["the text", "the windows", "the active experts", "the output matrix", "damage"]
)
def test_another_run_starts_over(tmp_path: Path, windows: Windows, what: str) -> None:
    """Guards: sums of two texts or models in one file, and a restart that nobody is told of."""
    out = tmp_path / "out"
    notes: list[Event] = []
    with Engine.load(options()) as engine, importance_file(out) as place:
        collect(engine, part(windows, 0, 2), place)
        out.rename(place.part)
    more: dict[str, Any] = {"with_output": True} if what == "the output matrix" else {}
    changed = {
        "the text": replace(windows, text_digest="another"),
        "the windows": replace(windows, tokens=tuple(window[:32] for window in windows.tokens)),
    }
    if what == "damage":
        place.part.write_bytes(place.part.read_bytes()[:-100])
    given = options(n_experts_per_token=2) if what == "the active experts" else options()
    with Engine.load(given) as engine:
        collected = run(engine, changed.get(what, windows), out, listen=notes.append, **more)
    assert collected.n_windows == len(windows.tokens)
    (note,) = (event.text for event in notes if isinstance(event, Note))
    assert note.startswith("starting over")
    assert ("damaged" if what == "damage" else what) in note


def test_more_windows_go_on_fewer_start_over(tmp_path: Path, windows: Windows) -> None:
    """Guards: a part of more windows than are asked for, taken as it is."""
    out = tmp_path / "out"
    for first, second, expected in ((2, 5, 3), (5, 2, 2)):
        with Engine.load(options()) as engine, importance_file(out) as place:
            collect(engine, part(windows, 0, first), place)
            out.rename(place.part)
        with Engine.load(options()) as engine:
            assert run(engine, part(windows, 0, second), out).n_windows == expected
        out.unlink()


def test_parts_of_a_text_add_up(tmp_path: Path, windows: Windows) -> None:
    """Guards: a merge that is not what one run over both gives."""
    parts = []
    for number, (first, last) in enumerate(((0, 3), (3, 7), (0, 7))):
        with Engine.load(options()) as engine:
            run(engine, part(windows, first, last), tmp_path / f"{number}")
        parts.append(read_imatrix(tmp_path / f"{number}"))
    total = merged(parts[:2])
    assert total.n_chunks == 7
    assert_alike(total, parts[2])


def test_in_a_process_of_its_own(tmp_path: Path, windows: Windows) -> None:
    """Guards: sums that lose digits on their way to this process."""
    with EngineClient.load(options()) as engine:
        found = run(engine, windows, tmp_path / "client").imatrix
    with Engine.load(options()) as engine:
        assert_alike(found, run(engine, windows, tmp_path / "engine").imatrix)


def test_a_crash_keeps_what_was_saved(tmp_path: Path, windows: Windows) -> None:
    """Guards: sums that died with the engine's process, and are believed to be there."""
    out = tmp_path / "out"
    n_read = 0
    with EngineClient.load(options()) as engine:

        def listen(event: Event) -> None:
            nonlocal n_read
            n_read += event.amount if isinstance(event, Advanced) else 0
            if n_read == 4 * N_CONTEXT:
                n_read += 1
                engine.kill()

        with pytest.raises((EngineCrashError, EngineError)):
            run(engine, windows, out, save_every=2, listen=listen)
        collected = run(engine, windows, out, save_every=2)
    assert 0 < collected.n_windows < len(windows.tokens)
    with Engine.load(options()) as fresh:
        assert_alike(read_imatrix(out), run(fresh, windows, tmp_path / "expected").imatrix)


class Forgetful:
    """An engine whose observers have seen only a part of the tokens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def observe(self, name: str) -> Observation:
        seen = self._engine.observe(name)
        for entry in seen.get("inputs", []):
            entry["counts"] = (
                {**entry["counts"], "base64": "AAAAAAAAAAA="} if _is_one(entry) else entry["counts"]
            )
        return seen


def _is_one(entry: dict[str, Any]) -> bool:
    return bool(entry["counts"]["shape"] == [1])


def test_what_is_missing_is_noticed(tmp_path: Path, engine: Engine, windows: Windows) -> None:
    """Guards: a matrix of fewer tokens than it says, after the engine's process was replaced unseen."""
    forgetful: Any = Forgetful(engine)
    with pytest.raises(EngineError, match=f"processed 0 of {len(windows.tokens) * N_CONTEXT} tokens"):
        run(forgetful, windows, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_output_is_not_written_over(tmp_path: Path) -> None:
    """Guards: hours of collecting written over, two runs in one file."""
    out = tmp_path / "out"
    out.write_text("precious")
    with pytest.raises(FileError, match="exists already"), importance_file(out):
        pass
    with importance_file(out, force=True), pytest.raises(LockedError), importance_file(out, force=True):
        pass
    with pytest.raises(FileError, match="folder does not exist"), importance_file(tmp_path / "no" / "out"):
        pass
    assert out.read_text() == "precious"
