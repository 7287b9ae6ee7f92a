"""Recording and comparing predictions, against numpy on llama.cpp's logits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.block_files import resealed
from support.llama_oracle import logprobs
from support.models import tiny_model
from support.observed import observed

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.evaluate.reference import observer_options
from dsmoe_local.evaluate.reference_files import PredictionReader
from dsmoe_local.model.gguf_model import read_model

IDS = [0, *range(20, 58), 5, 5, 300]
OTHER = [0, 5, *range(100, 130)]
PREDICTIONS = "dsmoe_local.evaluate.prediction_observers"


def write_reference(path: Path, **parameters: Any) -> dict[str, Any]:
    with observed(tiny_model(), observer_options("reference", path, **parameters)) as model:
        model.score(IDS, "10", chunk=9)
        model.score(OTHER, "9", chunk=64)
        return model.summary("reference")


def compare(path: Path, model_path: Path | None = None) -> dict[str, Any]:
    with observed(model_path or tiny_model(), observer_options("divergence", path)) as model:
        # In other chunks.
        model.score(IDS, "10", chunk=5)
        model.score(OTHER, "9", chunk=7)
        return model.summary("divergence")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "reference"
    write_reference(path)
    return path


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with another output matrix."""
    path = tmp_path_factory.mktemp("changed") / "changed.gguf"
    shutil.copyfile(tiny_model(), path)
    tensor = read_model(path)[0].tensors["output.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        weights = np.frombuffer(file.read(tensor.n_bytes), np.float32)
        noise = 0.03 * np.random.default_rng(1).standard_normal(len(weights))
        file.seek(tensor.offset)
        file.write((weights + noise).astype(np.float32).tobytes())
    return path


def tail_as_one(p: NDArray[np.float64], q: NDArray[np.float64], top: int, mass: float) -> tuple[float, float]:
    """Return the bounds of a divergence if only the likeliest tokens of p are known."""
    order = np.argsort(-p)
    n = min(top, int((np.cumsum(np.exp(p[order])) < mass).sum()) + 1)
    kept, tail = order[:n], order[n:]
    known = float((np.exp(p[kept]) * (p[kept] - q[kept])).sum())
    m, other = float(np.exp(p[tail]).sum()), float(np.exp(q[tail]).sum())
    if not m:
        return known, known
    return known + m * math.log(m / other), known + m * (float(p[kept].min()) - float(q.min()))


@pytest.mark.parametrize(("top", "mass"), [(256, 0.9999), (5, 1.0), (1, 0.5), (640, 1.0)])
def test_divergence_is_between_its_bounds(top: int, mass: float, changed: Path, tmp_path: Path) -> None:
    """Guards: a divergence on the wrong side, no tail, bounds that are none; window 10 before 9."""
    written = write_reference(tmp_path / "ref", top=top, mass=mass)
    assert written["tokens"] == len(IDS) + len(OTHER) - 2
    summary = compare(tmp_path / "ref", changed)
    assert (summary["tokens"], summary["unmatched"]) == (written["tokens"], 0)
    found = summary["divergence"]
    p = np.concatenate([logprobs(tiny_model(), ids) for ids in (IDS, OTHER)])
    q = np.concatenate([logprobs(changed, ids) for ids in (IDS, OTHER)])
    exact = (np.exp(p) * (p - q)).sum(1)
    kl = found["kl"]["value"]
    assert exact.mean() > 1e-3
    assert 0 <= kl <= exact.mean() + 1e-5
    assert found["kl_upper"] >= exact.mean() - 1e-5
    merged = np.array([tail_as_one(*pair, top, mass) for pair in zip(p, q, strict=True)])
    assert kl == pytest.approx(merged[:, 0].mean(), rel=1e-3)
    assert found["kl_upper"] == pytest.approx(merged[:, 1].mean(), rel=1e-3)
    if top == 640:
        assert kl == pytest.approx(exact.mean(), rel=1e-3)
        assert found["kl_upper"] == pytest.approx(exact.mean(), rel=1e-3)
        assert found["kl"]["error"] == pytest.approx(exact.std(ddof=1) / math.sqrt(len(exact)), rel=1e-3)
        assert found["maximum"] == pytest.approx(exact.max(), rel=1e-3)
        assert found["quantiles"]["0.5"] == pytest.approx(np.quantile(exact, 0.5), rel=1e-3)
    windows = [merged[len(IDS) - 1 :, 0].mean(), merged[: len(IDS) - 1, 0].mean()]
    assert found["windows"] == pytest.approx(windows, rel=1e-3)
    assert found["same_top"]["value"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    targets = np.array([*IDS[1:], *OTHER[1:]])
    nll, reference_nll = (-each[np.arange(len(each)), targets] for each in (q, p))
    ratio = math.exp((nll - reference_nll).mean())
    assert found["ratio"]["value"] == pytest.approx(ratio, rel=1e-4)
    error = ratio * (nll - reference_nll).std(ddof=1) / math.sqrt(len(nll))
    assert found["ratio"]["error"] == pytest.approx(error, rel=1e-2)
    assert summary["reference"]["n_scored"] == len(nll)
    assert summary["reference"]["nll"] == pytest.approx(reference_nll.mean(), rel=1e-4)
    assert summary["reference"]["perplexity"]["value"] == pytest.approx(
        math.exp(reference_nll.mean()), rel=1e-3
    )
    json.dumps(summary, allow_nan=False)


def test_the_model_itself_does_not_diverge(written: Path) -> None:
    """Guards: rounding that makes a model differ from itself, or be closer than itself."""
    found = compare(written)["divergence"]
    assert 0 <= found["kl"]["value"] < 1e-6
    assert found["same_top"]["value"] == 1
    assert found["ratio"]["value"] == pytest.approx(1, abs=1e-6)


def test_other_text_is_unmatched(written: Path) -> None:
    """Guards: predictions of one text compared with those of another."""
    with observed(tiny_model(), observer_options("divergence", written)) as model:
        model.score(OTHER, "10")
        model.score(IDS, "unknown")
        summary = model.summary("divergence")
    assert (summary["tokens"], summary["unmatched"]) == (0, len(IDS) + len(OTHER) - 2)
    assert summary["divergence"]["windows"] == []


def test_reference_keeps_the_likeliest(tmp_path: Path) -> None:
    """Guards: an entry left out for a less likely one; a tail that is not the rest."""
    summary = write_reference(tmp_path / "ref", top=20, mass=0.9)
    reader = PredictionReader(tmp_path / "ref")
    sizes = []
    for position, row in enumerate(logprobs(tiny_model(), IDS)):
        found = reader.find("10", position + 1)
        assert found is not None
        assert found.target == IDS[position + 1]
        order = np.argsort(-row)[: len(found.ids)]
        np.testing.assert_allclose(found.logprobs, row[order], atol=1e-4)
        np.testing.assert_allclose(row[found.ids], row[order], atol=1e-4)
        assert found.tail_mass == pytest.approx(1 - np.exp(row[order]).sum(), abs=1e-4)
        enough = int(np.searchsorted(np.cumsum(np.exp(np.sort(row)[::-1])), 0.9)) + 1
        assert abs(len(found.ids) - min(20, enough)) <= 1
        sizes.append(len(found.ids))
    assert reader.find("10", 0) is None
    assert reader.find("10", len(IDS)) is None
    assert reader.n_tokens == summary["tokens"]
    assert summary["entries_per_token"] >= min(sizes)
    reader.close()


def test_a_reference_is_never_overwritten(written: Path, tmp_path: Path) -> None:
    """Guards: hours of work lost by a second run under the same name."""
    content = written.read_bytes()
    with pytest.raises(FileError, match="exists already"):
        write_reference(written)
    assert written.read_bytes() == content
    with pytest.raises(FileError):
        write_reference(tmp_path / "no" / "folder")


def test_nothing_is_added_to_a_complete_reference(tmp_path: Path) -> None:
    """Guards: tokens after the summary that are dropped, or written behind the end of the file."""
    path = tmp_path / "ref"
    with observed(tiny_model(), observer_options("reference", path)) as model:
        assert model.summary("reference")["tokens"] == 0
        model.score(IDS, "0")
        assert not path.exists()
        assert model.summary("reference") == model.summary("reference")
        with pytest.raises(FileError, match="nothing can be added"):
            model.score(OTHER, "1")
    assert PredictionReader(path).n_tokens == len(IDS) - 1
    assert list(tmp_path.iterdir()) == [path]


def test_another_vocabulary_is_refused(written: Path, tmp_path: Path) -> None:
    """Guards: token ids of one vocabulary looked up in another."""
    content = written.read_bytes()
    assert b'"n_vocab": 640' in content
    (tmp_path / "ref").write_bytes(resealed(content.replace(b'"n_vocab": 640', b'"n_vocab": 641')))
    with pytest.raises(UsageError, match="641 tokens"):
        compare(tmp_path / "ref")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ObserverOptions("divergence", (), PREDICTIONS),
            "needs the parameter",
        ),
        (observer_options("reference", Path("x"), top=0), "out of range"),
        (observer_options("reference", Path("x"), mass=1.5), "out of range"),
        (observer_options("reference", Path("x"), mass=1), "not valid"),
        (observer_options("reference", Path("x"), least=1), "takes no"),
    ],
)
def test_wrong_options_of_references_are_refused(options: ObserverOptions, message: str) -> None:
    """Guards: a misspelt parameter that is ignored, or that ends in a TypeError."""
    with pytest.raises(UsageError, match=message), observed(tiny_model(), options):
        pass
