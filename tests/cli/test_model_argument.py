"""The model that chat and batch are given: mistakes are found before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.model_argument import find_model


def test_a_folder_names_the_model_in_it(tmp_path: Path) -> None:
    """Guards the hint for a folder given in place of a file."""
    for file, hint in ((None, "no GGUF"), ("config.json", "dsmoe convert"), ("demo-q4.gguf", "demo-q4.gguf")):
        if file is not None:
            (tmp_path / file).touch()
        with pytest.raises(FileError, match="a folder is not a model") as caught:
            find_model(str(tmp_path))
        assert hint in caught.value.remedy


def test_a_missing_model_is_named_before_the_prompt_is_judged(tmp_path: Path) -> None:
    """Guards against a complaint about the prompt that hides the wrong path."""
    missing = str(tmp_path / "nope.gguf")
    with pytest.raises(FileError, match="no such model"):
        load_command("chat").main([missing, "-p", ""], standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-m", "{model}", "hello"), "two models are named, the second is 'hello'"),
        (("{model}", "hello"), "two models are named, the second is 'hello'"),
        (("What is gravity?",), "no model is called 'What is gravity?'"),
        (("Why? " * 100,), f"no model is called '{'Why? ' * 11}Why?…'"),
    ],
)
def test_a_question_without_its_flag(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    """Guards the first mistake of everybody who knows `ollama run`: no word on -p."""
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UsageError) as caught:
        load_command("chat").main(
            [each.format(model=tmp_path / "m.gguf") for each in arguments], standalone_mode=False
        )
    assert caught.value.what == words
    assert '-p "TEXT"' in caught.value.remedy + caught.value.where


def test_an_empty_stop_text_is_refused_before_loading(tmp_path: Path) -> None:
    """Guards against a model that is loaded only to fail every request."""
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UsageError, match="stop string"):
        load_command("chat").main([str(tmp_path / "m.gguf"), "-r", "", "-p", "x"], standalone_mode=False)
