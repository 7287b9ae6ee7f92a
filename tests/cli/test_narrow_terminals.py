"""What commands print on terminals of 60 to 132 columns: whole words, whole figures, lines that fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from support.models import tiny_model
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.base.paths import data_folder
from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.eval_sensitivity import show
from dsmoe_local.cli.target_options import show_reasons
from dsmoe_local.evaluate.error_cost import ErrorCosts
from dsmoe_local.evaluate.error_cost_groups import GroupCost
from dsmoe_local.evaluate.text import built_in
from dsmoe_local.model.ggml import GgmlType
from dsmoe_quantize.budget.explanation import stated_reasons
from dsmoe_quantize.budget.sensitivity import Probe, Probes
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization

Q4_K = GgmlType.Q4_K
WIDTHS = (60, 80, 100, 132)


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a terminal that standard output and standard error seem to be."""
    columns: int = request.param
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    return columns


def printed(capsys: pytest.CaptureFixture[str], width: int) -> str:
    """What has been printed since, without styles; every line fits, and nothing is cut."""
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert out
    assert [line for line in out.splitlines() if cell_len(line.rstrip()) > width] == []
    assert "…" not in out
    return out


def run(name: str, *arguments: object) -> None:
    load_command(name).main([*map(str, arguments)], standalone_mode=False)


def test_reasons(width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: reasons in a column of 16 characters, words and layers broken in the middle."""
    plan = plan_quantization(write_tiny(tmp_path / "tiny-BF16.gguf", MOE), resolve("Q4_K_M"))
    reasons = stated_reasons(plan)
    show_reasons(reasons)
    out = printed(capsys, width)
    if width < 120:
        words = " ".join(out.split())
        for each in reasons:
            assert each.why in words
            assert each.layers.replace(",", ", ") in words


def test_targets(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a trade-off whose last columns are cut, sentences below it that end in the middle of a word."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny-BF16.gguf", MOE)
    run("quantize", "tiny-BF16.gguf", "--target-bpw", "5", "--sample", "512", "--dry-run")
    out = capsys.readouterr().out
    told = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    offers = told[told.index("this recipe") - 600 : told.index("left of the budget")]
    assert "…" not in offers
    for line in told[told.index("predicted error ") :].splitlines()[:3]:
        assert len(line) <= width


def test_names_of_models(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a name or a path that is broken into lines, so that it cannot be copied."""
    name = "DeepSeek-V2-Lite-Chat-Reasoner.Q4_K_M"
    (folder := data_folder() / "models").mkdir(parents=True)
    write_tiny(folder / f"{name}.gguf", MOE)
    (folder / "broken.gguf").write_bytes(b"no model")
    run("models")
    out = printed(capsys, max(width, len(f"models folder: {folder}")))
    assert name in out.split()
    assert "broken cannot be used: broken.gguf is not a GGUF file" in out


@pytest.mark.parametrize("width", [60], indirect=True)
def test_evaluations(width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: figures cut or broken; a share of tokens that does not say what it counts."""
    text = tmp_path / "text.txt"
    text.write_text(built_in().content[1000:1600])
    run("eval", tiny_model(), "--against", tiny_model(), "-t", 1, "-c", 64, "--text", text)
    out = " ".join(printed(capsys, width).split())
    assert "same experts 100.0% of tokens in a layer on average, 100.0% in all layers" in out
    run("imatrix", tiny_model(), "-t", 1, "-c", 64, "--text", text, "-o", tmp_path / "m.gguf")
    assert "cold experts" in printed(capsys, width)


def test_costs_of_errors(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a table whose figures are cut, a hint that cannot be typed."""
    groups = [
        GroupCost(
            name, {Q4_K: Probe(0.00512, 0.0234, 0.0012)}, {Q4_K: (GgmlType.Q5_0,)}, True, 4.56, True, 9.1
        )
        for name in ("attention-query-key.27", "output")
    ]
    probes = Probes("text.txt", "digest", 64, 3, (Q4_K,), 1e-9)
    show(ErrorCosts("tiny", probes, groups, Path("costs.json")), as_json=False, built_in=True)
    out = printed(capsys, width)
    figures = r"0\.0234 ± 0\.001 +<4\.56"
    wanted = figures if width < 76 else rf"0\.00512 +{figures} +9\.1"
    assert re.search(rf"attention-query-key\.27 +Q4_K: Q5_0 +{wanted}", out)
    assert "dsmoe quantize --target-size SIZE --sensitivity FILE" in " ".join(out.split())


@pytest.mark.parametrize("width", [80], indirect=True)
def test_speeds(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a table that is wider than the terminal, whose words and figures it then breaks."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run("bench", tiny_model(), "-m", tiny_model(), "-p", 16, "-n", 8, "-r", 2, "-t", 1)
    assert "t/s" in printed(capsys, width)
