"""`dsmoe devices`, without a GPU and with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.devices import BACKENDS, open_devices, run_with_devices

from dsmoe_local.base.errors import PIP
from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.devices import build_command
from dsmoe_local.engine import native
from dsmoe_local.engine.native import Device, DeviceKind


def devices(*arguments: str) -> str:
    result = CliRunner().invoke(load_command("devices"), arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_processor_is_listed_and_builds_are_told() -> None:
    """Guards: an empty table on a machine without a GPU, and no way to learn how to get one."""
    listed = json.loads(devices("--json"))
    cpu = next(device for device in listed["devices"] if device["name"] == "CPU")
    assert 0 < cpu["free_bytes"] <= cpu["total_bytes"]
    assert set(listed["builds"]) == {"Metal", "CUDA", "Vulkan"}
    page = Path(__file__).parents[2] / "docs" / "placement.md"
    assert build_command("GGML_CUDA").replace(PIP, "pip") in page.read_text(encoding="utf-8")
    text = devices()
    assert "No GPU" in text
    for switch in ("-DGGML_METAL=ON", "-DGGML_CUDA=ON", "-DGGML_VULKAN=ON"):
        assert switch in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_there_is_listed(backend: str) -> None:
    """Guards: devices read from another copy of ggml than the one that computes; memory read wrongly."""
    with open_devices(backend, 2) as opened:
        done = run_with_devices(opened, "dsmoe", "devices", "--json")
        assert done.returncode == 0, done.stderr
        listed = {device["name"]: device for device in json.loads(done.stdout)["devices"]}
        assert set(listed) == {"CPU", opened.name(0), opened.name(1)}
        device = listed[opened.name(1)]
        assert device["backend"] == backend
        assert device["offload"]
        assert device["total_bytes"] == listed["CPU"]["total_bytes"]
        table = run_with_devices(opened, "dsmoe", "devices").stdout
        assert opened.name(0) in table
        assert "No GPU" not in table


def test_builds_that_are_there_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: advice to build what is running; markup in a device's own text."""
    card = Device("CUDA0", "[red]card", "CUDA", DeviceKind.GPU, 3 * 10**9, 8 * 10**9)
    monkeypatch.setattr(native, "list_devices", lambda: (card,))
    assert set(json.loads(devices("--json"))["builds"]) == {"Metal", "Vulkan"}
    text = devices()
    assert "[red]card" in text
    assert "GGML_CUDA" not in text
    assert "8 GB" in text


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["CUDA0", "RPC0"], ["RPC0", "CUDA0"]),
        (["CUDA0", "Vulkan0", "Vulkan1"], ["CUDA0", "Vulkan1"]),
        (["CUDA0", "iGPU0"], ["CUDA0"]),
        (["RPC0", "iGPU0"], ["RPC0", "iGPU0"]),
        (["CPU", "BLAS"], []),
    ],
)
def test_choice_of_devices(names: list[str], chosen: list[str]) -> None:
    """Guards: one card used twice through two backends; an integrated GPU that slows a real one down."""
    kinds = {"iGPU": DeviceKind.INTEGRATED, "CPU": DeviceKind.CPU, "BLAS": DeviceKind.ACCELERATOR}
    hardware = {"CUDA0": "0000:01", "Vulkan0": "0000:01", "Vulkan1": "0000:02"}
    found = []
    for name in names:
        backend = name.rstrip("0123456789")
        kind = kinds.get(backend, DeviceKind.GPU)
        found.append(Device(name, "", backend, kind, 1, 1, hardware.get(name, "")))
    assert [device.name for device in native.offload_devices(found)] == chosen
