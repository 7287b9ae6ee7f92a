"""`dsmoe devices`: the devices of this build of llama.cpp, and how to get a build for a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsmoe_local.base.errors import PIP
from dsmoe_local.base.sizes import format_size
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.options import json_option
from dsmoe_local.cli.output import console, plain_table, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from dsmoe_local.engine.native import Device

BACKENDS: Mapping[str, tuple[str, str, str]] = {
    "MTL": ("Metal", "GGML_METAL", "Apple silicon; needs Xcode's command line tools"),
    "CUDA": ("CUDA", "GGML_CUDA", "NVIDIA; needs the CUDA toolkit (nvcc)"),
    "Vulkan": ("Vulkan", "GGML_VULKAN", "AMD, Intel, NVIDIA; needs the Vulkan SDK (glslc, SPIR-V headers)"),
}
"""For each backend of ggml: its usual name, the CMake option, hardware and tools."""


def build_command(switch: str) -> str:
    """Return the command that installs llama.cpp with a backend, given its CMake option."""
    return (
        f'CMAKE_ARGS="-D{switch}=ON" {PIP} install --force-reinstall --no-cache-dir --no-deps '
        "--no-binary llama-cpp-python 'llama-cpp-python>=0.3.36,<0.3.37'"
    )


@define_command(
    "devices",
    ("dsmoe devices", "List devices and their memory."),
    ("dsmoe chat -dev CUDA0 model.gguf", "Chat on one of them."),
)
@json_option()
def command(as_json: bool) -> None:
    """List the devices that models can run on, with their memory.

    --device and --tensor-override take these names. For each GPU backend that this build of llama.cpp does
    not have, the command that installs it is printed.
    """
    from dsmoe_local.engine import native
    from dsmoe_local.engine.load.machine import available_memory

    devices = native.list_devices()
    available = available_memory()
    used = {device.name for device in native.offload_devices(devices)}
    missing = {key: value for key, value in BACKENDS.items() if key not in {d.backend for d in devices}}
    if as_json:
        print_json(_as_json(devices, available, used, missing), indent=2)
        return
    out = console(soft_wrap=True)
    out.print(_table(devices, available, used))
    if not used:
        out.print("No GPU: models run on the CPU.\n")
    if missing:
        out.print("To build llama.cpp with support for another device, run one of:\n")
    for name, switch, needs in missing.values():
        out.print(f"  {name} ({needs})\n    {build_command(switch)}")


def _free(device: Device, available: int) -> int:
    # For devices in main memory, ggml reports all of it as free.
    return min(device.n_free, available) if device.shares_memory else device.n_free


def _as_json(
    devices: Sequence[Device], available: int, used: set[str], missing: Mapping[str, tuple[str, str, str]]
) -> dict[str, Any]:
    return {
        "devices": [
            {
                "name": device.name,
                "backend": device.backend,
                "kind": device.kind.value,
                "description": device.description,
                "free_bytes": _free(device, available),
                "total_bytes": device.n_bytes,
                "offload": device.name in used,
            }
            for device in devices
        ],
        "builds": {name: build_command(switch) for name, switch, _ in missing.values()},
    }


def _table(devices: Sequence[Device], available: int, used: set[str]) -> Table:
    from rich.text import Text

    headings = ("device", "backend", "kind", "free", "memory", "offload", "")
    table = plain_table(*headings, left=("device", "backend", "kind", "offload"), wrap=("",))
    for device in devices:
        table.add_row(
            device.name,
            device.backend,
            device.kind.value,
            *(format_size(size) if size else "?" for size in (_free(device, available), device.n_bytes)),
            "yes" if device.name in used else "",
            Text(device.description),
        )
    return table
