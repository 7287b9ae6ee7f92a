"""Commands on models without a table: those that run a model work, the others say what they need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.other_models import OTHERS, write_other

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.cli.commands import load_command
from dsmoe_local.evaluate.text import built_in


def run(command: str, *arguments: str | Path) -> Result:
    """Run a command in this process, with the engine in a child process."""
    return CliRunner().invoke(load_command(command), list(map(str, arguments)))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(built_in().content[1000:1400], encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["mixtral", "gemma3", "mamba", "deepseek2 with fused experts"])
def test_commands_that_run_any_model(name: str, tmp_path: Path, text: Path) -> None:
    """Guards: a command that asks for hyper-parameters of a model that has none."""
    model = write_other(tmp_path / "model.gguf", name)
    done = [run("chat", model, "-p", "dog", "-n", "3", "--temp", "0", "-t", "1")]

    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"id": number, "prompt": "dog"}) + "\n" for number in range(2)))
    out = tmp_path / "out.jsonl"
    done.append(
        run("batch", lines, "-o", out, "-m", model, "-n", "3", "--temp", "0", "--format", "simple", "-t", "1")
    )
    done.append(
        run("eval", model, "--text", text, "-c", "64", "--chunks", "1", "--against", model, "-t", "1")
    )
    done.append(run("inspect", model))
    assert "chat, batch, bench and eval only" in " ".join(done[-1].stdout.split())
    inspected = json.loads(run("inspect", model, "--json").stdout)
    assert inspected["architecture"] == OTHERS[name].architecture
    assert inspected["n_heads"] is None
    done.append(run("bench", model, "-p", "8", "-n", "4", "-r", "1", "-t", "1", "-o", "json"))
    assert [(each.exit_code, each.stderr[:300] if each.exit_code else "") for each in done] == [(0, "")] * 5

    first, second = map(json.loads, out.read_text().splitlines())
    assert first["text"] == second["text"]
    report = json.loads(done[-1].stdout)[0]
    assert report["n_experts_used"] == OTHERS[name].keys.get("expert_used_count", 0)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("quantize", "{model}", "--type", "q4", "-o", "{out}"), "this needs to know the model's tensors"),
        (("imatrix", "{model}", "--text", "{text}", "-o", "{out}"), "an importance matrix is not available"),
        (("experts", "{model}", "{text}"), "this needs to know the model's tensors"),
        (("chat", "{model}", "-p", "x", "--active-experts", "1"), "--active-experts is not available"),
        (
            ("eval", "{model}", "--text", "{text}", "--sensitivity", "{out}"),
            "this needs to know the model's tensors",
        ),
    ],
)
def test_commands_that_need_a_table(
    arguments: tuple[str, ...], what: str, tmp_path: Path, text: Path
) -> None:
    """Guards: a refusal without the file or a remedy; output that is left behind."""
    out = tmp_path / "out"
    model = write_other(tmp_path / "model.gguf", "mixtral")
    command, *rest = (word.format(model=model, out=out, text=text) for word in arguments)
    failed = run(command, *rest).exception
    assert isinstance(failed, DsmoeError)
    assert failed.what.startswith(what)
    assert str(model) in failed.where
    assert failed.remedy
    assert not out.exists()
