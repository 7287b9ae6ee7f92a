"""Every test gets its own cache, data and config folders and no settings: nothing of the user's is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the XDG folders at a temporary place."""
    root: Path = tmp_path_factory.mktemp("xdg")
    for name in [name for name in os.environ if name.startswith("DSMOE_")]:
        monkeypatch.delenv(name)
    for kind in ("CACHE", "DATA", "CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(root / kind.lower()))
