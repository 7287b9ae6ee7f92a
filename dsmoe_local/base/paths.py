"""The folders of our own files: the XDG folders if set, otherwise the platform's usual ones."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_APP = "dsmoe-local"


def config_folder() -> Path:
    """Return the folder of the config file."""
    return _folder("XDG_CONFIG_HOME", platformdirs.user_config_path(_APP))


def cache_folder() -> Path:
    """Return the folder of files that can be made again, such as the demo's models."""
    return _folder("XDG_CACHE_HOME", platformdirs.user_cache_path(_APP))


def data_folder() -> Path:
    """Return the folder of files that must not be lost, such as sessions."""
    return _folder("XDG_DATA_HOME", platformdirs.user_data_path(_APP))


def demo_folder() -> Path:
    """Return the folder of the demo's checkpoint and models."""
    return cache_folder() / "demo"


def absolute(path: Path) -> Path:
    """Return `path` as an absolute path; unchanged if the working folder was deleted."""
    try:
        return path.absolute()
    except FileNotFoundError:
        return path


def _folder(variable: str, default: Path) -> Path:
    configured = os.environ.get(variable, "")
    # The XDG specification says that relative paths are invalid and must be ignored.
    return Path(configured) / _APP if configured.startswith("/") else default
