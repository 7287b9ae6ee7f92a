"""The texts of the trained reference: those that it learns from, and a held-out one.

It learns help topics and sources of Python's standard library. The held-out text has other topics, and the
docstrings of other modules. A hash of the names divides both, so that it is the same for every Python.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.calibrate_demo import corpus

_HELD_OUT_MODULES = 16  # one of so many
# pydoc_data has all help topics, so also those that are held out.
_WITHOUT = frozenset(
    {"test", "tests", "idlelib", "pydoc_data", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
)
_LEAST_CHARACTERS = 40  # shorter docstrings say little


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents to learn from, and the held-out text."""

    training: tuple[str, ...]
    held_out: str

    def calibration(self, n_characters: int) -> str:
        """Return the beginnings of all training documents, about so many characters in all."""
        share = n_characters / sum(map(len, self.training))
        return "\n\n".join(text[: int(share * len(text)) + 1] for text in self.training)


def read_corpus() -> Corpus:
    """Return the texts, which are the same for the same version of Python."""
    training = [corpus.text("calibration")]
    held_out = [corpus.text("held out")]
    for name, source in _modules():
        if _is_held_out(name):
            held_out += _docstrings(source)
        else:
            training.append(source)
    return Corpus(tuple(training), "\n\n".join(held_out))


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_MODULES == 0


def _modules() -> Iterator[tuple[str, str]]:
    """Yield the path and the source of each module of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _WITHOUT.isdisjoint(name.parts):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module, of its classes and functions, after their first lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a template
            return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) >= _LEAST_CHARACTERS:
            yield docstring if isinstance(node, ast.Module) else f"{_heading(node)}\n{docstring}"


def _heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}:"
    return f"def {node.name}({ast.unparse(node.args)}):"
