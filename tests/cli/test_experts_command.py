"""The arguments of `dsmoe experts`: which of them is the model, and which are texts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.shell_completion import ShellComplete
from support.configured import complaint
from support.models import tiny_model
from support.tiny_gguf import DENSE, write_tiny

from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.model_argument import models_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two texts, and a model called Tiny-v1.5 among the known ones."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("text")
    models, _ = models_folder()
    models.mkdir(parents=True)
    (models / "Tiny-v1.5.gguf").symlink_to(tiny_model())
    (folder / "unnamed").symlink_to(tiny_model())
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of each run the model that is loaded and the texts that are read."""
    found: list[str] = []
    texts: list[str] = []

    def load(path: Path, *_: object) -> None:
        found.append(" ".join((path.name, *texts)))
        texts.clear()
        raise click.Abort

    def read(name: str) -> SimpleNamespace:
        texts.append(name)
        return SimpleNamespace(content=name)

    monkeypatch.setattr("dsmoe_local.cli.experts.load_engine", load)
    monkeypatch.setattr("dsmoe_local.evaluate.text.read_text", read)
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("tiny a.txt", "Tiny-v1.5.gguf a.txt"),
        ("Tiny-v1.5 a.txt b.txt", "Tiny-v1.5.gguf a.txt b.txt"),
        ("tiny -", "Tiny-v1.5.gguf -"),
        ("unnamed a.txt", "unnamed a.txt"),
        ("-m tiny a.txt", "Tiny-v1.5.gguf a.txt"),
        ("-m tiny a.txt b.txt", "Tiny-v1.5.gguf a.txt b.txt"),
        ("-m tiny missing b.txt", "Tiny-v1.5.gguf missing b.txt"),
    ],
)
def test_which_is_the_model(arguments: str, expected: str, seen: list[str]) -> None:
    """Guards: a model's name taken for a text, as chat and eval take it for a model; a text taken for one."""
    with pytest.raises(click.Abort):
        load_command("experts").main(arguments.split(), standalone_mode=False)
    assert seen == [expected]


def test_a_configured_model_gives_way(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: "two models" for one that was typed; two texts of which one is taken for a model."""
    monkeypatch.setenv("DSMOE_MODEL", "tiny")
    for arguments in ("unnamed a.txt", "a.txt b.txt"):
        with pytest.raises(click.Abort):
            load_command("experts").main(arguments.split(), standalone_mode=False)
    assert seen == ["unnamed a.txt", "Tiny-v1.5.gguf a.txt b.txt"]


def test_a_word_that_is_neither(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: no word on the nearest model, or on the text that was meant."""
    error = complaint(capsys, "experts", "tyni-v1.5", "a.txt")
    assert error.splitlines() == [
        "error: no model is called 'tyni-v1.5'",
        "  there is no such text either",
        "  did you mean Tiny-v1.5?",
    ]
    assert "-m and 'unnamed'" in complaint(capsys, "experts", "unnamed", "a.txt", "-m", "tiny")


def test_a_dense_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a message without a remedy; one that comes after a text was typed on stdin."""
    write_tiny(here / "dense.gguf", DENSE)
    error = complaint(capsys, "experts", "dense.gguf", "-")
    assert error.splitlines()[0] == "error: the model is dense: it has no routed experts"
    assert "name a mixture of experts" in error


def test_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: names of models where texts are wanted, or none where a model is."""
    completer = ShellComplete(load_command("experts"), {}, "dsmoe-experts", "_X")
    assert [item.value for item in completer.get_completions([], "ti")] == ["Tiny-v1.5"]
    for before in (["Tiny-v1.5"], ["-m", "Tiny-v1.5"]):
        (only,) = completer.get_completions(before, "")
        assert only.type == "file"
