"""A Vulkan device for the tests in this folder."""

from __future__ import annotations

import pytest

from dsmoe_local.engine import native


@pytest.fixture(scope="session")
def vulkan() -> str:
    """The name of the device, in this process and its children. Skips the test if there is none."""
    names = [device.name for device in native.list_devices() if device.backend == "Vulkan"]
    if not names:
        pytest.skip("no Vulkan device: run `make gpu-check`")
    return names[0]
