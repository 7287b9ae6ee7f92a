"""Recipe files in TOML: the solver writes them, users edit them, and --recipe applies them.

    format = 1
    name = "9.2GiB"
    closest = "Q4_K_M"

    [types]
    output = "Q6_K"
    routed-down = { IQ4_NL = "others", Q5_0 = "1-3,26", Q8_0 = "27" }

    [fallbacks]
    Q4_K = "IQ4_NL"

Each kind of group (`recipes.KINDS`) has one type, or several with their layers. `fallbacks` replace types
whose blocks do not divide the columns; without the table, those of the named recipes apply.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_local.base import durable
from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, UsageError, file_errors
from dsmoe_local.base.sequences import runs
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.file_type import RECIPE_NAME
from dsmoe_local.model.ggml import GgmlType
from dsmoe_quantize.policy.mixes import FLOAT_TYPES, MIXES
from dsmoe_quantize.policy.recipes import KINDS, OTHERS, OTHERS_WORD, RECIPE_FALLBACKS, LayeredRecipe
from dsmoe_quantize.policy.types import parse_target

_FORMAT = 1
_MAX_BYTES = 1 << 20
_MAX_LAYER = 511  # llama.cpp's limit
_OTHER_PLACE = "name another file to write the recipe to"
_KEYS = frozenset({"format", "name", "closest", "types", "fallbacks", "about"})
_HEAD = """\
# A recipe: the type of each group of tensors. Edit it, then: dsmoe-quantize IN.gguf --recipe FILE
# Layers are written as "0-3,7"; "others" are all layers that are not named.
"""


def closest_mix(types: Iterable[GgmlType]) -> str:
    """Return the name of the mix whose base type is the most frequent of `types`; if tied, the first."""
    counts = Counter(types)
    base = max(counts, key=lambda kind: counts[kind])
    words = [mix.name for mix in MIXES.values() if mix.base is base]
    return words[0] if words else base.name


def read_recipe(path: Path) -> LayeredRecipe:
    """Read a recipe file.

    Raises FileError if it cannot be read, FormatError if its content is not a recipe.
    """
    with file_errors("cannot read the recipe", path):
        content = durable.read_at_most(path, _MAX_BYTES)
    if len(content) > _MAX_BYTES:
        raise FormatError(
            f"the file is larger than {_MAX_BYTES >> 20} MiB", where=path, remedy="name a recipe file"
        )
    try:
        return parse_recipe(content.decode(), str(path))
    except UnicodeDecodeError as error:
        raise FormatError("the recipe is not UTF-8", where=path) from error


def write_recipe(recipe: LayeredRecipe, path: Path, *, force: bool = False) -> None:
    """Write a recipe file, durably. A different recipe is replaced only with `force`, other files never.

    Raises FileError, and what `refuse_place` raises.
    """
    refuse_place(path)
    content = render_recipe(recipe).encode()
    with file_errors("cannot write the recipe", path):
        if path.exists():
            if path.read_bytes() == content:
                return  # from a run that was interrupted
            if not force:
                raise FileError("another recipe exists there", where=path, remedy="--force replaces it")
        durable.write_file(path, content)


def refuse_place(path: Path, taken: Iterable[Path] = ()) -> None:
    """Refuse a path that no recipe may be written to.

    Raises UsageError if it is one of `taken` (files that need not exist yet), or exists and is not a recipe.
    Raises FileError if its folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileError("the recipe's folder does not exist", where=path.parent, remedy="create it first")
    try:
        is_taken = any(each.resolve() == path.resolve() or durable.same_file(each, path) for each in taken)
        is_there = path.exists()
    except (OSError, RuntimeError) as error:
        raise FileError(f"cannot write the recipe: {error}", where=path) from error
    if is_taken:
        raise UsageError("the recipe would replace the model", where=path, remedy=_OTHER_PLACE)
    if is_there and not _is_recipe(path):
        raise UsageError("the file there is not a recipe", where=path, remedy=_OTHER_PLACE)


def _is_recipe(path: Path) -> bool:
    if not path.is_file():
        return False  # reading a pipe would block
    try:
        read_recipe(path)
    except (FormatError, FileError):
        return False
    return True


def render_recipe(recipe: LayeredRecipe) -> str:
    """Return the text of a recipe file. `parse_recipe` turns it back into the same recipe."""
    lines = [
        _HEAD,
        f"format = {_FORMAT}",
        f"name = {json.dumps(recipe.name)}",
        f'closest = "{recipe.closest}"',
    ]
    lines += ["", "[types]"]
    lines += [f"{kind} = {_layers_text(recipe.types[kind])}" for kind in KINDS if kind in recipe.types]
    lines += ["", "[fallbacks]"]
    lines += [f'{a.name} = "{b.name}"' for a, b in sorted(recipe.fallbacks.items())]
    if recipe.about:
        lines += ["", "# How the recipe was made; has no effect.", "[about]"]
        lines += [f"{key} = {_value_text(value)}" for key, value in recipe.about.items()]
    return "\n".join(lines) + "\n"


def _value_text(value: str | int | float) -> str:
    """Return a value as TOML. JSON's strings are valid TOML except for DEL, which safe_line removes."""
    return json.dumps(safe_line(value, 200), ensure_ascii=False) if isinstance(value, str) else repr(value)


def _layers_text(layers: Mapping[int | None, GgmlType]) -> str:
    """Return the right side of a line: a type, or a table from type to layers."""
    if set(layers) == {OTHERS}:
        return f'"{layers[OTHERS].name}"'
    parts = []
    for kind in sorted(set(layers.values()), key=lambda kind: (kind is not layers.get(OTHERS), kind.name)):
        words = [OTHERS_WORD] if layers.get(OTHERS) is kind else []
        words += format_layers(layer for layer, each in layers.items() if each is kind and layer is not None)
        parts.append(f'{kind.name} = "{",".join(words)}"')
    return f"{{ {', '.join(parts)} }}"


def format_layers(layers: Iterable[int]) -> list[str]:
    """Return layers as ranges: 1, 2, 3 and 7 as "1-3" and "7"."""
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs(sorted(layers))]


def parse_recipe(text: str, where: str) -> LayeredRecipe:
    """Parse the text of a recipe; `where` names its origin in errors. Raises FormatError."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # ValueError is also raised for numbers with more digits than Python converts.
        raise FormatError(f"the recipe is not TOML: {safe_line(str(error), 120)}", where=where) from error
    return _Reader(tables, where).recipe()


class _Reader:
    """Turns the tables of a TOML file into a recipe. Raises FormatError if they are not a valid one."""

    def __init__(self, tables: Mapping[str, Any], where: str) -> None:
        self._tables = tables
        self._where = where

    def refuse(self, what: str, remedy: str = "") -> NoReturn:
        raise FormatError(what, where=self._where, remedy=remedy)

    def recipe(self) -> LayeredRecipe:
        """Return the whole recipe."""
        if unknown := sorted(set(self._tables) - _KEYS):
            self.refuse(f"the recipe has an unknown key {unknown[0]!r}", f"known: {', '.join(sorted(_KEYS))}")
        if self._tables.get("format") != _FORMAT:
            self.refuse(f"not a recipe of format {_FORMAT}", f"a recipe begins with: format = {_FORMAT}")
        name = self._tables.get("name")
        if not isinstance(name, str) or not RECIPE_NAME.fullmatch(name):
            self.refuse("the recipe needs a name", "at most 64 letters, digits and . _ + -")
        types = {kind: self._layers(kind, value) for kind, value in self._table("types").items()}
        if not types:
            self.refuse("the recipe has no types", "it needs a table [types]")
        closest = self._tables.get(
            "closest", closest_mix(kind for each in types.values() for kind in each.values())
        )
        if closest not in MIXES and closest not in FLOAT_TYPES:
            self.refuse(f"closest = {closest!r} is not a mix", f"known: {', '.join((*MIXES, *FLOAT_TYPES))}")
        return LayeredRecipe(name, closest, types, self._fallbacks(), self._about())

    def _about(self) -> Mapping[str, str | int | float]:
        about = self._table("about")
        for key, value in about.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", key) or type(value) not in (str, int, float):
                self.refuse(f"[about] {key!r} is not a simple value", "use strings and numbers")
        return about

    def _table(self, key: str) -> dict[str, Any]:
        table = self._tables.get(key, {})
        if not isinstance(table, dict):
            self.refuse(f"{key} is not a table")
        return table

    def _type(self, word: object, line: str) -> GgmlType:
        if not isinstance(word, str):
            self.refuse(f"{line}: a type must be a string in quotes")
        try:
            return parse_target(word)
        except DsmoeError as error:
            self.refuse(f"{line}: {error.what}", error.remedy)

    def _layers(self, kind: str, value: object) -> dict[int | None, GgmlType]:
        if kind not in KINDS:
            self.refuse(f"[types] has an unknown group {kind!r}", f"known: {', '.join(KINDS)}")
        if not isinstance(value, dict):
            return {OTHERS: self._type(value, kind)}
        found: dict[int | None, GgmlType] = {}
        for word, layers in value.items():
            for layer in self._numbers(kind, layers):
                if layer in found:
                    self.refuse(f"{kind}: {OTHERS_WORD if layer is None else f'layer {layer}'} has two types")
                found[layer] = self._type(word, kind)
        if not found:
            self.refuse(f"{kind} has no types")
        return found

    def _numbers(self, kind: str, text: object) -> Iterable[int | None]:
        for part in text.split(",") if isinstance(text, str) else [None]:
            match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part or "")
            if part is not None and part.strip() == OTHERS_WORD:
                yield OTHERS
            elif match is None or not int(match[1]) <= int(match[2] or match[1]) <= _MAX_LAYER:
                self.refuse(f"{kind}: {text!r} is not a list of layers", 'write "0-3,7", or "others"')
            else:
                yield from range(int(match[1]), int(match[2] or match[1]) + 1)

    def _fallbacks(self) -> Mapping[GgmlType, GgmlType]:
        if "fallbacks" not in self._tables:
            return RECIPE_FALLBACKS
        return {
            self._type(key, "fallbacks"): self._type(value, f"fallbacks: {key}")
            for key, value in self._table("fallbacks").items()
        }
