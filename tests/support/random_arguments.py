"""Random command lines, with the files, the environment and the config file around them, from a seed."""

from __future__ import annotations

import io
import os
import random
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import click
import pytest

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.cli import main
from dsmoe_local.cli.commands import COMMANDS, load_command
from dsmoe_local.cli.options import configurable
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from support.configured import write_config
from support.fake_engine import FakeEngine
from support.tiny_gguf import MOE, write_tiny

FILES = {
    "empty.txt": b"",
    "text.txt": b"Some text, and more of it.\n" * 40,
    "binary.bin": bytes(range(256)) * 4,
    "a.pdf": b"%PDF-1.7\n\xe2\xe3\xcf\xd3",
    "in.jsonl": b'{"prompt": "x"}\n{"messages": [{"role": "user", "content": "y"}]}\nbroken\n',
    "words.csv": b"word,n\na,1\nb,2\n",
    "schema.json": b'{"type": "object", "properties": {"a": {"type": "integer"}}}',
    "recipe.toml": b'name = "x"\n[types]\n"attention" = "q8_0"\n',
    "broken.gguf": b"GGUF\x03\x00\x00\x00" + bytes(40),
    "two words.txt": b"x",
    "\udcff\udcfe.txt": b"x",
    "\x1b[31mred.txt": b"x",
}
PLACES = (
    *(*FILES, "tiny.gguf", "folder", "checkpoint", "loop", "gone", "missing"),
    *("out", "out.gguf", "a" * 300),
)
VALUES = (
    *("", " ", "-", "--", "-1", "0", "1", "2", "7", "32", "0.5", "1e999", "nan", "-inf", "9" * 30, "0x10"),
    *("auto", "all", "none", "on", "off", "tiny", "tin", "TINY.gguf", "q4", "Q4_K_M", "q8", "f99", "8MB"),
    *("a=b", "(=q8_0", "a{9999999999}=q8_0", ".*=q4_0", "x=CPU", "CPU", "json", "csv", "md", "simple"),
    *("deepseek-moe", "chatml", "deepseekmoe-16b", "bash", "zsh", "calm", "{word}", "{", "{}", "é", "日本"),
    *("\udcff", "\x1b[2J", "\u202e", "a\nb", "-x", "--nonsense", "@text.txt", "~", "~nobody/x", "./"),
    *(".", "..", "-n", "١", "5", "chat"),
)
BASES = {
    "chat": "tiny -p x -n 4",
    "batch": "in.jsonl -o out -m tiny",
    "quantize": "tiny --type q8",
    "convert": "checkpoint",
    "inspect": "tiny",
    "eval": "tiny --text text.txt",
    "imatrix": "tiny --text text.txt",
    "bench": "tiny",
    "experts": "tiny text.txt",
    "completion": "fish",
}
"""What makes each command do something."""
STDINS = (b"", b"Some text.\n", b"\xff\xfe\x00", b'{"prompt": "x"}\n' * 3, b"\n\n")
ODDITIES = (
    *(("COLUMNS", "40"), ("COLUMNS", "1"), ("NO_COLOR", "1"), ("TERM", "dumb"), ("LC_ALL", "C")),
    # No folder can be made there.
    *(("XDG_DATA_HOME", "/proc/nowhere"), ("XDG_CACHE_HOME", "/dev/null")),
)
CONFIGS = (
    "",
    "temp = 0.5\n[chat]\ntop_k = 3\n",
    "temp = 'hot'\n",
    "tempp = 1\n[chatt]\n",
    "broken = = 1",
    "model = 'tiny'\nmodels-folder = '.'\n",
    "model = 3\nmodels-folder = 3\n",
    "[presets.calm]\ntemp = 0.1\nnonsense = 1\n",
    "presets = 3\nchat = 4\n",
    "preset = 'nobody'\n",
    "\ufeffseed = 1",
)


@dataclass(frozen=True, slots=True)
class Run:
    """How a command line ended: its status, what it said, and the message of its error as it was raised."""

    arguments: tuple[str, ...]
    status: object
    said: str
    complaint: str


class _Engine(FakeEngine):
    """As what a load returns: closed at the end of a block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prepare(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the files, and put fakes in the place of what takes long, or leaves this machine."""
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    write_tiny(folder / "tiny.gguf", replace(MOE, n_layers=2, n_vocab=32))
    for name in ("folder", "checkpoint"):
        (folder / name).mkdir()
    (folder / "checkpoint" / "config.json").write_text('{"model_type": "deepseek"}')
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")

    def load(options: ModelOptions, *_: object, **__: object) -> _Engine:
        if options.observers:
            raise EngineError("no engine here observes anything")
        return _Engine(n_context=min(options.n_context or 4096, 4096), n_parallel=options.n_parallel)

    def refuse(*_: object, **__: object) -> None:
        raise DsmoeError("this takes too long")

    patch.setattr(EngineClient, "load", load)
    patch.setattr("dsmoe_convert.demo.build.build_demo", refuse)
    patch.setattr("dsmoe_convert.hub.fetch", refuse, raising=False)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr("dsmoe_local.evaluate.speed.machine.look_at_machine", refuse)
    patch.setattr("dsmoe_local.cli.worker._serve", refuse)
    patch.setattr("dsmoe_local.batch.cluster.ray_cluster.connect", refuse)


def arguments(chance: random.Random) -> list[str]:
    """A command line: a command's options, most of them spelled right, with any values."""
    name = chance.choice([*COMMANDS] * 6 + ["run", "cht", "", "--version", "-h"])
    if name not in COMMANDS:
        return [name, *chance.choices(VALUES, k=chance.randrange(3))]
    words = [name, *(BASES.get(name, "").split() if chance.random() < 0.7 else [])]
    for _ in range(chance.choice((0, 1, 1, 2, 2, 3, 4, 6))):
        if chance.random() < 0.15:
            words.append(chance.choice((*PLACES, *VALUES)))
            continue
        other = name if chance.random() < 0.9 else chance.choice([*COMMANDS])
        # --debug asks for tracebacks.
        options = [
            each
            for each in load_command(other).params
            if isinstance(each, click.Option) and each.name != "debug"
        ]
        words += _spelled(chance, chance.choice(options)) if options else []
    return words


def _spelled(chance: random.Random, option: click.Option) -> list[str]:
    flag = chance.choice([*option.opts, *option.secondary_opts])
    value = chance.choice((*PLACES, *VALUES))
    if chance.random() < 0.6:
        value = _fitting(chance, option)
    match chance.randrange(20):
        case 0:
            flag = flag.removeprefix("-")
        case 1:
            flag = flag.replace("-", "_").replace("__", "--")
        case 2:
            flag = flag[:-1]
        case 3:
            return [f"{flag}={value}"]
    return [flag] if option.is_flag or chance.random() < 0.03 else [flag, value]


def _fitting(chance: random.Random, option: click.Option) -> str:
    """A value that the option's type may take."""
    if isinstance(option.type, click.Choice):
        return str(chance.choice(option.type.choices))
    if option.type.name.startswith("integer"):
        return str(chance.choice((-1, 0, 1, 2, 3, 64, 512, 99999)))
    if option.type.name.startswith("float"):
        return str(chance.choice((0, 0.25, 1, 4.5, 7)))
    return chance.choice(PLACES if isinstance(option.type, click.Path) else VALUES)


@contextmanager
def surroundings(chance: random.Random, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A random environment and config file."""
    write_config(chance.choice(CONFIGS) if chance.random() < 0.3 else "")
    with patch.context() as inner:
        if chance.random() < 0.3:
            command = chance.choice([*COMMANDS])
            names = [name for each in configurable(load_command(command)) for name in each.variables]
            name = chance.choice(names) if names else "DSMOE_NONSENSE"
            inner.setenv(name, chance.choice((*PLACES, *VALUES)))
        inner.setenv(*chance.choice(ODDITIES))
        yield


def run(words: list[str], stdin: bytes, encoding: str, patch: pytest.MonkeyPatch) -> Run:
    """Run `dsmoe` with these words; its output is in `encoding`."""
    complaints: list[str] = []
    complain = main.complain

    def record(message: str) -> None:
        complaints.append(message)
        complain(message)

    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with patch.context() as inner, warnings.catch_warnings():
        warnings.simplefilter("error")
        inner.setattr(main, "complain", record)
        inner.setattr(sys, "argv", ["dsmoe", *words])
        inner.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        inner.setattr(sys, "stdout", out)
        inner.setattr(sys, "stderr", err)
        status: object
        try:
            status = main.run(lambda: main.group, "dsmoe")
        except BaseException as error:  # noqa: BLE001 - whatever escapes is the finding
            status = error
        err.flush()
        said = err.buffer.getvalue().decode("utf-8")
    return Run(tuple(words), status, said, "\n".join(complaints))


def one(seed: int, template: Path, place: Path, patch: pytest.MonkeyPatch) -> Run:
    """The run of a seed, in a fresh copy of `template` at `place`."""
    chance = random.Random(seed)
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(template, place, symlinks=True)
    os.chdir(place)
    words = arguments(chance)
    stdin = chance.choice(STDINS)
    with surroundings(chance, patch):
        return run(words, stdin, chance.choice(("utf-8", "utf-8", "ascii", "latin-1")), patch)
