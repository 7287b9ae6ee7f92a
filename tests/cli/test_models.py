"""Models by name: what is known, what a name stands for, and that finding it opens no file."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from support.split_files import split_with_gguf
from support.tiny_gguf import DENSE, MOE, NARROW, write_tiny

from dsmoe_local.base.config_file import config_path
from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.base.paths import data_folder, demo_folder
from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.main import group
from dsmoe_local.cli.model_argument import find_model
from dsmoe_local.cli.model_options import load_engine
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.discovery import (
    MAX_RECENT,
    KnownModel,
    describe,
    known_models,
    note_use,
    recent_models,
)
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.imatrix_file import write_imatrix


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSMOE_MODELS_FOLDER", raising=False)


@pytest.fixture
def folder() -> Path:
    """The models folder, with `alpha`, `Beta-q4`, `beta-q8`, and `deep/gamma`; none of them a real model."""
    folder = data_folder() / "models"
    (folder / "deep" / "deeper").mkdir(parents=True)
    for name in ("alpha", "Beta-q4", "beta-q8", "deep/gamma", "deep/deeper/hidden"):
        (folder / f"{name}.gguf").write_bytes(b"no model")
    (folder / "notes.txt").touch()
    (folder / "folder.gguf").mkdir()
    (folder / "gone.gguf").symlink_to("nowhere")
    (folder / "loop.gguf").symlink_to("loop.gguf")
    return folder


def test_a_split_model_is_one_model() -> None:
    """Guards: a model listed once for each of its files, or with the size of one; a name with the numbers."""
    models = data_folder() / "models"
    models.mkdir(parents=True)
    files = split_with_gguf(write_tiny(models / "whole.gguf", MOE), models / "large-q8", 40)
    known = known_models(models)
    assert [(model.name, model.path) for model in known] == [
        ("large-q8", files[0]),
        ("whole", models / "whole.gguf"),
    ]
    described = describe(known[0])
    assert described.n_bytes == sum(file.stat().st_size for file in files)
    assert not described.reason
    for word in ("large-q8", "large", "large-q8.gguf", files[0].name):
        assert find_model(word) == files[0]
    n_bytes = described.n_bytes - files[1].stat().st_size
    files[1].unlink()
    described = describe(known[0])
    assert "file 2 of the 3 files" in described.reason
    assert described.n_bytes == n_bytes


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("alpha", "alpha"),
        ("ALPHA.gguf", "alpha"),
        ("al", "alpha"),
        ("beta-q4", "Beta-q4"),
        ("gam", "deep/gamma"),
    ],
)
def test_a_name_or_its_unique_beginning(word: str, found: str, folder: Path) -> None:
    """Guards what a name stands for: any case, the ending or not, one folder deep."""
    assert find_model(word) == folder / f"{found}.gguf"


def test_a_whole_name_is_no_beginning(folder: Path) -> None:
    """Guards a model whose name another one's begins with."""
    (folder / "alpha-large.gguf").touch()
    assert find_model("alpha") == folder / "alpha.gguf"
    with pytest.raises(UsageError) as caught:
        find_model("alph")
    assert caught.value.where == "alpha, alpha-large"


def test_an_importance_matrix_is_no_model(folder: Path) -> None:
    """Guards the matrix beside a model: it is no choice, and the model's name stays unique."""
    for name in ("alpha.imatrix.gguf", "imatrix.gguf"):
        (folder / name).touch()
    note_use(folder / "alpha.imatrix.gguf")
    assert find_model("alp") == folder / "alpha.gguf"
    with pytest.raises(UsageError, match="no model is called"):
        find_model("imat")
    other = folder / "my-imatrix.gguf"
    write_imatrix(Imatrix({}, (), 1, 512), other)
    assert find_model("my-i") == other
    assert describe(KnownModel("my-i", other, "")).reason == "this is an importance matrix, not a model"


def test_files_of_one_name_are_told_by_their_paths(folder: Path) -> None:
    """Guards a silent choice between two files."""
    shutil.copy(folder / "alpha.gguf", folder / "deep" / "alpha.gguf")
    with pytest.raises(UsageError) as caught:
        find_model("alpha")
    assert str(folder / "deep" / "alpha.gguf") in caught.value.where
    # A second way to one file is no second model.
    (folder / "deep" / "alpha.gguf").unlink()
    (folder / "deep" / "alpha.gguf").symlink_to(folder / "alpha.gguf")
    note_use(folder / "deep" / "alpha.gguf")
    assert find_model("alpha") == folder / "alpha.gguf"


def test_the_nearest_of_one_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a name that means nothing any more, since a model of that name was quantized here."""
    demo_folder().mkdir(parents=True)
    demo = write_tiny(demo_folder() / "demo-q4.gguf", NARROW)
    assert find_model("demo-q4") == demo
    far = tmp_path / "far"
    far.mkdir()
    note_use(write_tiny(far / "demo-q4.gguf", NARROW))
    assert find_model("demo-q4") == demo
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "demo-q4.gguf", NARROW)
    capsys.readouterr()
    for word in ("demo-q4", "DEMO-Q4.gguf", "demo"):
        assert find_model(word) == Path("demo-q4.gguf")
        note = capsys.readouterr().err
        assert note == (
            "note: 3 models are called demo-q4: using demo-q4.gguf; to use another, give its path:"
            f" {demo}, {far / 'demo-q4.gguf'}\n"
        )
    # The path itself is exact.
    assert find_model("demo-q4.gguf") == Path("demo-q4.gguf")
    assert find_model(str(demo)) == demo
    assert not capsys.readouterr().err
    (tmp_path / "alpha.gguf").touch()
    assert find_model("alpha") == Path("alpha.gguf")


@pytest.mark.parametrize("word", ["tiny", "TINY.gguf", "tin"])
def test_every_command_takes_names(
    word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a command for which a model must be a path."""
    (tmp_path / "models").mkdir()
    model = write_tiny(tmp_path / "models" / "tiny.gguf", MOE)
    monkeypatch.setenv("DSMOE_MODELS_FOLDER", str(model.parent))
    text = tmp_path / "a.txt"
    text.write_text("Some text.")
    loaded: list[Path] = []

    def load(options: ModelOptions, *_: object, **__: object) -> None:
        loaded.append(options.path)
        raise FileError("enough")

    monkeypatch.setattr(EngineClient, "load", load)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "x"}\n')
    for name, *arguments in (
        ("chat", word, "-p", "x"),
        ("chat", "-m", word, "-p", "x"),
        ("batch", str(lines), "-o", str(tmp_path / "out.jsonl"), "-m", word),
        ("eval", word),
        ("eval", "-m", word, "--against", word),
        ("imatrix", word, "-o", str(tmp_path / "x.imatrix.gguf")),
        ("experts", word, str(text)),
        ("bench", word),
    ):
        with pytest.raises(FileError, match="enough"):
            load_command(name).main(arguments, standalone_mode=False)
    assert loaded == [model] * 8
    load_command("quantize").main([word, "--type", "q8", "--dry-run"], standalone_mode=False)
    for arguments in ([word], ["-m", word]):
        capsys.readouterr()
        load_command("inspect").main([*arguments, "--json"], standalone_mode=False)
        assert json.loads(capsys.readouterr().out)["source"] == str(model)


def test_a_file_here_comes_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: another file than the one whose path is given; a folder that hides a known model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpha").mkdir()
    assert find_model("alpha") == folder / "alpha.gguf"
    (tmp_path / "alpha").rmdir()
    (tmp_path / "alpha").touch()
    assert find_model("alpha") == Path("alpha")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/alpha") == tmp_path / "alpha"


def test_what_is_unknown(folder: Path) -> None:
    """Guards the words for a typing mistake, and for a path that leads nowhere."""
    with pytest.raises(UsageError, match="no model is called") as caught:
        find_model("bata-q8")
    assert "beta-q8" in caught.value.remedy
    with pytest.raises(UsageError, match="no model is called") as caught:
        find_model("\x1b[31m.gguf")
    assert "no such file" in caught.value.where
    assert "\x1b" not in str(caught.value)
    with pytest.raises(FileError, match="no such model"):
        find_model("~nobody-of-this-name/x.gguf")


def test_the_models_folder_is_configured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards models-folder: variable before file, ~ expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.gguf").touch()
    config_path().parent.mkdir(parents=True)
    config_path().write_text('models-folder = "~/one"\n')
    assert find_model("one") == tmp_path / "one" / "one.gguf"
    config_path().write_text('models_folder = "~/one"\n')
    assert find_model("one") == tmp_path / "one" / "one.gguf"
    monkeypatch.setenv("DSMOE_MODELS_FOLDER", str(tmp_path / "two"))
    assert find_model("two") == tmp_path / "two" / "two.gguf"
    with pytest.raises(UsageError, match="no model"):
        find_model("alpha")


def test_recent_models(tmp_path: Path) -> None:
    """Guards the list of models used lately: order, length, files that are gone, a damaged list."""
    files = [tmp_path / f"m{number}.gguf" for number in range(MAX_RECENT + 3)]
    for file in files:
        file.touch()
        note_use(file)
    note_use(files[5])
    assert recent_models()[:2] == [files[5], files[-1]]
    assert len(recent_models()) == MAX_RECENT
    files[5].unlink()
    assert files[5] not in recent_models()
    recent = data_folder() / "recent.json"
    assert recent.stat().st_mode & 0o777 == 0o600
    for damage in ("", "{", "{}", '[1, null, "relative.gguf"]', "[" * 100_000):
        recent.write_text(damage)
        assert recent_models() == []
    note_use(files[0])
    assert recent_models() == [files[0]]


def test_a_list_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """Guards: a model that is not run because it cannot be remembered."""
    data_folder().parent.mkdir(parents=True, exist_ok=True)
    data_folder().touch()
    note_use(tmp_path / "m.gguf")
    assert recent_models() == []


def test_what_is_loaded_becomes_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a model named by its path once, and unknown by its name later; one known that never loaded."""
    (tmp_path / "omega.gguf").touch()
    values: dict[str, Any] = {}

    def keep(**options: Any) -> None:
        values.update(options)

    monkeypatch.setattr(load_command("batch"), "callback", keep)
    load_command("batch").main(["in", "-o", "out"], standalone_mode=False)

    def fail(*_: object, **__: object) -> None:
        raise FileError("it cannot be loaded")

    monkeypatch.setattr(EngineClient, "load", fail)
    with pytest.raises(FileError):
        load_engine(tmp_path / "omega.gguf", dict(values))
    with pytest.raises(UsageError):
        find_model("omega")
    engine: Any = SimpleNamespace()
    monkeypatch.setattr(EngineClient, "load", lambda *_, **__: engine)
    assert load_engine(tmp_path / "omega.gguf", dict(values)) is engine
    assert find_model("omega") == tmp_path / "omega.gguf"


def test_the_list(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards what is listed: all places, type and context from the header, the reason for a broken file."""
    monkeypatch.setenv("COLUMNS", "200")
    demo_folder().mkdir(parents=True)
    write_tiny(demo_folder() / "demo-q4.gguf", NARROW, "f16")
    recent = write_tiny(tmp_path / "lately.gguf", DENSE)
    note_use(recent)
    note_use(demo_folder() / "demo-q4.gguf")
    (folder / "\x1b[31mred.gguf").write_bytes(b"GGUF")
    load_command("models").main(["--json"], standalone_mode=False)
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)["models"]}
    assert set(listed) == {"alpha", "Beta-q4", "beta-q8", "gamma", "\x1b[31mred", "demo-q4", "lately"}
    demo = listed["demo-q4"]
    assert (demo["from"], demo["type"], demo["context"]) == ("demo", "F16", NARROW.n_context)
    assert demo["bytes"] == (demo_folder() / "demo-q4.gguf").stat().st_size
    assert (listed["lately"]["from"], listed["lately"]["type"]) == ("recent", "BF16")
    assert listed["lately"]["path"] == str(recent)
    assert "not a GGUF file" in listed["alpha"]["error"]
    assert listed["alpha"]["type"] is None
    load_command("models").main([], standalone_mode=False)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "not a GGUF file" in text
    assert str(folder) in text


def test_an_unknown_type_is_told_by_its_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards a file that does not say its type."""
    path = write_tiny(tmp_path / "m.gguf", NARROW)
    content = path.read_bytes()
    # Another key in its place; as long, so that nothing moves.
    path.write_bytes(content.replace(b"general.file_type", b"general.file_tape"))
    note_use(path)
    load_command("models").main(["--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["models"][0]["type"] == "BF16 + F32"


def test_no_models(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the first words to somebody who has none."""
    load_command("models").main([], standalone_mode=False)
    assert "dsmoe demo" in capsys.readouterr().out


def completed(*words: str) -> list[tuple[str, str]]:
    found = ShellComplete(group, {}, "dsmoe", "_DSMOE_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [(item.type, item.value) for item in found]


def test_completion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards names and files behind -m, and that no model is opened for them: headers take long to read."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file is opened")

    monkeypatch.setattr("dsmoe_local.model.gguf_file.read_gguf", refuse)
    names = ["alpha", "Beta-q4", "beta-q8", "gamma"]
    assert sorted(value for _, value in completed("batch", "-m", "")) == sorted(names)
    assert completed("batch", "-m", "BETA-") == [("plain", "Beta-q4"), ("plain", "beta-q8")]
    assert completed("batch", "-m", "./") == [("file", "./")]
    assert completed("batch", "-m", "xyz") == [("file", "xyz")]
    assert ("plain", "models") in completed("config", "m")
    os.chmod(folder, 0)
    try:
        known_models(folder)
    finally:
        os.chmod(folder, 0o700)
