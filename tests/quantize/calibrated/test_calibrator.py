"""Whole calibrated files: what they contain, how runs continue, and what is refused."""

from __future__ import annotations

import itertools
import re
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.kills import Job
from support.tiny_gguf import FAMILY, MOE, write_tiny

from dsmoe_local.base.errors import FormatError, InterruptedRunError, UsageError
from dsmoe_local.base.progress import Advanced, Event, Note, Started
from dsmoe_local.model.file_type import CALIBRATION_KEY
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.calibrated import calibrator, learned
from dsmoe_quantize.calibrated.blocks import FORMATS, decode
from dsmoe_quantize.calibrated.calibration import Calibration, Rounding
from dsmoe_quantize.calibrated.calibrator import device_of, quantize_calibrated
from dsmoe_quantize.calibrated.network.network import open_network
from dsmoe_quantize.policy.choice import Override, Overrides
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

SMALL = replace(MOE, n_layers=3, n_routed_experts=4)
LAYER_POINTS = ("calibration.states", "calibration.layer", "calibration.journaled")
POINTS = (*LAYER_POINTS, "output.journaled", "output.complete")
LEARNING_POINTS = ("calibration.outputs", "calibration.states", "calibration.layer")


def calibration(rounding: Rounding = Rounding.GPTQ, seed: int = 0) -> Calibration:
    tokens = np.random.default_rng(seed).integers(0, SMALL.n_vocab, (8, 32)).astype(np.int32)
    return Calibration(tokens, "text.txt", "0123456789abcdef", rounding, seed)


def quantize(source: str, rounding: str, out: str) -> None:
    """The work of a child."""
    plan = plan_quantization(Path(source), resolve("q4"))
    quantize_calibrated(plan, Path(out), calibration(Rounding(rounding)), device="cpu", threads=1)


@pytest.fixture
def brief_training(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_training(monkeypatch)


def shorten_training(patch: pytest.MonkeyPatch) -> None:
    for module in (calibrator, learned):
        patch.setattr(module, "STEPS", 3)


def learn_briefly(source: str, out: str) -> None:
    """The work of a child that learns."""
    shorten_training(pytest.MonkeyPatch())
    quantize(source, "learned", out)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "source.gguf", SMALL)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Return all matrices of the layers of a file, decoded by ggml."""
    file, content = read_gguf(path), path.read_bytes()
    found = {}
    for name, info in file.tensors.items():
        if info.type in FORMATS and name.startswith("blk."):
            rows = np.frombuffer(content, np.uint8, info.n_bytes, info.offset)
            found[name] = torch.from_numpy(decode(info.type, rows, info.shape[-1])).view(info.shape)
    return found


def output_error(source: Path, path: Path, tokens: torch.Tensor) -> float:
    """Return how far the last hidden states with a file's matrices are from those of the source."""
    file, hp = read_model(source)
    rounded = weights_of(path)
    with open_network(file, hp) as network, torch.no_grad():
        exact = ours = network.embed(tokens)
        for layer in range(network.n_layers):
            weights = network.weights(layer, torch.device("cpu"))
            exact = network.forward(layer, weights, exact)
            ours = network.forward(
                layer, {**weights, **{n: w for n, w in rounded.items() if n in weights}}, ours
            )
    return float((exact - ours).square().mean())


@pytest.mark.parametrize(("rounding", "most"), [(Rounding.NEAREST, 1.02), (Rounding.GPTQ, 0.8)])
def test_the_error_of_the_whole_model_falls(
    source: Path, tmp_path: Path, rounding: Rounding, most: float
) -> None:
    """A layer that is rounded on the wrong inputs, or whose codes end up in another tensor."""
    quantize_file(plan_quantization(source, resolve("q4")), tmp_path / "plain.gguf")
    quantize(str(source), rounding, str(tmp_path / "ours.gguf"))
    tokens = torch.from_numpy(calibration().tokens).long()
    plain, ours = (output_error(source, tmp_path / f"{name}.gguf", tokens) for name in ("plain", "ours"))
    assert ours < most * plain


def test_learning_improves_on_gptq(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with the outputs of other sequences, or whose result is not what is written.

    Both end in GPTQ's result, which is kept if training does not improve on it.
    """
    monkeypatch.setattr(calibrator, "BATCH_TOKENS", 128)
    tokens = np.random.default_rng(0).integers(0, SMALL.n_vocab, (80, 32)).astype(np.int32)
    training, others = tokens[:40], torch.from_numpy(tokens[40:]).long()
    errors = {}
    for rounding in (Rounding.GPTQ, Rounding.LEARNED):
        out = tmp_path / f"{rounding}.gguf"
        given = Calibration(training, "t", "d", rounding)
        quantize_calibrated(plan_quantization(source, resolve("IQ4_NL")), out, given, device="cpu", threads=1)
        errors[rounding] = output_error(source, out, others)
    assert errors[Rounding.LEARNED] < 0.95 * errors[Rounding.GPTQ]


@pytest.mark.usefixtures("brief_training")
@pytest.mark.parametrize("rounding", list(Rounding))
def test_a_layer_without_a_quantized_matrix(source: Path, tmp_path: Path, rounding: Rounding) -> None:
    """A layer that has nothing to train, or progress that does not add up."""
    overrides = Overrides((Override(re.compile(r"blk\.1\..*"), GgmlType.BF16),))
    plan = plan_quantization(source, resolve("q4"), overrides)
    seen, listen = listener(threading.Event(), 0)
    out = tmp_path / "out.gguf"
    quantize_calibrated(plan, out, calibration(rounding), device="cpu", threads=1, listen=listen)
    assert {name.split(".")[1] for name in weights_of(out)} == {"0", "2"}
    assert_complete(seen)


def test_other_tensors_and_types_stay(source: Path, tmp_path: Path) -> None:
    """Calibration that changes types, the embedding or the metadata of the recipe."""
    plan = plan_quantization(source, resolve("Q4_K_M"))
    plain, ours = tmp_path / "plain.gguf", tmp_path / "ours.gguf"
    quantize_file(plan, plain)
    summary = quantize_calibrated(plan, ours, calibration(), device="cpu", threads=1)
    first, second = read_gguf(plain), read_gguf(ours)
    assert {n: (t.shape, t.type) for n, t in first.tensors.items()} == {
        n: (t.shape, t.type) for n, t in second.tensors.items()
    }
    contents = plain.read_bytes(), ours.read_bytes()
    changed = {
        name
        for name, info in first.tensors.items()
        if contents[0][info.offset :][: info.n_bytes]
        != contents[1][second.tensors[name].offset :][: info.n_bytes]
    }
    assert changed == set(weights_of(plain))
    record = second.get(CALIBRATION_KEY)
    assert record == (
        'rounding = "gptq", text = "text.txt", digest = "0123456789abcdef", tokens = 256, seed = 0'
    )
    assert {key: field for key, field in second.metadata.items() if key != CALIBRATION_KEY} == first.metadata
    assert summary.n_bytes == ours.stat().st_size
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.usefixtures("brief_training")
@pytest.mark.parametrize("name", FAMILY)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """A tensor whose inputs the forward pass does not report, or that cannot be trained."""
    source = write_tiny(tmp_path / "source.gguf", FAMILY[name])
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32) % FAMILY[name].n_vocab
    plan = plan_quantization(source, resolve("Q4_0"))
    given = Calibration(tokens, "t", "d", Rounding.LEARNED)
    quantize_calibrated(plan, tmp_path / "out.gguf", given, device="cpu", threads=1)
    read_model(tmp_path / "out.gguf")


@pytest.mark.parametrize("point", POINTS)
def test_killed_runs_continue(source: Path, tmp_path: Path, point: str) -> None:
    """A layer that is lost, calibrated on its own output, or different after a crash."""
    quantize(str(source), "gptq", str(tmp_path / "expected.gguf"))
    visits = range(1, SMALL.n_layers + (point != "calibration.states")) if point in LAYER_POINTS else (1,)
    for visit in visits:
        folder = tmp_path / f"{visit}"
        folder.mkdir()
        job = Job(quantize, [str(source), "gptq"], folder / "out.gguf")
        assert job.run(f"{point}:{visit}")[0] == -signal.SIGKILL
        assert job.run() == (0, "")
        assert job.out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
        assert [path.name for path in folder.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("point", LEARNING_POINTS)
def test_killed_runs_continue_to_learn(source: Path, tmp_path: Path, point: str) -> None:
    """Training against the outputs of another layer, or with other random numbers after a crash."""
    expected = Job(learn_briefly, [str(source)], tmp_path / "expected.gguf")
    assert expected.run() == (0, "")
    job = Job(learn_briefly, [str(source)], tmp_path / "out.gguf")
    assert job.run(f"{point}:2")[0] == -signal.SIGKILL
    assert job.run() == (0, "")
    assert job.out.read_bytes() == expected.out.read_bytes()


def assert_complete(seen: Sequence[Event]) -> None:
    """Check that the steps of the calibration add up to what was announced."""
    [started] = [event for event in seen if isinstance(event, Started) and event.stage == "calibrating"]
    first = seen.index(started)
    steps = itertools.takewhile(lambda event: isinstance(event, Advanced), seen[first + 1 :])
    assert started.done + sum(event.amount for event in steps if isinstance(event, Advanced)) == started.total


def listener(stop: threading.Event, after: int) -> tuple[list[Event], Callable[[Event], None]]:
    """Return a listener that stops the run after some steps, and the events that it has seen."""
    seen: list[Event] = []

    def listen(event: Event) -> None:
        seen.append(event)
        if sum(isinstance(each, Advanced) for each in seen) == after:
            stop.set()

    return seen, listen


def test_an_interrupted_run_skips_finished_layers(source: Path, tmp_path: Path) -> None:
    """A resume from the first layer, or progress that does not add up."""
    plan, stop = plan_quantization(source, resolve("q4")), threading.Event()
    out = tmp_path / "out.gguf"
    seen, listen = listener(stop, 15)
    with pytest.raises(InterruptedRunError, match="1 of 3 layers calibrated"):
        quantize_calibrated(plan, out, calibration(), device="cpu", threads=1, listen=listen, stop=stop)
    seen, listen = listener(threading.Event(), 0)
    quantize_calibrated(plan, out, calibration(), device="cpu", threads=1, listen=listen)
    assert Note("continuing: 1 of 3 layers are calibrated") in seen
    assert_complete(seen)


def test_other_tokens_start_over(source: Path, tmp_path: Path) -> None:
    """A file that mixes layers of two calibrations."""
    plan, stop = plan_quantization(source, resolve("q4")), threading.Event()
    out = tmp_path / "out.gguf"
    _, listen = listener(stop, 15)
    with pytest.raises(InterruptedRunError):
        quantize_calibrated(plan, out, calibration(), device="cpu", threads=1, listen=listen, stop=stop)
    seen, listen = listener(threading.Event(), 0)
    quantize_calibrated(plan, out, calibration(seed=1), device="cpu", threads=1, listen=listen)
    assert Note("calibrating from the first layer: changed since then: the calibration, the tokens") in seen
    quantize_calibrated(plan, tmp_path / "fresh.gguf", calibration(seed=1), device="cpu", threads=1)
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_experts_without_tokens_are_reported(source: Path, tmp_path: Path) -> None:
    """One token's sequence reaches two of four experts."""
    seen, listen = listener(threading.Event(), 0)
    tokens = np.full((1, 16), 7, np.int32)
    plan = plan_quantization(source, resolve("q4"))
    given = Calibration(tokens, "t", "d")
    quantize_calibrated(plan, tmp_path / "out.gguf", given, device="cpu", threads=1, listen=listen)
    [note] = [event.text for event in seen if isinstance(event, Note) and "experts" in event.text]
    assert note.startswith("8 experts saw fewer than 10 tokens for each input column")
    assert "layer 1 expert" in note


def test_activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Weights that overflow f32, which no check of single weights finds."""
    source = write_tiny(tmp_path / "source.gguf", replace(SMALL, n_layers=2), "f32")
    info = read_gguf(source).tensors["blk.0.ffn_norm.weight"]
    with source.open("r+b") as file:
        file.seek(info.offset)
        file.write(np.full(info.shape, 3e38, np.float32).tobytes())
    plan = plan_quantization(source, resolve("q4"))
    with pytest.raises(FormatError, match=r"the model computes a NaN or an infinity\nblk\.0\.ffn"):
        quantize_calibrated(plan, tmp_path / "out.gguf", calibration(), device="cpu", threads=1)


def test_a_missing_device_is_refused() -> None:
    """torch's own error names none of our options."""
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="torch finds no cuda device\n--device cpu"):
            device_of("cuda")


def test_nothing_to_calibrate(source: Path, tmp_path: Path) -> None:
    """A float type has no codes: minutes of work without effect."""
    plan = plan_quantization(source, resolve("f16"))
    with pytest.raises(UsageError, match="no matrix of a layer is quantized"):
        quantize_calibrated(plan, tmp_path / "ours.gguf", calibration(), device="cpu", threads=1)
