"""Where our own files live: the XDG folders when set, else the platform's usual ones."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_APP = "dsmoe-local"


def config_folder() -> Path:
    """What the user says once for all: the config file."""
    return _folder("XDG_CONFIG_HOME", platformdirs.user_config_path(_APP))


def cache_folder() -> Path:
    """What can be made again: the demo's models."""
    return _folder("XDG_CACHE_HOME", platformdirs.user_cache_path(_APP))


def data_folder() -> Path:
    """What must not be lost: history and, later, sessions."""
    return _folder("XDG_DATA_HOME", platformdirs.user_data_path(_APP))


def demo_folder() -> Path:
    """The demo's checkpoint and models."""
    return cache_folder() / "demo"


def absolute(path: Path) -> Path:
    """`path` from the root; as it is if the working folder was deleted."""
    try:
        return path.absolute()
    except FileNotFoundError:
        return path


def _folder(variable: str, default: Path) -> Path:
    configured = os.environ.get(variable, "")
    # The XDG specification: a relative path is invalid and ignored.
    return Path(configured) / _APP if configured.startswith("/") else default
