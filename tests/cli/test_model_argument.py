"""The model that chat and batch are given: mistakes are found before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.cli.main import load_command
from dsmoe_local.cli.model_options import find_model


def test_a_folder_names_the_model_in_it(tmp_path: Path) -> None:
    """Guards the hint for a folder given in place of a file."""
    (tmp_path / "demo-q4.gguf").touch()
    with pytest.raises(FileError, match="folder") as caught:
        find_model(str(tmp_path))
    assert "demo-q4.gguf" in caught.value.remedy


def test_a_missing_model_is_named_before_the_prompt_is_judged(tmp_path: Path) -> None:
    """Guards against a complaint about the prompt that hides the wrong path."""
    missing = str(tmp_path / "nope.gguf")
    with pytest.raises(FileError, match="no such model"):
        load_command("chat").main([missing, "-p", ""], standalone_mode=False)


def test_an_empty_stop_text_is_refused_before_loading(tmp_path: Path) -> None:
    """Guards against a model that is loaded only to fail every request."""
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UsageError, match="stop text"):
        load_command("chat").main([str(tmp_path / "m.gguf"), "-r", "", "-p", "x"], standalone_mode=False)
