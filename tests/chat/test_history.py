"""The history of inputs: bounded, private, and never in the way."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from prompt_toolkit.history import FileHistory

from dsmoe_local.chat.terminal.input import open_history


def typed(path: Path) -> list[str]:
    """What the file holds, as prompt_toolkit reads it, the oldest first."""
    return [*FileHistory(str(path)).load_history_strings()][::-1]


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a history that grows for ever, and is read at every start; half an input left of it."""
    monkeypatch.setattr("dsmoe_local.chat.terminal.input.MAX_HISTORY_BYTES", 2_000)
    path = tmp_path / "history"
    opened = open_history(path)
    texts = [f"question {number}\n# not an entry\n\nlast line" for number in range(300)]
    largest = 0
    for text in texts:
        opened.append_string(text)
        largest = max(largest, path.stat().st_size)
    assert largest <= 2 * 2_000
    left = typed(path)
    assert left == texts[-len(left) :]
    assert len(left) > 10
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["history"]


def test_an_old_file_is_cut_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a file of years that stays as large as it is; a link to it replaced by a file."""
    (tmp_path / "real").write_bytes(b"".join(b"\n# day\n+input %d\n" % number for number in range(1_000)))
    path = tmp_path / "history"
    path.symlink_to(tmp_path / "real")
    monkeypatch.setattr("dsmoe_local.chat.terminal.input.MAX_HISTORY_BYTES", 1_000)
    open_history(path)
    assert path.is_symlink()
    assert path.stat().st_size <= 1_000
    assert typed(path)[-1] == "input 999"


def test_an_input_larger_than_all_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a paste of megabytes that is kept for ever, or half of it."""
    monkeypatch.setattr("dsmoe_local.chat.terminal.input.MAX_HISTORY_BYTES", 100)
    path = tmp_path / "history"
    opened = open_history(path)
    opened.append_string("x" * 1_000)
    assert typed(path) == []
    opened.append_string("small")
    assert typed(path) == ["small"]
