"""Models that several test modules share: loaded once in a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.models import smollm2

from dsmoe_local.engine import native


@pytest.fixture(scope="session")
def model() -> Iterator[native.Model]:
    """A real vocabulary and weights."""
    loaded = native.Model(smollm2())
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def context(model: native.Model) -> Iterator[native.Context]:
    """A context of `model` for samplers, which only use it to share a buffer."""
    made = native.Context(model, native.ContextOptions(256, 256, 256, 1, 1))
    yield made
    made.close()
