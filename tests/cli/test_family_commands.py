"""Every command that runs a model, once on a small model of each architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.models import MIXTURES, family_hyperparameters, family_model

from dsmoe_local.cli.commands import load_command
from dsmoe_local.evaluate.text import built_in
from dsmoe_local.model.layout import has_shared_gate
from dsmoe_quantize.imatrix_file import read_imatrix


def dsmoe(command: str, *arguments: str | Path) -> str:
    """Run a command in this process, with the engine in a child process; returns what it prints."""
    done = CliRunner().invoke(load_command(command), [*map(str, arguments), "-t", "1"])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def as_json(command: str, *arguments: str | Path) -> Any:
    return json.loads(dsmoe(command, *arguments, "--json"))


@pytest.mark.parametrize("name", MIXTURES)
def test_every_command(name: str, tmp_path: Path) -> None:
    """Something that works with the first architecture alone."""
    model, hp = family_model(name), family_hyperparameters(name)
    text = tmp_path / "text.txt"
    text.write_text(built_in().content[1000:1400], encoding="utf-8")

    assert dsmoe("chat", model, "-p", "dog", "-n", "3", "--temp", "0")

    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"id": number, "prompt": "dog"}) + "\n" for number in range(2)))
    dsmoe(
        "batch",
        lines,
        "-o",
        tmp_path / "out.jsonl",
        "-m",
        model,
        "-n",
        "3",
        "--temp",
        "0",
        "--format",
        "simple",
    )
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["text"] == second["text"]

    found = as_json("eval", model, "--text", text, "-c", "64", "--chunks", "1", "--against", model)
    assert found["comparison"]["divergence"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["comparison"]["routing"]["same"] == 1

    found = as_json("experts", model, text, "-c", "64")["texts"][0]
    assert found["n_routed_experts"] == hp.n_routed_experts
    assert found["gating"] == hp.gating.value
    assert (found["shared_share"] is not None) == (hp.n_shared_experts > 0)
    assert (found["shared_gate"] is not None) == has_shared_gate(hp)

    dsmoe("imatrix", model, "--text", text, "-o", tmp_path / "imatrix.gguf", "-c", "64")
    assert read_imatrix(tmp_path / "imatrix.gguf").entries

    report = json.loads(dsmoe("bench", model, "-p", "8", "-n", "4", "-r", "1", "-o", "json"))
    assert report[0]["n_experts_used"] == hp.n_experts_per_token
