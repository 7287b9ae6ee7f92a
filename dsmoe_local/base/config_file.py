"""The user's config file: TOML, read as plain values and changed in place with its comments kept.

The meaning of the keys is up to the readers: `cli.option_sources` and `chat.settings`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeAlias

from dsmoe_local.base.errors import FileError, FormatError, file_errors
from dsmoe_local.base.paths import config_folder, data_folder

Value: TypeAlias = str | int | float | bool | list[str]

MODELS_FOLDER = "models-folder"
"""A key of the config file that is not an option: where models are looked for by name."""
MODELS_VARIABLE = "DSMOE_MODELS_FOLDER"

_MAX_BYTES = 1 << 20
_MAX_INTEGER = 2**63 - 1


def config_path() -> Path:
    """Return the path of the config file, which need not exist."""
    return config_folder() / "config.toml"


def spellings(keys: Iterable[str]) -> tuple[str, ...]:
    """Return every spelling of the keys: with dashes and with underscores."""
    return tuple(dict.fromkeys(form for key in keys for form in (key, key.replace("-", "_"))))


def models_folder() -> tuple[Path, str]:
    """Return the folder where models are looked for by name, and what set it: a variable, or a place in the
    config file. By default it is `models` in the data folder, and the second item is empty.

    Raises FormatError for a value that is not a path, and what `ConfigFile.values` raises.
    """
    if path := os.environ.get(MODELS_VARIABLE):
        return Path(os.path.expanduser(path)), MODELS_VARIABLE
    values = ConfigFile(config_path()).values()
    path = next((values[key] for key in spellings([MODELS_FOLDER]) if key in values), None)
    where = f"{config_path()}: {MODELS_FOLDER}"
    if path is not None and (not isinstance(path, str) or "\0" in path):
        raise FormatError("this takes the path of a folder", where=where)
    if path:
        return Path(os.path.expanduser(path)), where
    return data_folder() / "models", ""


class ConfigFile:
    """A TOML file that need not exist. Every call reads it again, since the user may edit it meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def values(self) -> dict[str, Any]:
        """Return the content as tomllib reads it; empty without a file.

        Raises FormatError, with the line, if it is not valid TOML; FileError if it cannot be read.
        """
        return self._parsed(self._text())

    def set(self, section: tuple[str, ...], changes: Mapping[str, Value | None]) -> None:
        """Set keys of a section (`()`: the top level), or remove them (None). The rest is kept as it is.

        The file is durable on return, and readable by its owner only. Raises what `values` raises,
        FormatError if the section's name is that of a value, LockedError while another process is writing.
        """
        from dsmoe_local.base.durable import locked, make_folders, write_file

        if all(value is None for value in changes.values()) and not self.path.exists():
            return
        with file_errors("the config file cannot be written", self.path):
            # If the file is a link, as dotfiles often are, its target is replaced and the link stays.
            path = self.path.resolve()
            make_folders(path.parent, 0o700)
            with locked(path):
                text = self._text()
                changed = self._changed(text, section, changes)
                if changed != text:
                    write_file(path, changed.encode(), 0o600)

    def _text(self) -> str:
        try:
            with self.path.open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            raise FileError(
                f"the config file cannot be read: {error.strerror or error}", where=self.path
            ) from error
        if len(content) > _MAX_BYTES:
            raise FormatError("the config file is larger than 1 MiB", where=self.path)
        try:
            # Editors on Windows write a byte order mark.
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise FormatError("the config file is not UTF-8", where=f"{self.path}, line {line}") from error

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            values = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            # The message contains line and column.
            raise FormatError(f"the config file is not valid TOML: {error}", where=self.path) from error
        except ValueError as error:
            # Python refuses numbers of thousands of digits.
            raise FormatError("the config file has a number that is too large", where=self.path) from error
        for key, value in _numbers(values):
            if not -_MAX_INTEGER - 1 <= value <= _MAX_INTEGER:
                # TOML has 64-bit integers. tomllib also reads larger ones, which Python may refuse to print.
                raise FormatError(f"the number is too large: {key}", where=self.path)
        return values

    def _changed(self, text: str, section: tuple[str, ...], changes: Mapping[str, Value | None]) -> str:
        """Return the text of the file with the changes."""
        import tomlkit
        from tomlkit.exceptions import TOMLKitError
        from tomlkit.items import InlineTable

        def new_table(parent: object, is_last: bool) -> MutableMapping[str, Any]:
            if isinstance(parent, InlineTable):
                return tomlkit.inline_table()
            # `[presets.calm]` needs no heading `[presets]`.
            return tomlkit.table(is_super_table=not is_last)

        wanted = self._parsed(text)
        self._apply(wanted, section, changes, lambda parent, is_last: {})
        try:
            document = tomlkit.parse(text)
            self._apply(document, section, changes, new_table)
            result = document.as_string()
            # tomlkit cannot change every layout of a file. Its result is used only if its values are right.
            if _same(tomllib.loads(result), wanted):
                return result
        except (TOMLKitError, ValueError, RecursionError):
            pass
        raise FileError(
            "the layout of the config file is too complex to be changed by a program",
            where=self.path,
            remedy=f"write [{'.'.join(section)}] as a separate section" if section else "edit it yourself",
        )

    def _apply(
        self,
        table: MutableMapping[str, Any],
        section: tuple[str, ...],
        changes: Mapping[str, Value | None],
        new_table: Callable[[object, bool], MutableMapping[str, Any]],
    ) -> None:
        """Make the changes in `table`, with missing sections made by `new_table(parent, is_last)`."""
        for depth, name in enumerate(section, 1):
            if name not in table:
                table[name] = new_table(table, depth == len(section))
            table = table[name]
            if not isinstance(table, MutableMapping):
                raise FormatError(
                    f"{name} is a value in the config file, not a section",
                    where=self.path,
                    remedy=f"replace it with a section [{'.'.join(section)}]",
                )
        for key, value in changes.items():
            if value is not None:
                table[key] = value
            elif key in table:
                del table[key]


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield all integers in a value of the file, each with its key."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _numbers(each, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each, key)
    elif isinstance(value, int):
        yield key, value


def _same(first: object, second: object) -> bool:
    """Return True if two values of the file are equal; nan counts as equal to nan."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(each, second[key]) for key, each in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second or (first != first and second != second)
