"""Mistakes of people who see the programs for the first time, and places where they are run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.configured import complaint, write_config
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.base.durable import make_folders
from dsmoe_local.base.paths import config_folder
from dsmoe_local.cli.commands import load_command

START = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


def dsmoe(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (("chat", "-p", "x", "-temp", "1"), ["there is no option -temp", "did you mean --temp?"]),
        (("chat", "-prompt", "x"), ["there is no option -prompt", "did you mean --prompt?"]),
        (("eval", "-model=x"), ["there is no option -model", "did you mean --model?"]),
        (("chat", "nobody", "-p", "-stats"), ["no model is called 'nobody'", "dsmoe models lists them"]),
        (
            ("convert",),
            ["Missing argument 'SRC'.", "Usage: dsmoe convert [OPTIONS] SRC", "see dsmoe convert"],
        ),
        (("completion",), ["Missing argument '{bash|zsh|fish}'. Choose from: bash, zsh, fish"]),
        (
            ("batch", "in.jsonl", "out.jsonl"),
            ["Missing option '-o' / '--output'.", "Usage: dsmoe batch -o OUT [OPTIONS] IN..."],
        ),
        (
            ("batch", "--ray", "in.jsonl", "-o", "out.jsonl"),
            ["Invalid value for '--ray': 'in.jsonl' is not the address of a Ray cluster: local, auto, or"],
        ),
        (
            ("batch", "--ray", str(Path(__file__)), "-o", "out.jsonl"),
            [f"Invalid value for '--ray': {str(Path(__file__))!r} is a file: write"],
        ),
        (
            ("batch", "in.csv", "-o", "out.csv"),
            ["records cannot be written as .csv", "out.csv", "name out.jsonl, or out.parquet for a table"],
        ),
        (
            ("batch", "in.jsonl", "-o", "out.jsonl", "--ray-workers", "2"),
            ["--ray-workers is for --ray", "add --ray, or --ray local"],
        ),
        (
            ("batch", "in.jsonl", "-o", "out.jsonl", "--ray", "--rpc", "10.0.0.2:50052"),
            ["--ray and --rpc are both given", "leave one of them out"],
        ),
        (
            ("batch", "in.jsonl", "-o", "out.jsonl", "--ray", "local", "--ray-memory", "8"),
            ["Invalid value for '--ray-memory': 8 is 8 bytes: write a unit, as in 8MB or 8GiB"],
        ),
        (
            ("plan", "x", "-c", "16k"),
            ["Invalid value for '-c' / '--ctx-size': '16k' is not a whole number: write 16384"],
        ),
        (
            ("chat", "x", "-c", "much"),
            ["Invalid value for '-c' / '--ctx-size': 'much' is not a whole number"],
        ),
        (
            ("chat", "x", "-c", "-p", "hello"),
            ["Invalid value for '-c' / '--ctx-size': a whole number is missing before -p"],
        ),
        (
            ("chat", "x", "--temp", "hot"),
            ["Invalid value for '--temp' / '--temperature': 'hot' is not a number, such as 0.8"],
        ),
        (("chat", "x", "--top-p", "nan"), ["Invalid value for '--top-p': 'nan' is not a number"]),
        (
            ("serve", "x", "--port", "99999"),
            ["Invalid value for '--port': 99999 is out of range: write 0 to 65535"],
        ),
        (("serve", "x", "-np", "0"), ["Invalid value for '-np' / '--parallel': 0 is out of range: write 1"]),
        (
            ("serve", "x", "--grace", "1e30"),
            ["Invalid value for '--grace': 1e30 is out of range: write 0 to 10000000"],
        ),
        (
            ("quantize", "x", "--target-bpw", "low"),
            ["Invalid value for '--target-bpw': 'low' is not a number"],
        ),
        (("serve", "x", "--api-key"), ["Option '--api-key' requires an argument.", "see dsmoe serve --help"]),
        (
            ("chat", "x", "-p", "hi", "--rpc", "pi:5,pi:5"),
            ["Invalid value for '--rpc': the worker pi:5 is named twice"],
        ),
        (
            ("quantize", "in.gguf", "out.gguf", "q4_k_m", "8"),
            [
                "the type Q4_K_M is not an argument here, but an option",
                "dsmoe quantize in.gguf out.gguf --type Q4_K_M",
            ],
        ),
        (
            ("quantize", "in.gguf", "Q4_K_M", "8"),
            [
                "the type Q4_K_M is not an argument here, but an option",
                "dsmoe quantize in.gguf --type Q4_K_M",
            ],
        ),
        (
            ("quantize", "--calibrate", "model.gguf", "--type", "q4"),
            ["Invalid value for '--calibrate': 'model.gguf' is a model, not a text: name it before"],
        ),
        (("quantize", "in.gguf", "a.gguf", "b.gguf"), ["two outputs are named", "name one"]),
        (
            ("chat", "-p", "x", "--preset", "calm"),
            ["there is no preset 'calm'", "", "/set save NAME in a chat"],
        ),
    ],
)
def test_what_is_said(
    arguments: tuple[str, ...], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a word that click reads as something else; a message that has to be looked up."""
    said = complaint(capsys, *arguments).splitlines()
    assert said[0].startswith(f"error: {lines[0]}")
    for line, expected in zip(said[1:], lines[1:], strict=False):
        assert line.strip().startswith(expected)
    assert len(lines) <= len(said) <= 3


def test_the_type_where_llama_quantize_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: no word on --type to somebody who gives the type as the last argument."""
    model = write_tiny(tmp_path / "tiny.gguf", MOE)
    assert "--type Q4_K_M\n" in complaint(capsys, "quantize", str(model), "q4_k_m")


def test_a_model_alone_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: "no such file" for the name of a model, when it is the text that is missing."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny.gguf", MOE)
    for word in ("tiny", "tiny.gguf", str(tmp_path / "tiny.gguf")):
        assert "no text is named" in complaint(capsys, "experts", word)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("arguments", [("inspect", "deepseekmoe-16b"), ("batch", "--help")])
def test_an_encoding_without_our_characters(encoding: str, arguments: tuple[str, ...]) -> None:
    """Guards: a C locale that shows as a bug of this program."""
    done = dsmoe(*arguments, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) > 10


def test_a_home_that_takes_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an endless recursion where the system has no room for a folder, and says that none is there."""

    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(FileNotFoundError):
        make_folders(Path("/nowhere/of/this/name"))


def test_the_config_path_as_it_is(tmp_path: Path) -> None:
    """Guards: a folder whose name is no text, of which the editor would get another name."""
    folder = os.fsencode(tmp_path) + b"/\xff"
    done = subprocess.run(
        [sys.executable, "-c", START, "config", "--path"],
        env={**os.environb, b"XDG_CONFIG_HOME": folder},
        capture_output=True,
        check=False,
    )
    assert done.stdout == folder + b"/dsmoe-local/config.toml\n"


def test_unknown_variables_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a typing mistake in a variable that is passed over; a known one of another command told."""
    write_config("")
    for name in ("DSMOE_TMEP", "DSMOE_TARGET_SIZE", "DSMOE_MAX_TOKENS", "DSMOE_DEBUG", "DSMOE_FAULT"):
        monkeypatch.setenv(name, "0" if name == "DSMOE_DEBUG" else "7")
    monkeypatch.setattr(load_command("chat"), "callback", lambda **_: None)
    load_command("chat").main([], standalone_mode=False)
    note = "note: the variable DSMOE_TMEP is not an option; did you mean DSMOE_TEMP?\n"
    assert capsys.readouterr().err == note
    load_command("config").main([], standalone_mode=False)
    assert capsys.readouterr().err == note
    assert config_folder().is_dir()


def interrupted_at(module: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Run `dsmoe quantize` with a signal while a module is imported."""
    hook = f"""if True:
        import os, sys
        class Interrupt:
            def find_spec(self, name, path=None, target=None):
                if name == "{module}":
                    os.kill(os.getpid(), {int(number)})
        sys.meta_path.insert(0, Interrupt())
"""
    start = "from dsmoe_local.cli.main import quantize; quantize()"
    return subprocess.run(
        [sys.executable, "-c", hook + start, "--help"], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_command_is_imported(number: signal.Signals, status: int) -> None:
    """Guards: a traceback for Ctrl-C, and no message at all for SIGTERM."""
    done = interrupted_at("dsmoe_local.cli.target_options", number)
    assert (done.returncode, done.stderr) == (status, "error: interrupted\n")


def test_an_interrupt_while_modules_are_imported() -> None:
    """Guards: a traceback for Ctrl-C in the first tenth of a second."""
    done = interrupted_at("click", signal.SIGINT)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    # Afterwards it is the programs' own again.
    code = "import signal, dsmoe_local.cli.main; assert signal.getsignal(2) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True)
