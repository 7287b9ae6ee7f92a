"""Errors that cross processes."""

from __future__ import annotations

import pickle

import pytest

from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, MissingExtraError
from dsmoe_local.engine.errors import EngineCrashError


@pytest.mark.parametrize(
    "error",
    [
        DsmoeError("what", where="where", remedy="remedy"),
        MissingExtraError("extra", "package", "purpose"),
        InterruptedRunError("what", signal_number=15),
        EngineCrashError("what", log=("line",)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_can_be_pickled(error: DsmoeError) -> None:
    """Guards: an error of a Ray worker that cannot be read, because its constructor takes other arguments."""
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
