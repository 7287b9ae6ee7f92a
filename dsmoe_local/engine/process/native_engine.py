"""The engine that the host serves unless a test names another: the real one, whose log goes to stderr."""

from __future__ import annotations

import os
import sys
import threading

from dsmoe_local.base import progress
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.native.library import echo_log
from dsmoe_local.engine.types import ModelOptions


def load(options: ModelOptions, listen: progress.Listener, stop: threading.Event) -> Engine:
    """See `Engine.load`."""
    descriptor = sys.stderr.fileno()
    # Straight to the pipe: what a buffer holds when the process is killed is lost.
    echo_log(lambda text: os.write(descriptor, text))
    return Engine.load(options, listen, stop)
