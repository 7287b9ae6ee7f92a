"""Against llama.cpp's own tool, where it is installed: `llama-perplexity` on the PATH."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import smollm2

from dsmoe_local.evaluate.text import built_in

TOOL = shutil.which("llama-perplexity")


@pytest.mark.skipif(TOOL is None, reason="llama-perplexity is not on the PATH")
@pytest.mark.parametrize("n_context", [128, 512])
def test_perplexity_is_llama_cpps(n_context: int, tmp_path: Path) -> None:
    """Guards: other windows, other tokens, or another half than llama.cpp's: 0.1% is all that may differ."""
    text = tmp_path / "text.txt"
    text.write_text(built_in().content[:12_000] + "\n")
    options = ["-c", str(n_context), "--chunks", "4", "-t", "2"]
    assert TOOL is not None
    theirs = subprocess.run(
        [TOOL, "-m", str(smollm2()), "-f", str(text), *options], capture_output=True, text=True, check=True
    )
    estimate = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", theirs.stdout + theirs.stderr)
    assert estimate is not None
    ours = subprocess.run(
        [
            *(
                sys.executable,
                "-c",
                "from dsmoe_local.cli.main import dsmoe; dsmoe()",
                "eval",
                str(smollm2()),
            ),
            *("--text", str(text), *options, "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(ours.stdout)["perplexity"]["perplexity"]
    assert found["value"] == pytest.approx(float(estimate[1]), rel=1e-3)
    assert found["error"] == pytest.approx(float(estimate[2]), rel=1e-2)
