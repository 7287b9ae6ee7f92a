"""`dsmoe inspect` and the command line's own behaviour."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.imatrices import random_imatrix
from support.raw_gguf import STRING, KeyValue, tiny_model
from support.tiny_gguf import MOE, MTP, write_tiny

from dsmoe_local.base.sizes import format_count, format_size
from dsmoe_local.cli.commands import COMMANDS, load_command
from dsmoe_local.experts.cost import active_cost
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

PAGE = Path(__file__).parents[2] / "docs" / "inspect.md"


def dsmoe(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    code = "from dsmoe_local.cli.main import dsmoe; dsmoe()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_inspect_a_file_as_json(tmp_path: Path) -> None:
    """Guards the figures a script reads: sizes are those of the file."""
    path = tiny_model().write(tmp_path / "tiny.gguf")
    done = dsmoe("inspect", str(path), "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["parameters"]["total"] == sum(tensor.n_bytes // 4 for tensor in tiny_model().tensors)
    assert report["bytes"] == 4 * report["parameters"]["total"]
    assert report["roles"]["routed experts"]["bytes_read_per_token"] == 3 * 2 * 64 * 32 * 4
    assert report["tokenizer"]["n_tokens"] == 8
    assert report["flops_4k_paper"] is None


def test_inspect_tells_type_and_matrix(tmp_path: Path) -> None:
    """Guards the line of a person who wonders what a file was made by."""
    source = write_tiny(tmp_path / "tiny-BF16.gguf", MOE)
    plan = plan_quantization(source, resolve("q4"), imatrix=random_imatrix(MOE))
    quantize_file(plan, tmp_path / "out.gguf")

    def weights(path: Path) -> str:
        shown = CliRunner().invoke(load_command("inspect"), [str(path)], env={"COLUMNS": "200"}).stdout
        return next(line for line in shown.splitlines() if line.startswith("weights"))

    made = weights(tmp_path / "out.gguf").rstrip()
    assert made.endswith(" bits each, q4, importance matrix some.imatrix.gguf")
    assert weights(source).rstrip().endswith(" bits each, BF16")


@pytest.mark.parametrize("width", [40, 54, 76, 80])
def test_no_figure_is_cut(width: int) -> None:
    """Guards: a narrow window in which all that is left of a figure is `4…`."""
    shown = (
        CliRunner().invoke(load_command("inspect"), ["deepseekmoe-16b"], env={"COLUMNS": str(width)}).stdout
    )
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


ROWS = re.findall(r"^\| `(.+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("name", "figures"), ROWS)
def test_the_table_of_published_models(name: str, figures: str) -> None:
    """Guards the page's figures."""
    report = json.loads(CliRunner().invoke(load_command("inspect"), [name, "--json"]).stdout)
    sizes = report["sizes"]
    expected = [
        format_count(report["parameters"]["total"]),
        format_count(report["parameters"]["activated"]),
        format_size(report["kv_bytes_per_token"]),
        format_size(sizes["q8"]["bytes"]),
        format_size(sizes["q4"]["bytes"]),
        format_size(sizes["q4"]["bytes_read_per_token"]),
        f"{sizes['Q4_K_M']['fallback']:.0%}",
    ]
    assert figures.split(" | ") == expected


@pytest.mark.parametrize("name", PRESETS)
def test_inspect_every_preset(name: str) -> None:
    """Guards the preset names that the help lists; the paper's figures for another paper's model."""
    from dsmoe_local.model.report import as_json, report_on

    report = as_json(report_on(name))
    is_of_the_paper = PRESETS[name].ffn_factor is not None
    assert (report["flops_4k_paper"] is not None) == is_of_the_paper
    assert bool(report["flops_ratio"]) == is_of_the_paper
    assert name in (load_command("inspect").help or "")


INSPECTED = {
    "deepseek-v2-lite": ("16 heads of 192, MLA with 512 + 64 cached values", "31.1 KB per token"),
    "qwen1.5-moe-a2.7b": ("1 shared (5632 wide) behind a gate + 4 of 60 routed",),
    "qwen3-30b-a3b": ("experts 8 of 128 routed, 768 wide router softmax, weights normalized",),
    "ling-mini-2.0": (
        "sigmoid, a bias for the choice, from the best 4 of 8 groups, weights normalized, times 2.5",
    ),
}


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect_names_what_differs(name: str) -> None:
    """Guards attention and routing of each kind, and sizes of files that are not made yet."""
    shown = CliRunner().invoke(load_command("inspect"), [name], env={"COLUMNS": "200"}).stdout
    words = " ".join(shown.split())
    for text in INSPECTED[name]:
        assert text in words
    report = json.loads(CliRunner().invoke(load_command("inspect"), [name, "--json"]).stdout)
    assert report["sizes"]["q8"]["bytes"] > report["sizes"]["q4"]["bytes"] > report["bytes"] / 4


def test_layers_that_are_not_used_are_not_counted(tmp_path: Path) -> None:
    """Guards: a file with a layer for multi-token prediction, which is neither loaded nor read."""
    path = write_tiny(tmp_path / "mtp.gguf", MTP)
    plain = write_tiny(tmp_path / "plain.gguf", replace(MTP, n_mtp_layers=0))
    shown = CliRunner().invoke(load_command("inspect"), [str(path)], env={"COLUMNS": "200"}).stdout
    assert "3 layers (1 for multi-token prediction not counted)" in shown
    assert [active_cost(each, 2).n_bytes for each in (path, plain)] == [active_cost(plain, 2).n_bytes] * 2


def test_sizes_are_those_of_quantized_files(tmp_path: Path) -> None:
    """A size that is planned with other types than the quantizer's; a table of sizes for a quantized file."""
    from dsmoe_local.model.config_json import config_values

    (tmp_path / "config.json").write_text(json.dumps(config_values(MOE)), encoding="utf-8")
    inspect = load_command("inspect")
    sizes = json.loads(CliRunner().invoke(inspect, [str(tmp_path), "--json"]).stdout)["sizes"]
    source = write_tiny(tmp_path / "tiny-BF16.gguf", MOE)
    quantize_file(plan_quantization(source, resolve("q4")), tmp_path / "out.gguf")
    report = json.loads(CliRunner().invoke(inspect, [str(tmp_path / "out.gguf"), "--json"]).stdout)
    assert sizes["q4"]["bytes"] == report["bytes"]
    assert sizes["q4"]["bytes_read_per_token"] == report["bytes_read_per_token"]
    assert report["sizes"] == {}


def test_inspect_a_folder_with_only_a_config(tmp_path: Path) -> None:
    """Guards the look at a model before 33 GB are downloaded."""
    from dsmoe_local.model.config_json import config_values

    config = config_values(PRESETS["deepseekmoe-16b"].hp, torch_dtype="float16")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = dsmoe("inspect", str(tmp_path))
    assert done.returncode == 0
    assert "2 shared + 6 of 64 routed" in done.stdout
    assert "74.4T as the paper counts" in done.stdout
    assert "F16" in done.stdout


def test_a_folder_in_f32_is_counted_in_f32(tmp_path: Path) -> None:
    """Guards the type with the number 0, which is false in Python, against being taken for none."""
    from dsmoe_local.model.config_json import config_values

    config = config_values(PRESETS["deepseekmoe-2b"].hp, torch_dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    report = json.loads(dsmoe("inspect", str(tmp_path), "--json").stdout)
    assert report["assumed_type"] == "F32"
    assert report["bits_per_weight"] == 32


def test_names_in_a_file_are_not_markup_and_not_escapes(tmp_path: Path) -> None:
    """Guards the terminal and Rich against a model's name."""
    name = KeyValue("general.name", STRING, "[bold red]x[/]\x1b[2J")
    done = dsmoe("inspect", str(tiny_model().with_value(name).write(tmp_path / "a.gguf")))
    assert "[bold red]x[/]␛[2J" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("inspect", "nowhere.gguf"), 2),
        (("inspect",), 2),
        (("inspect", "--bogus", "x"), 2),
        (("nonsense",), 2),
    ],
)
def test_mistakes_are_short(arguments: tuple[str, ...], code: int) -> None:
    """Guards against tracebacks: at most three lines on stderr, and the exit status of a usage error."""
    done = dsmoe(*arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) <= 3


def test_a_damaged_file_is_a_short_error(tmp_path: Path) -> None:
    """Guards the way of a FormatError to the user."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    done = dsmoe("inspect", str(path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: damaged GGUF file")
    assert len(done.stderr.splitlines()) <= 3
    assert "Traceback" in dsmoe("inspect", str(path), "--debug").stderr


def test_help_imports_nothing_heavy() -> None:
    """Guards the 0.3 s of `dsmoe --help`: neither numpy nor torch nor llama_cpp nor Rich."""
    code = (
        "import sys; sys.argv = ['dsmoe', '--help']\n"
        "from dsmoe_local.cli.main import group\n"
        "try: group()\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'torch', 'llama_cpp', 'rich', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for name, entry in COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert entry.summary in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_debug(name: str) -> None:
    """Guards the table of commands against modules that are not there."""
    command = load_command(name)
    assert command.help
    assert any(parameter.name == "debug" for parameter in command.params)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    """Guards shell completion of all five programs."""
    done = dsmoe("completion", shell)
    assert done.returncode == 0
    for program in ("dsmoe", "dsmoe-convert", "dsmoe-quantize", "dsmoe-chat", "dsmoe-batch"):
        assert f"_{program.replace('-', '_').upper()}_COMPLETE" in done.stdout
