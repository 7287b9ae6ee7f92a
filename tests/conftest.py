"""Give every test its own cache, data and config folders, and no settings of the user."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# OpenMP threads that wait by spinning take the processor from the other test processes. Both libraries and
# child processes read this when they start, so it is set before any test module is imported.
os.environ.update(OMP_WAIT_POLICY="passive", OMP_NUM_THREADS="1")

# Some containers forbid bytecode files: hundreds of child processes would compile the package each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A background job of a shell ignores SIGINT, one of nohup SIGHUP. So would the children that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A busy machine is no failure of a test, and a change fails only for what it changes. New examples are drawn
# by `pytest --hypothesis-profile random`.
settings.register_profile("random", deadline=None)
settings.register_profile("same examples", deadline=None, derandomize=True)
settings.load_profile("same examples")


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the XDG folders at a temporary place."""
    root: Path = tmp_path_factory.mktemp("xdg")
    for name in [name for name in os.environ if name.startswith("DSMOE_")]:
        monkeypatch.delenv(name)
    for kind in ("CACHE", "DATA", "CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(root / kind.lower()))
