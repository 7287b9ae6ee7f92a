"""What the tests of the command line share."""

from __future__ import annotations

from typing import Any

import pytest

from dsmoe_local.cli.commands import load_command


@pytest.fixture
def given_to_chat(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `dsmoe chat` is called with, in place of the call."""
    values: dict[str, Any] = {}

    def keep(**options: Any) -> None:
        values.clear()
        values.update(options)

    monkeypatch.setattr(load_command("chat"), "callback", keep)
    return values
