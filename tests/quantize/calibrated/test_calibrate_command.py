"""`dsmoe quantize --calibrate` as a user runs it."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from support.models import tiny_model

from dsmoe_local.base.errors import PIP, FileError, FormatError, MissingExtraError, UsageError
from dsmoe_local.cli.commands import load_command
from dsmoe_local.model.file_type import CALIBRATION_KEY
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

TEXT = "Each token chooses a few experts, and all tokens share some. " * 60


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tiny_model()


def invoke(*arguments: object, command: str = "quantize") -> Result:
    return CliRunner().invoke(load_command(command), [str(each) for each in arguments])


def record(path: str) -> Any:
    return read_gguf(Path(path)).get(CALIBRATION_KEY)


def test_a_text(source: Path) -> None:
    """A file without a record of its calibration, or that `dsmoe inspect` does not show."""
    result = invoke(source, "out.gguf", "--type", "q4", "--calibrate", "text.txt", "--threads", 1)
    assert result.exit_code == 0, result.exception
    assert record("out.gguf").startswith('rounding = "gptq", text = "text.txt", digest = "')
    shown = invoke("out.gguf", "--json", command="inspect")
    assert json.loads(shown.stdout)["calibration"] == record("out.gguf")
    assert "calibrated (rounding" in " ".join(invoke("out.gguf", command="inspect").stdout.split())


def test_the_built_in_text_and_few_tokens(source: Path) -> None:
    """--calibrate that takes the next option as its text, or ignores how many tokens are wanted."""
    options = ("--rounding", "nearest", "--calibration-tokens", 512, "--calibration-seed", 3)
    result = invoke(source, "out.gguf", "--calibrate", "--type", "q4", *options, "--threads", 1)
    assert result.exit_code == 0, result.exception
    assert record("out.gguf").startswith('rounding = "nearest", text = "built-in')
    assert record("out.gguf").endswith("tokens = 512, seed = 3")
    assert "The built-in text" in result.stderr


def test_a_target_size_has_room_for_the_record(source: Path, tmp_path: Path) -> None:
    """The metadata grows after the types are chosen."""
    quantize_file(plan_quantization(source, resolve("q4")), tmp_path / "plain.gguf")
    size = (tmp_path / "plain.gguf").stat().st_size
    options = ("--calibrate", "text.txt", "--rounding", "nearest", "--threads", 1)
    result = invoke(source, "out.gguf", "--target-size", f"{size}", *options)
    assert result.exit_code == 0, result.exception
    assert record("out.gguf")
    assert (tmp_path / "out.gguf").stat().st_size <= size


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--rounding", "gptq"], UsageError, "--rounding has no effect without --calibrate"),
        (["--device", "cpu"], UsageError, "--device has no effect without --calibrate"),
        (["--calibrate", "missing.txt"], FileError, "the text cannot be read"),
        (["--calibrate", "short.txt"], UsageError, "the text has 4 tokens, too few for a window"),
        (["--calibrate", "bytes.txt"], FormatError, "UTF-8"),
    ],
)
def test_mistakes(
    source: Path, tmp_path: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    """Options without effect, and texts that are none, fail before anything is written."""
    (tmp_path / "short.txt").write_text("Moin")
    (tmp_path / "bytes.txt").write_bytes(b"GGUF\xff\xfe\x00")
    result = invoke(source, "out.gguf", "--type", "q4", *arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".out*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(source: Path) -> None:
    """An error of torch's after minutes of work."""
    result = invoke(source, "out.gguf", "--type", "q4", "--calibrate", "text.txt", "--device", "cuda")
    assert isinstance(result.exception, UsageError)
    assert "torch finds no cuda device" in str(result.exception)


def test_without_torch(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback where torch is not installed, which few other commands need."""
    real = builtins.__import__

    def without_torch(name: str, *others: Any, **more: Any) -> Any:
        if name == "dsmoe_quantize.calibrated.calibrator":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *others, **more)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    result = invoke(source, "out.gguf", "--type", "q4", "--calibrate", "text.txt")
    assert isinstance(result.exception, MissingExtraError)
    install = f"{PIP} install 'dsmoe-local[calibrate]'"
    assert str(result.exception) == f"torch is needed for --calibrate: {install}"
