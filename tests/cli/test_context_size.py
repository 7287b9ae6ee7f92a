"""-c: how much context a model is loaded with, and what is said if that is not what was asked for."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.configured import write_config
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.base.errors import FileError
from dsmoe_local.cli.commands import load_command
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.hyperparameters import RopeScaling

TRAINED = MOE.n_context


class Loading:
    """Runs a command up to its model's load; what it would load it with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.model = write_tiny(folder / "m.gguf", MOE)
        self.scaled = write_tiny(
            folder / "scaled.gguf", replace(MOE, rope_scaling=RopeScaling("yarn", 4.0, 32))
        )
        (folder / "a.txt").write_text("Some text.")
        (folder / "in.jsonl").write_text(json.dumps({"prompt": "x"}))
        self._found: list[ModelOptions] = []
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
        monkeypatch.setattr(EngineClient, "load", self._load)

    def __call__(self, *words: str) -> int | None:
        self._found.clear()
        with pytest.raises(FileError, match="enough"):
            load_command(words[0]).main(list(words[1:]), standalone_mode=False)
        return self._found[0].n_context

    def _load(self, options: ModelOptions, *_: object, **__: object) -> None:
        self._found.append(options)
        raise FileError("enough")


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Loading:
    return Loading(monkeypatch, tmp_path)


COMMANDS: dict[str, tuple[str, ...]] = {
    "chat": ("chat", "m", "-p", "x"),
    "experts": ("experts", "m", "a.txt"),
    "bench": ("bench", "m", "-p", "8", "-n", "8"),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_no_more_than_a_model_was_trained_for(
    words: tuple[str, ...], loading: Loading, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: -c 999999 of a model of 8,192 that fills the memory, and is nonsense behind that."""
    for asked in ("999999", "99999999999", str(TRAINED + 1)):
        assert loading(*words, "-c", asked) == TRAINED
        assert f"-c {asked} is reduced to {TRAINED}" in capsys.readouterr().err
    assert loading(*words, "-c", str(TRAINED)) == TRAINED
    assert loading(*words, "-c", "64") == 64
    assert "trained" not in capsys.readouterr().err
    write_config("ctx-size = 999999")
    if words[0] != "bench":
        assert loading(*words) == TRAINED


def test_zero_is_the_models_own(loading: Loading) -> None:
    """Guards: llama.cpp's -c 0, refused."""
    assert loading(*COMMANDS["chat"], "-c", "0") is None


def test_scaled_positions_get_what_is_asked_for(loading: Loading) -> None:
    """Guards: a model that is made for longer texts, cut back."""
    assert loading("chat", str(loading.scaled), "-p", "x", "-c", "999999") == 999999


def test_a_window_is_as_long_as_is_asked_for(loading: Loading) -> None:
    """Guards: a measurement of what a model does behind its context, of shorter windows than it says."""
    assert loading("eval", "m", "-c", str(4 * TRAINED)) == 4 * TRAINED + 1


def test_a_batch_has_a_context_for_each_request(loading: Loading) -> None:
    """Guards: -c, which counts all requests that are decoded at once, cut to what one of them may use."""
    lines = [json.dumps({"prompt": "x", "id": str(number)}) for number in range(4)]
    Path("in.jsonl").write_text("\n".join(lines))
    words = ("batch", "in.jsonl", "-o", "out.jsonl", "-m", "m", "-np", "4", "-c", "999999")
    # llama.cpp pads each.
    assert loading(*words) == 4 * 256
