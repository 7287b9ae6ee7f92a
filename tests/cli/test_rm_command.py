"""`dsmoe rm`: deletes models in the models folder, after asking, and nothing else."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from support.configured import complaint
from support.split_files import split_with_gguf
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.base.durable import locked
from dsmoe_local.base.errors import LockedError
from dsmoe_local.base.paths import data_folder, demo_folder
from dsmoe_local.cli import rm
from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.main import group
from dsmoe_local.model.discovery import note_use, unfinished_path


@pytest.fixture
def folder() -> Path:
    """The models folder, with `alpha`, `beta` and `deep/gamma`."""
    folder = data_folder() / "models"
    (folder / "deep").mkdir(parents=True)
    for name in ("alpha", "beta", "deep/gamma"):
        (folder / f"{name}.gguf").write_bytes(b"no model")
    return folder


def remove(*names: str) -> None:
    load_command("rm").main([*names, "--yes"], standalone_mode=False)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


ALL = {"alpha.gguf", "beta.gguf", "deep/gamma.gguf"}


def test_models_are_deleted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: another model than the named one; a name with the ending, in capitals, or a path."""
    remove("ALPHA.gguf", str(folder / "deep" / "gamma.gguf"))
    assert files_in(folder) == {"beta.gguf"}
    assert "deleted alpha (8 B, in " in capsys.readouterr().err


def test_a_model_that_is_named_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: an error about a file that is gone, after the deletion."""
    remove("alpha", "Alpha.gguf", "beta")
    assert files_in(folder) == {"deep/gamma.gguf"}
    assert capsys.readouterr().err.count("deleted alpha") == 1


def test_all_files_of_a_split_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: gigabytes that stay under names that nobody lists, also after a part was deleted by hand."""
    files = split_with_gguf(write_tiny(tmp_path / "whole.gguf", MOE), folder / "large", 40)
    files[1].unlink()
    remove("large")
    assert files_in(folder) == ALL
    assert "deleted large (2 files, " in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "left"), [("n\n", ALL), ("\n", ALL), ("y\n", ALL - {"alpha.gguf"})])
def test_it_asks(answer: str, left: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a model that is deleted without a clear yes."""
    monkeypatch.setattr(rm, "_has_terminal", lambda: True)
    done = CliRunner().invoke(load_command("rm"), ["alpha"], input=answer)
    assert done.exit_code == 0, done.output
    assert "Delete alpha (8 B, in " in done.output
    assert files_in(folder) == left


def test_nobody_to_ask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a script that deletes because nobody answers."""
    assert "--yes" in complaint(capsys, "rm", "alpha")
    assert files_in(folder) == ALL


@pytest.mark.parametrize(
    ("word", "said"),
    [("alp", "no model is called 'alp'"), ("alhpa", "did you mean alpha?"), ("", "no model"), ("deep", "no")],
)
def test_no_such_model(word: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: the beginning of a name that deletes a model."""
    assert said in complaint(capsys, "rm", word, "--yes")
    assert files_in(folder) == ALL


def test_nothing_outside_the_models_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a file elsewhere, reached by its name, its path, a link or the working folder."""
    demo_folder().mkdir(parents=True)
    here, demo = tmp_path / "mine.gguf", demo_folder() / "demo-q4.gguf"
    for path in (here, demo):
        path.write_bytes(b"precious")
    note_use(here)
    monkeypatch.chdir(tmp_path)
    for word in ("mine", "mine.gguf", str(here), "./mine.gguf", "demo-q4"):
        assert "not in the models folder" in complaint(capsys, "rm", word, "--yes")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "far.gguf").write_bytes(b"precious")
    (folder / "linked").symlink_to(tmp_path / "else")
    complaint(capsys, "rm", "far", "--yes")
    # The link is in the folder, what it leads to is not.
    (folder / "link.gguf").symlink_to(here)
    remove("link")
    assert files_in(folder) == ALL
    assert all(path.read_bytes() == b"precious" for path in (here, demo, tmp_path / "else" / "far.gguf"))


def test_two_of_one_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a silent choice of what to delete."""
    (folder / "deep" / "alpha.gguf").write_bytes(b"other")
    assert "2 models are called" in complaint(capsys, "rm", "alpha", "--yes")
    remove(str(folder / "deep" / "alpha.gguf"))
    assert files_in(folder) == ALL


def test_an_unfinished_download(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: gigabytes of a download that was given up, hidden for ever; one that is running."""
    for number in (1, 3):
        final = folder / f"large-{number:05}-of-00003.gguf"
        unfinished_path(final, f"{number}" * 64).write_bytes(b"part")
    load_command("models").main([], standalone_mode=False)
    assert "unfinished download: large, 8 B so far" in capsys.readouterr().out
    with locked(folder / "large-00001-of-00003.gguf"), pytest.raises(LockedError):
        remove("large")
    remove("large")
    assert files_in(folder) == ALL
    assert "deleted the unfinished download of large (2 files, 8 B" in capsys.readouterr().err


def test_names_are_completed(folder: Path) -> None:
    """Guards: names of models that cannot be deleted."""
    demo_folder().mkdir(parents=True)
    (demo_folder() / "demo-q4.gguf").touch()
    complete = ShellComplete(group, {}, "dsmoe", "_DSMOE_COMPLETE").get_completions
    assert [item.value for item in complete(["rm"], "")] == ["alpha", "beta", "gamma"]
    assert [item.value for item in complete(["rm", "alpha"], "B")] == ["beta"]


def test_run_is_chat(folder: Path) -> None:
    """Guards: another name of the chat that has other options or no completion."""
    context = click.Context(group)
    assert group.get_command(context, "run") is load_command("chat")
    complete = ShellComplete(group, {}, "dsmoe", "_DSMOE_COMPLETE").get_completions
    assert [item.value for item in complete(["run"], "al")] == ["alpha"]
    assert "run" in [item.value for item in complete([], "ru")]
