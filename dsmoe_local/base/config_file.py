"""The user's config file: TOML that is read as plain values and changed in place, comments kept.

What its keys mean is told by those who read them: `cli.configuration` and `chat.commands.settings`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeAlias

from dsmoe_local.base.durable import locked, make_folders, write_file
from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.base.paths import config_folder

Value: TypeAlias = str | int | float | bool | list[str]

_MAX_BYTES = 1 << 20
_MOST = 2**63 - 1


def config_path() -> Path:
    """Where the config file is looked for."""
    return config_folder() / "config.toml"


def spellings(keys: Iterable[str]) -> tuple[str, ...]:
    """Every form in which one of `keys` may stand in the file: with dashes, or with underscores."""
    return tuple(dict.fromkeys(form for key in keys for form in (key, key.replace("-", "_"))))


class ConfigFile:
    """A TOML file that need not exist. It is read anew by every call: the user may edit it meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def values(self) -> dict[str, Any]:
        """What the file says, as tomllib reads it; empty without a file.

        FormatError, naming the line, for what is no TOML; FileError if it cannot be read.
        """
        return self._parsed(self._text())

    def set(self, section: tuple[str, ...], changes: Mapping[str, Value | None]) -> None:
        """Set keys of a section (`()`: the top level), or take them out (None); the rest stays as it is.

        Durable on return, and the owner's alone. FormatError or FileError as for `values`, or if a value has
        the section's name; LockedError while another process is writing.
        """
        if all(value is None for value in changes.values()) and not self.path.exists():
            return
        try:
            # Through a link, as people keep such files elsewhere: the link stays.
            path = self.path.resolve()
            make_folders(path.parent, 0o700)
            with locked(path):
                text = self._text()
                changed = self._changed(text, section, changes)
                if changed != text:
                    write_file(path, changed.encode(), 0o600)
        except OSError as error:
            raise FileError(
                f"the config file cannot be written: {error.strerror or error}", where=self.path
            ) from error

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
            # Editors of Windows begin files with a byte order mark.
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise FormatError("the config file is not UTF-8", where=f"{self.path}, line {line}") from error

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            values = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            # Its message names line and column.
            raise FormatError(f"the config file is not valid TOML: {error}", where=self.path) from error
        except ValueError as error:
            # More digits than Python reads.
            raise FormatError("the config file has a number that is too large", where=self.path) from error
        for key, value in _numbers(values):
            if not -_MOST - 1 <= value <= _MOST:
                # TOML has 64 bits; Python would read more, and then refuse to print it.
                raise FormatError(f"the number is too large: {key}", where=self.path)
        return values

    def _changed(self, text: str, section: tuple[str, ...], changes: Mapping[str, Value | None]) -> str:
        """The file's text with the changes in it."""
        import tomlkit
        from tomlkit.exceptions import TOMLKitError
        from tomlkit.items import InlineTable

        def new_table(parent: object, is_last: bool) -> MutableMapping[str, Any]:
            if isinstance(parent, InlineTable):
                return tomlkit.inline_table()
            # Of `[presets.calm]`, `presets` needs no heading of its own.
            return tomlkit.table(is_super_table=not is_last)

        wanted = self._parsed(text)
        self._apply(wanted, section, changes, lambda parent, is_last: {})
        try:
            document = tomlkit.parse(text)
            self._apply(document, section, changes, new_table)
            result = document.as_string()
            # tomlkit cannot change every layout of a file; half a change is none.
            if _same(tomllib.loads(result), wanted):
                return result
        except (TOMLKitError, ValueError, RecursionError):
            pass
        raise FileError(
            "the layout of the config file does not let it be changed by a program",
            where=self.path,
            remedy=f"write [{'.'.join(section)}] as a section of its own"
            if section
            else "change it yourself",
        )

    def _apply(
        self,
        table: MutableMapping[str, Any],
        section: tuple[str, ...],
        changes: Mapping[str, Value | None],
        new_table: Callable[[object, bool], MutableMapping[str, Any]],
    ) -> None:
        for depth, name in enumerate(section, 1):
            if name not in table:
                table[name] = new_table(table, depth == len(section))
            table = table[name]
            if not isinstance(table, MutableMapping):
                raise FormatError(
                    f"{name} is a value in the config file, not a section",
                    where=self.path,
                    remedy=f"write [{'.'.join(section)}] in its place",
                )
        for key, value in changes.items():
            if value is not None:
                table[key] = value
            elif key in table:
                del table[key]


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, int]]:
    """All whole numbers in a value of the file, each with its key."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _numbers(each, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each, key)
    elif isinstance(value, int):
        yield key, value


def _same(first: object, second: object) -> bool:
    """Whether two values of the file are the same; nan, which is not even equal to itself, is."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(each, second[key]) for key, each in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second or (first != first and second != second)
