"""Perplexity and divergence against `llama-perplexity`, if it is on the PATH."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.models import smollm2

from dsmoe_local.evaluate.text import built_in
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

TOOL = shutil.which("llama-perplexity") or ""
pytestmark = pytest.mark.skipif(not TOOL, reason="llama-perplexity is not on the PATH")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(built_in().content[:12_000] + "\n")
    return path


def theirs(*arguments: str | Path) -> str:
    command = [TOOL, "-t", "2", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def number(name: str, output: str) -> tuple[float, float]:
    """Return a value and its error; 0 if it has none."""
    found = re.search(rf"{re.escape(name)} *[:=] +([\d.]+)(?: *(?:\+/-|±) +([\d.]+))?", output)
    assert found is not None, output
    return float(found[1]), float(found[2] or 0)


def ours(*arguments: str | Path) -> dict[str, Any]:
    code = "from dsmoe_local.cli.main import dsmoe; dsmoe()"
    command = [sys.executable, "-c", code, "eval", "-t", "2", "--json", *map(str, arguments)]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    return found


@pytest.mark.parametrize("n_context", ["128", "512"])
def test_perplexity_is_llama_cpps(n_context: str, text: Path) -> None:
    """Guards: other windows, other tokens, or another half than llama.cpp's: 0.1% is all that may differ."""
    options = ("-c", n_context, "--chunks", "4")
    value, error = number("PPL", theirs("-m", smollm2(), "-f", text, *options))
    found = ours(smollm2(), "--text", text, *options)["perplexity"]["perplexity"]
    assert found["value"] == pytest.approx(value, rel=1e-3)
    assert found["error"] == pytest.approx(error, rel=1e-2)


def test_divergence_is_llama_cpps(text: Path, tmp_path: Path) -> None:
    """Guards: a divergence of other tokens, the wrong way round, or off by more than what is stated."""
    model = tmp_path / "model.gguf"
    quantize_file(plan_quantization(smollm2(), resolve("Q4_0"), allow_requantize=True), model)
    options = ("-c", "512", "--chunks", "3")
    logits = ("--kl-divergence-base", tmp_path / "logits")
    theirs("-m", smollm2(), "-f", text, *options, *logits)
    output = theirs("-m", model, *options, *logits, "--kl-divergence")
    found = ours(model, "--against", smollm2(), "--text", text, *options)["comparison"]["divergence"]
    kl, kl_error = number("Mean    KLD", output)
    assert kl * 0.97 < found["kl"]["value"] < kl * 1.001 < found["kl_upper"]
    assert found["kl"]["error"] == pytest.approx(kl_error, rel=0.03)
    for name, quantile in (("Median  KLD", "0.5"), ("90.0%   KLD", "0.9"), ("99.0%   KLD", "0.99")):
        assert found["quantiles"][quantile] == pytest.approx(number(name, output)[0], rel=0.1)
    assert found["maximum"] == pytest.approx(number("Maximum KLD", output)[0], rel=0.03)
    ratio, ratio_error = number("Mean PPL(Q)/PPL(base)", output)
    assert found["ratio"]["value"] == pytest.approx(ratio, rel=1e-3)
    assert found["ratio"]["error"] == pytest.approx(ratio_error, rel=0.01)
    assert found["same_top"]["value"] == pytest.approx(number("Same top p", output)[0] / 100, abs=3e-3)
