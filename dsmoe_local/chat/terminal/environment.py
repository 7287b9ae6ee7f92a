"""What the environment says about the terminal. Imports nothing: it is asked before anything is drawn."""

from __future__ import annotations

import os

_PRINTERS = ("", "dumb", "unknown")


def only_prints() -> bool:
    """Whether the terminal can do nothing but print: no colours, no moving about."""
    return os.environ.get("TERM", "") in _PRINTERS


def wants_colour() -> bool:
    """Whether the environment lets a terminal have colours."""
    return not os.environ.get("NO_COLOR") and not only_prints()
