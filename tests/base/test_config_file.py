"""The config file is changed in place: what the user wrote stays, and it is never half a file."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_local.base.config_file import ConfigFile
from dsmoe_local.base.errors import FileError, FormatError

BY_HAND = """\
# My settings.
temp = 0.5   # calm

[chat]
# for the chat alone
top-k = 20

[presets.wild]
temp = 1.4
"""


def test_comments_and_order_stay(tmp_path: Path) -> None:
    """Guards against a file that is dumped anew, without the user's own words."""
    path = tmp_path / "config.toml"
    path.write_text(BY_HAND)
    file = ConfigFile(path)
    file.set(("chat",), {"top-k": 30, "seed": 7})
    file.set(("presets", "calm"), {"temp": 0.1})
    file.set((), {"temp": None})
    text = path.read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# My settings.",
        "# for the chat alone",
    ]
    assert tomllib.loads(text) == {
        "chat": {"top-k": 30, "seed": 7},
        "presets": {"wild": {"temp": 1.4}, "calm": {"temp": 0.1}},
    }
    assert "[presets]\n" not in text


def test_it_is_made_with_its_folder_for_the_owner_alone(tmp_path: Path) -> None:
    """Guards against a config file that others can read."""
    path = tmp_path / "dsmoe-local" / "config.toml"
    ConfigFile(path).set(("chat",), {"stop": ["a", 'b"\n']})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert ConfigFile(path).values() == {"chat": {"stop": ["a", 'b"\n']}}
    assert os.listdir(path.parent) == ["config.toml"]


def test_taking_out_makes_no_file(tmp_path: Path) -> None:
    """Guards against an empty file from a save of nothing."""
    ConfigFile(tmp_path / "config.toml").set(("chat",), {"temp": None})
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """Guards against the link into a user's folder of such files, replaced by a copy."""
    real = tmp_path / "dotfiles.toml"
    real.write_text("temp = 1.0\n")
    link = tmp_path / "config.toml"
    link.symlink_to(real)
    ConfigFile(link).set((), {"temp": 0.25})
    assert link.is_symlink()
    assert tomllib.loads(real.read_text()) == {"temp": 0.25}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"temp = 1\ntop-k == 3\n", "line 2"),
        (b"temp = 1\nname = '\xff'\n", "line 2"),
        (b"a = " + b"[" * 50_000, "not valid TOML"),
        (b"a = 1\na = 2\n", "not valid TOML"),
    ],
)
def test_broken_files_name_the_line(content: bytes, words: str, tmp_path: Path) -> None:
    """Guards against a parser's own exception, or a file overwritten because it could not be read."""
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    file = ConfigFile(path)
    with pytest.raises(FormatError) as caught:
        file.values()
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(FormatError):
        file.set((), {"temp": 1.0})
    assert path.read_bytes() == content


def test_a_value_in_the_place_of_a_section(tmp_path: Path) -> None:
    """Guards the short error where `chat = 3` stands in the way of `[chat]`."""
    path = tmp_path / "config.toml"
    path.write_text("chat = 3\n")
    with pytest.raises(FormatError, match="chat is a value in the config file"):
        ConfigFile(path).set(("chat",), {"temp": 1.0})
    assert path.read_text() == "chat = 3\n"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Guards against an OSError that reaches the user as a bug."""
    (tmp_path / "config").write_text("")
    file = ConfigFile(tmp_path / "config" / "config.toml")
    assert file.values() == {}
    with pytest.raises(FileError, match="cannot be written"):
        file.set((), {"temp": 1.0})


LAYOUTS = [
    "",
    "# only a comment",
    BY_HAND,
    "chat = {temp = 1.0, top-k = 3}\n",
    "chat.temp = 1.0\nchat.top-k = 3\n",
    "[presets]\n[presets.calm]\ntemp = 0.1\n[chat]\ntemp = 2\n",
    "[chat]\ntemp = 1.0\n[presets.calm]\n[batch]\ntemp = 3\n[presets.wild]\ntop-k = 1\n",
    "presets = {calm = {temp = 1.0}}\n",
    "temp = 1.0\r\n\r\n[chat]\r\ntemp = 2.0 # x\r\n",
    "[chat]\ntemp = 1.0",
    "presets.calm.temp = 0.5\n",
]
VALUES = st.one_of(
    st.none(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.lists(st.text("a\"'\n\\\t日", max_size=4), max_size=3),
)


@given(
    layout=st.sampled_from(LAYOUTS),
    section=st.sampled_from([(), ("chat",), ("presets", "calm"), ("presets", "new"), ("presets", "日 本.x")]),
    changes=st.dictionaries(st.sampled_from(["temp", "top-k", "seed", "new key"]), VALUES, min_size=1),
)
def test_a_change_is_that_change_or_nothing(
    layout: str,
    section: tuple[str, ...],
    changes: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Guards against a change that loses another value, or lands in another section, in any layout."""
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_bytes(layout.encode())
    wanted = tomllib.loads(layout.replace("\r\n", "\n"))
    inner = wanted
    for name in section:
        inner = inner.setdefault(name, {})
    for key, value in changes.items():
        inner.pop(key, None)
        if value is not None:
            inner[key] = value
    try:
        ConfigFile(path).set(section, changes)
    except FileError:
        # The layout is one that cannot be changed.
        assert path.read_bytes() == layout.encode()
    else:
        assert ConfigFile(path).values() == wanted
        assert [line for line in path.read_text().splitlines() if line.startswith("#")] == [
            line for line in layout.splitlines() if line.startswith("#")
        ]


def test_nan_is_in_nobodys_way(tmp_path: Path) -> None:
    """Guards: a file with a nan, which is not even equal to itself, that can never be changed."""
    path = tmp_path / "config.toml"
    path.write_text("odd = nan\nlist = [1.5, nan, {x = nan}]\n")
    ConfigFile(path).set(("chat",), {"temp": 0.5})
    assert path.read_text() == "odd = nan\nlist = [1.5, nan, {x = nan}]\n\n[chat]\ntemp = 0.5\n"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """Guards: "not valid TOML, line 1" for what an editor of Windows has written."""
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbftemp = 1\n")
    assert ConfigFile(path).values() == {"temp": 1}
    ConfigFile(path).set((), {"temp": 2})
    assert ConfigFile(path).values() == {"temp": 2}


@pytest.mark.parametrize(
    "number", ["9" * 5000, "0x" + "f" * 5000, "9223372036854775808", "-9223372036854775809"]
)
@pytest.mark.parametrize("place", ["a = {}", "[a]\nb = [1, {{c = {}}}]"])
def test_numbers_beyond_64_bits(number: str, place: str, tmp_path: Path) -> None:
    """Guards: numbers that Python reads, but refuses to print, or does not even read."""
    path = tmp_path / "config.toml"
    path.write_text(place.format(number))
    for use in (ConfigFile(path).values, lambda: ConfigFile(path).set((), {"x": 1})):
        with pytest.raises(FormatError, match="too large"):
            use()
    path.write_text("a = 9223372036854775807\nb = -9223372036854775808\n")
    assert ConfigFile(path).values() == {"a": 2**63 - 1, "b": -(2**63)}


def test_depths_that_one_reader_alone_takes(tmp_path: Path) -> None:
    """Guards: a RecursionError of the writer for what the reader takes."""
    path = tmp_path / "config.toml"
    path.write_text(f"a = {'[' * 200}{']' * 200}\n")
    assert ConfigFile(path).values()
    with pytest.raises(FileError, match="layout"):
        ConfigFile(path).set((), {"x": 1})
