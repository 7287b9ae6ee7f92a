"""The command `dsmoe eval --sensitivity`: output, files, errors."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import TINY
from support.configured import write_config
from support.imatrices import random_imatrix
from support.models import tiny_model

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.cli.commands import load_command
from dsmoe_local.evaluate.error_cost import CostOptions, ErrorCosts
from dsmoe_local.evaluate.error_cost_groups import GroupCost
from dsmoe_local.evaluate.text import built_in
from dsmoe_local.model.ggml import GgmlType
from dsmoe_quantize.budget.sensitivity import Probe, Probes
from dsmoe_quantize.budget.sensitivity_file import read_sensitivity
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.imatrix_file import write_imatrix
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

# Then the same is computed together in every run.
ONE_AT_ONCE = ("-t", "1", "-c", "64", "-ub", "64")
CODE = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", CODE, *map(str, arguments)]


def dsmoe(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(built_in().content[1000:1600])
    return path


def groups_of(path: Path) -> dict[str, Any]:
    """Return the groups in the file. A run may be replacing it meanwhile."""
    probes = read_sensitivity(path).probes if path.exists() else None
    return dict(probes.groups) if probes else {}


def test_killed_and_continued(text: Path, tmp_path: Path) -> None:
    """Guards: more than one measurement lost to a kill, models of gigabytes left behind, a table without the
    first run's groups, costs that dsmoe-quantize does not use, or that are not in the JSON.
    """
    kept = tmp_path / "costs.json"
    arguments = ("eval", tiny_model(), *ONE_AT_ONCE, "--text", text, "--chunks", "2", "--sensitivity", kept)
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and len(groups_of(kept)) < 2:
            pass
        process.send_signal(signal.SIGKILL)
    before = groups_of(kept)
    assert 2 <= len(before) < 11
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and len(groups_of(kept)) == len(before):
        pass
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert re.search(rb"interrupted: \d+ of 11 measurements done", error)
    done = dsmoe(*arguments)
    assert done.returncode == 0, done.stderr
    after = groups_of(kept)
    assert len(after) == 11
    assert before.items() <= after.items()
    for group in after:
        assert re.search(rf"\n +{group} +Q4_0 +0\.00\d+ +[\d.e-]+ ± [\d.e-]+ +[\d.]+ +[\d.]+", done.stdout)
    assert list((cache_folder() / "eval").iterdir()) == []
    check_json(dsmoe(*arguments, "--json"), kept)
    chosen = dsmoe("quantize", tiny_model(), "--target-bpw", "6", "--sensitivity", kept, "--dry-run")
    assert chosen.returncode == 0, chosen.stderr
    assert "costs of errors: measured\n" in chosen.stdout


def check_json(done: subprocess.CompletedProcess[str], kept: Path) -> None:
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["text"], found["n_windows"]) == ("text.txt", 2)
    assert found["floor"] < 1e-6
    weights = read_sensitivity(kept).weights
    assert len(found["groups"]) == 11
    for each in found["groups"]:
        assert each["probes"].keys() == {"Q4_0"}
        assert weights[each["group"]] == pytest.approx(each["cost"])


def test_refusals(tmp_path: Path) -> None:
    """Guards: options that are silently without effect; hours spent on a quantized model."""
    model, kept = tiny_model(), tmp_path / "costs.json"
    quantized = tmp_path / "q8.gguf"
    quantize_file(plan_quantization(model, resolve("Q8_0")), quantized)
    for arguments, words in (
        ((model, "--probe", "q4_0"), "--probe needs --sensitivity"),
        ((model, "--by-layer"), "--by-layer needs --sensitivity"),
        ((model, "--sensitivity", kept, "--against", model), "exclude each other"),
        ((model, "--sensitivity", kept, "--keep", tmp_path / "kept"), "exclude each other"),
        ((model, "--sensitivity", kept, "--active-experts", "2"), "has no effect with --sensitivity"),
        ((model, "--sensitivity", kept, "--probe", "bf16"), "takes a quantized type"),
        ((model, "--sensitivity", kept, "--probe", "q99"), "is not a type"),
        ((quantized, "--sensitivity", kept), "quantized already"),
        ((model, "--sensitivity", tmp_path / "no" / "costs.json"), "No such file"),
        # The name of a file is forgotten: nobody is told to remove the model.
        ((model, "--sensitivity", quantized), "(?s)not a usable sensitivity file.*name another file"),
    ):
        with pytest.raises(DsmoeError, match=words):
            load_command("eval").main([str(argument) for argument in arguments], standalone_mode=False)
    assert not kept.exists()


Q4_0, Q4_K, Q5_0 = GgmlType.Q4_0, GgmlType.Q4_K, GgmlType.Q5_0
PROBES = Probes("text.txt", "digest", 64, 3, (Q4_K,), 1e-9)
GROUPS = (
    GroupCost("output", {Q4_K: Probe(0.005, 0.02, 0.001)}, {Q4_K: (Q4_K,)}, True, 4.0, False, 9.1),
    GroupCost("dense-down", {Q4_K: Probe(0.003, 1e-4, 1e-4)}, {Q4_K: (Q5_0,)}, True, 0.1, True, 5.9),
    GroupCost("shared-down", {Q4_K: Probe(1e-9, 1e-9, 1e-9)}, {Q4_K: (Q4_K,)}, True, None, False, 5.9),
    GroupCost("routed-down", {}, {}, False, None, False, 12.0),
)


class Measuring:
    """Replaces the measurement, and keeps its arguments."""

    def __init__(self) -> None:
        self.request: CostOptions | None = None
        self.imatrix: Imatrix | None = None

    def __call__(
        self,
        file: object,
        hp: object,
        request: CostOptions,
        load: object,
        imatrix: Imatrix | None,
        **_: object,
    ) -> ErrorCosts:
        self.request, self.imatrix = request, imatrix
        return ErrorCosts("tiny", PROBES, GROUPS, request.path)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    found = Measuring()
    monkeypatch.setattr("dsmoe_local.evaluate.error_cost.measure_costs", found)
    return found


def run(*arguments: str | Path) -> None:
    load_command("eval").main([*map(str, arguments)], standalone_mode=False)


def test_what_is_asked_for(measuring: Measuring, tmp_path: Path) -> None:
    """Guards: options without effect: threads, layers, windows, types, an importance matrix."""
    kept, matrix = tmp_path / "costs.json", tmp_path / "m.imatrix.gguf"
    imatrix = random_imatrix(TINY)
    write_imatrix(imatrix, matrix)
    run(tiny_model(), "--sensitivity", kept)
    assert measuring.request is not None
    request = measuring.request
    assert (request.threads, request.by_layer, request.n_windows) == (0, False, None)
    assert (request.path, request.n_context, request.types) == (kept, 512, (Q4_0,))
    assert measuring.imatrix is None
    options = ("-t", "3", "--by-layer", "--chunks", "5", "-c", "64", "--probe", "q4_k", "--probe", "Q5_0")
    run(tiny_model(), "--sensitivity", kept, *options, "--imatrix", matrix)
    request = measuring.request
    assert (request.threads, request.by_layer, request.n_windows) == (3, True, 5)
    assert (request.n_context, request.types) == (64, (Q4_K, Q5_0))
    assert measuring.imatrix is not None
    assert measuring.imatrix.digest() == imatrix.digest()


def test_the_table_tells_what_is_not_known(
    measuring: Measuring, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a bound shown as a cost, a cost of nothing, a type that was not tried, without a word."""
    run(tiny_model(), "--sensitivity", tmp_path / "costs.json")
    told = capsys.readouterr().out
    for row in (
        r"output +Q4_K +0\.005 +0\.02 ± 0\.001 +4 +9\.1",
        r"dense-down +Q4_K: Q5_0 +0\.003 +0\.0001 ± 0\.0001 +<0\.1 +5\.9",
        r"shared-down +Q4_K +1e-09 +1e-09 ± 1e-09 +- +5\.9",
        r"routed-down +none fits +- +12",
        "<: the divergence is no larger than its error",
        "-: the type stores these weights exactly; try another --probe",
        "none fits: the type's blocks do not divide the rows of these tensors",
    ):
        assert re.search(row, told), told
    run(tiny_model(), "--sensitivity", tmp_path / "costs.json", "--json")
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [each["used"] for each in groups] == [
        {"Q4_K": ["Q4_K"]},
        {"Q4_K": ["Q5_0"]},
        {"Q4_K": ["Q4_K"]},
        {},
    ]
    assert [each["cost"] for each in groups] == [4.0, 0.1, None, None]
    assert [each["is_at_most"] for each in groups] == [False, True, False, False]


def test_what_is_typed_outweighs_the_config_file(
    measuring: Measuring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a refusal of two options of which only one was typed; the wrong one of both."""
    monkeypatch.setenv("DSMOE_AGAINST", "nobody")
    run(tiny_model(), "--sensitivity", tmp_path / "costs.json")
    assert measuring.request is not None
    measuring.request = None
    monkeypatch.delenv("DSMOE_AGAINST")
    write_config(f"[eval]\nsensitivity = '{tmp_path / 'costs.json'}'\n")
    with pytest.raises(UsageError, match="'nobody'"):
        run(tiny_model(), "--against", "nobody")
    assert measuring.request is None
    # A variable overrides the file, too; of two keys of the file neither does.
    monkeypatch.setenv("DSMOE_AGAINST", "nobody")
    with pytest.raises(UsageError, match="'nobody'"):
        run(tiny_model())
    write_config(f"[eval]\nsensitivity = '{tmp_path / 'costs.json'}'\nkeep = 'kept'\n")
    monkeypatch.delenv("DSMOE_AGAINST")
    with pytest.raises(UsageError, match="exclude each other"):
        run(tiny_model())
