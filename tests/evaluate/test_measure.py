"""Measured perplexity, divergence and routing against torch and a bare loop over `llama_decode`."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import torch_deepseek
from support.checkpoints import TINY, random_weights
from support.fake_engine import FakeEngine
from support.llama_oracle import log_softmax, logits, logprobs
from support.models import tiny_model
from support.tiny_gguf import DENSE, write_tiny

from dsmoe_local.base import progress
from dsmoe_local.base.errors import FormatError, InterruptedRunError, UsageError
from dsmoe_local.base.scratch import scratch_folder
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate import reference as references
from dsmoe_local.evaluate.measure import measure, options_for
from dsmoe_local.evaluate.reference import Reference, compare, keep, record, recorders, unpack
from dsmoe_local.evaluate.results import Comparison, Evaluation
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_local.evaluate.windows import Windows, cut_windows
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

N_CONTEXT = 64
TEXT = Text("test", built_in().content[1000:2200])


def exact(path: Path, **more: Any) -> ModelOptions:
    """Options to compute as the oracles do: an F32 cache, no flash attention."""
    return ModelOptions(
        path, n_threads=1, cache_type_k="f32", cache_type_v="f32", flash_attention="off", **more
    )


def cut(n_context: int = N_CONTEXT) -> Windows:
    with Engine.load(exact(tiny_model(), n_context=256)) as engine:
        return cut_windows(engine, TEXT, n_context)


def torch_logits(window: Sequence[int]) -> NDArray[Any]:
    found: NDArray[Any] = torch_deepseek.logits(random_weights(TINY), TINY, list(window)).numpy()
    return found


def bare_logits(window: Sequence[int]) -> NDArray[Any]:
    return logits(tiny_model(), window)


@pytest.mark.parametrize("oracle", [torch_logits, bare_logits], ids=["torch", "llama_decode"])
@pytest.mark.parametrize("n_context", [32, 63], ids=["many at once", "odd"])
@pytest.mark.parametrize("load", [Engine.load, EngineClient.load], ids=["in this process", "in a child"])
def test_perplexity_is_the_oracles(load: Any, n_context: int, oracle: Any) -> None:
    """Guards: a half too few or too many scored, windows that see each other, a wrong standard error."""
    windows = cut(n_context=n_context)
    first = n_context // 2
    nll = np.concatenate(
        [
            -log_softmax(oracle(window))[np.arange(first, n_context - 1), window[first + 1 :]]
            for window in windows.tokens
        ]
    )
    with load(options_for(exact(tiny_model(), n_ubatch=100), n_context)) as engine:
        result = measure(engine, windows)
    assert len(nll) == windows.n_scored == result.perplexity.n_scored
    perplexity = math.exp(nll.mean())
    assert result.perplexity.perplexity.value == pytest.approx(perplexity, rel=1e-4)
    error = perplexity * math.sqrt((np.square(nll).mean() - nll.mean() ** 2) / (len(nll) - 1))
    assert result.perplexity.perplexity.error == pytest.approx(error, rel=1e-3)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The tiny model as a reference."""
    folder = tmp_path_factory.mktemp("reference")
    with Engine.load(options_for(exact(tiny_model()), N_CONTEXT, *recorders(folder, tiny_model()))) as engine:
        return record(engine, cut_windows(engine, TEXT, N_CONTEXT), folder)[0]


def compared(reference: Reference, path: Path, **more: Any) -> tuple[Evaluation, Comparison]:
    options = options_for(exact(path, **more), N_CONTEXT, *reference.observers(path))
    with Engine.load(options) as engine:
        result = compare(engine, reference)
    assert result.comparison is not None
    return result, result.comparison


def test_a_model_is_like_itself(recorded: Reference) -> None:
    """Guards: windows of one run compared with others of the other; noise between two runs of one model."""
    # In windows of a whole step each, so that the same is computed together.
    result, found = compared(recorded, tiny_model())
    assert found.divergence.kl.value < 1e-6
    assert found.divergence.same_top.value == 1
    assert found.divergence.ratio.value == pytest.approx(1, abs=1e-5)
    assert found.reference_perplexity.perplexity.value == pytest.approx(
        result.perplexity.perplexity.value, rel=1e-5
    )
    assert found.routing is not None
    assert found.routing.same == found.routing.overlap == found.routing.same_everywhere == 1
    assert found.routing.gate_kl < 1e-6


def quantized(word: str, folder: Path) -> Path:
    out = folder / f"{word}.gguf"
    quantize_file(plan_quantization(tiny_model(), resolve(word)), out)
    return out


def test_fewer_bits_are_further_away(recorded: Reference, tmp_path: Path) -> None:
    """Guards: a metric by which a worse file looks better."""
    found = [compared(recorded, quantized(word, tmp_path))[1] for word in ("Q8_0", "Q5_0", "Q4_0")]
    divergences = [each.divergence.kl.value for each in found]
    assert 0 < divergences[0] < 0.01
    assert divergences == sorted(divergences)
    assert divergences[-1] > 10 * divergences[0]
    same = [each.divergence.same_top.value for each in found]
    assert same == sorted(same, reverse=True)
    routing = [each.routing for each in found if each.routing is not None]
    assert [each.overlap for each in routing] == sorted([each.overlap for each in routing], reverse=True)
    assert routing[0].gate_kl < routing[1].gate_kl < routing[2].gate_kl
    assert all(each.same_everywhere <= each.same <= each.overlap < 1 for each in routing)


@pytest.mark.parametrize("top", [4, 64, TINY.n_vocab])
def test_what_is_left_out_stays_within_its_bounds(
    top: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a compressed reference whose stated error is not its error, against full logits; figures of one
    window taken for another's; a small vocabulary of which tokens are left out.
    """
    is_whole = top == TINY.n_vocab
    if not is_whole:
        monkeypatch.setattr(references, "MAX_ENTRIES", top)
        monkeypatch.setattr(references, "COMPLETE_VOCABULARY", 0)
    options = options_for(exact(tiny_model()), N_CONTEXT, *recorders(tmp_path, tiny_model()))
    with Engine.load(options) as engine:
        reference, _ = record(engine, cut_windows(engine, TEXT, N_CONTEXT), tmp_path)
    model = quantized("Q4_0", tmp_path)
    # Several windows in a step.
    result, found = compared(reference, model, n_ubatch=200)
    kl: list[float] = []
    with_tails: list[float] = []
    for window in reference.windows.tokens:
        p, q = (logprobs(path, window)[N_CONTEXT // 2 :] for path in (tiny_model(), model))
        kl.append((np.exp(p) * (p - q)).sum(1).mean())
        with_tails.append(kl[-1] if is_whole else with_one_tail(p, q, top))
    assert len(kl) > 10
    np.testing.assert_allclose(found.divergence.windows, with_tails, rtol=2e-2, atol=1e-5)
    assert found.divergence.kl.value == pytest.approx(np.mean(with_tails), rel=0.01)
    if is_whole:
        assert found.divergence.kl_upper == pytest.approx(found.divergence.kl.value, rel=1e-6)
    else:
        assert found.divergence.kl.value < np.mean(kl) < found.divergence.kl_upper
    written = json.loads(json.dumps(result.as_json()))["comparison"]["divergence"]
    assert written["windows"] == list(found.divergence.windows)


def with_one_tail(p: NDArray[np.float64], q: NDArray[np.float64], top: int) -> float:
    """Return the mean divergence of log-probabilities, with all but the `top` likeliest as one token."""
    likeliest = np.argsort(-p, axis=1)[:, :top]
    p, q = np.take_along_axis(p, likeliest, 1), np.take_along_axis(q, likeliest, 1)
    tail, other = (1 - np.exp(each).sum(1) for each in (p, q))
    return float(((np.exp(p) * (p - q)).sum(1) + tail * np.log(tail / other)).mean())


def test_fewer_experts_than_the_reference(recorded: Reference) -> None:
    """Guards: a model that cannot be compared with itself under other options."""
    _, found = compared(recorded, tiny_model(), n_experts_per_token=2)
    assert found.routing is not None
    assert found.routing.same == 0
    # In the first layer the two are among the three.
    assert found.routing.layers[0].overlap.value == pytest.approx(2 / 3, abs=1e-3)


def test_other_vocabularies_are_refused(recorded: Reference) -> None:
    """Guards: ids of one tokenizer read as those of another."""
    engine = FakeEngine()
    engine.info = replace(engine.info, vocabulary="another")
    with pytest.raises(UsageError, match="different vocabularies"):
        compare(engine, recorded)


def test_a_dense_model_has_no_choices_to_record(tmp_path: Path) -> None:
    """Guards: a dense reference that is refused because it has no routers."""
    names = [option.name for option in recorders(tmp_path, write_tiny(tmp_path / "dense.gguf", DENSE))]
    assert names == ["reference"]


def test_a_kept_reference_is_the_same(recorded: Reference, tmp_path: Path) -> None:
    """Guards: windows, names or records lost on the way through a file; its first windows alone."""
    model = quantized("Q5_0", tmp_path)
    kept = tmp_path / "kept"
    with scratch_folder("eval") as place:
        here = replace(recorded, folder=place)
        for file in recorded.folder.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        keep(here, kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Q5_0.gguf", "kept"]
    assert kept.stat().st_mode & 0o777 == 0o600
    with ExitStack() as stack:
        again = unpack(kept, stack.enter_context(scratch_folder("eval")))
        assert replace(again, folder=recorded.folder) == recorded
        assert compared(again, model)[1] == compared(recorded, model)[1]
        few = unpack(kept, stack.enter_context(scratch_folder("eval")), 2)
        assert compared(few, model)[0].perplexity.n_scored == 2 * (N_CONTEXT // 2 - 1)


def test_what_is_no_kept_reference_is_refused(recorded: Reference, tmp_path: Path) -> None:
    """Guards: a traceback of zipfile, json or numpy; anything that is unpacked larger than it is."""
    about = (recorded.folder / "about.json").read_text()
    fields = json.loads(about)
    for index, (method, content) in enumerate(
        [
            (zipfile.ZIP_STORED, "{}"),
            (zipfile.ZIP_STORED, "["),
            (zipfile.ZIP_STORED, json.dumps(fields | {"n_context": 0})),
            (zipfile.ZIP_STORED, json.dumps(fields | {"version": 2})),
            (zipfile.ZIP_STORED, about),
            (zipfile.ZIP_DEFLATED, about),
        ]
    ):
        path = tmp_path / f"{index}"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("about.json", content)
            if index < 4:
                for name in ("tokens", "predictions", "choices"):
                    archive.write(recorded.folder / name, name)
        place = tmp_path / f"place-{index}"
        place.mkdir()
        with pytest.raises(FormatError, match="not a usable reference"):
            unpack(path, place)


class Stopping:
    """Sets `stop` at the first progress."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.events: list[progress.Event] = []

    def listen(self, event: progress.Event) -> None:
        self.events.append(event)
        if isinstance(event, progress.Advanced):
            self.stop.set()


def test_no_chat_template_is_needed() -> None:
    """Guards: a model that cannot be evaluated because of its template, which is not used."""
    damaged = ModelOptions(tiny_model("{% if %}"))
    with Engine.load(options_for(damaged, N_CONTEXT)) as engine:
        assert engine.info.template is None


def test_a_stop_ends_the_measurement() -> None:
    """Guards: a run that cannot be interrupted, windows that the engine goes on with."""
    stopping = Stopping()
    windows = cut()
    with Engine.load(options_for(exact(tiny_model()), N_CONTEXT)) as engine:
        with pytest.raises(InterruptedRunError):
            measure(engine, windows, stopping.listen, stopping.stop)
        engine.check()
    assert not any(isinstance(event, progress.Finished) for event in stopping.events)


def test_a_crash_is_told() -> None:
    """Guards: a measurement that waits for ever, or goes on in a process that has seen half of the text."""
    with EngineClient.load(options_for(exact(tiny_model()), N_CONTEXT)) as engine:
        killed = False

        def kill(event: progress.Event) -> None:
            nonlocal killed
            if isinstance(event, progress.Advanced) and not killed:
                killed = True
                os.kill(engine.pid, signal.SIGKILL)

        with pytest.raises(EngineError):
            measure(engine, cut(), kill)


def test_progress_adds_up() -> None:
    """Guards: a bar that ends early or runs over, with chunks told twice."""
    events: list[progress.Event] = []
    windows = cut()
    with Engine.load(options_for(exact(tiny_model(), n_ubatch=20), N_CONTEXT)) as engine:
        measure(engine, windows, events.append)
    started = [event for event in events if isinstance(event, progress.Started)]
    amounts = [event.amount for event in events if isinstance(event, progress.Advanced)]
    assert started[0].total == sum(amounts) == windows.n_tokens
    assert min(amounts) >= 0
    assert len(amounts) > len(windows.tokens)


def test_tokens_that_nobody_scored_are_told() -> None:
    """Guards: figures of half a text after the engine's process was replaced."""
    engine = FakeEngine(
        observations={"logprobs": {"tokens": 3, "nll": 1.0, "perplexity": 2.0, "perplexity_error": 0.1}}
    )
    with pytest.raises(EngineError, match="scored 3 of 14 tokens"):
        measure(engine, cut_windows(engine, Text("t", "abcdefgh" * 4), 16))
