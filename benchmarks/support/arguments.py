"""The command lines of benchmarks. The docstrings of the scripts are the help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.support.runner import say
from benchmarks.support.tables import LOAD


def parse(description: str | None, *files: str, **options: Any) -> argparse.Namespace:  # noqa: ANN401 - defaults
    """Parse the arguments of a benchmark. `files` are positional; one whose name ends in "?" may be missing.

    Each option is given with its default, which has its type: `n_gen=32` becomes `--n-gen VALUE`, a tuple
    takes values separated by commas, and False becomes a flag. A type instead of a default means that there
    is none: `model=Path`. Warns if the machine is busy.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for file in files:
        parser.add_argument(file.removesuffix("?"), type=Path, nargs="?" if file.endswith("?") else None)
    for name, default in options.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(flag, action="store_true")
        elif isinstance(default, type):
            parser.add_argument(flag, type=default, metavar=default.__name__.upper())
        elif isinstance(default, tuple):
            told = ",".join(map(str, default))
            parser.add_argument(flag, type=_values(default), default=default, metavar="V,V", help=f"[{told}]")
        else:
            parser.add_argument(flag, type=type(default), default=default, metavar="V", help=f"[{default}]")
    given = parser.parse_args()
    if LOAD > 0.3:
        say(f"the machine is busy (load {LOAD:.1f}): figures will be too low and scattered")
    return given


def _values(default: tuple[Any, ...]) -> Any:  # noqa: ANN401 - argparse calls it
    """Return the function that reads values of the type of the default ones, or words."""
    kind = type(default[0]) if default else str
    return lambda text: tuple(kind(word) for word in text.split(",") if word)
