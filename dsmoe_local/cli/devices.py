"""`dsmoe devices`: what this build of llama.cpp computes on, and how to get a build for a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from dsmoe_local.engine.native import Device

BACKENDS: Mapping[str, tuple[str, str, str]] = {
    "MTL": ("Metal", "GGML_METAL", "Apple silicon; Xcode's command line tools"),
    "CUDA": ("CUDA", "GGML_CUDA", "NVIDIA; the CUDA toolkit (nvcc)"),
    "Vulkan": ("Vulkan", "GGML_VULKAN", "AMD, Intel, NVIDIA; the Vulkan SDK (glslc)"),
}
"""ggml's name of a backend: what people call it, what switches it on, what it runs on and needs."""


def build_command(switch: str) -> str:
    """What to type for a build of llama.cpp with a backend."""
    return (
        f'CMAKE_ARGS="-D{switch}=ON" pip install --force-reinstall --no-cache-dir --no-deps '
        "--no-binary llama-cpp-python 'llama-cpp-python>=0.3.36,<0.4'"
    )


@click.command(name="devices")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """List what models can run on, with its memory, and how to add GPUs.

    The names are those that --device and --tensor-override take.
    """
    from dsmoe_local.engine import native
    from dsmoe_local.engine.load.machine import available_memory

    devices = native.list_devices()
    available = available_memory()
    used = {device.name for device in native.offload_devices(devices)}
    missing = {key: value for key, value in BACKENDS.items() if key not in {d.backend for d in devices}}
    if as_json:
        click.echo(json.dumps(_as_json(devices, available, used, missing), indent=2, ensure_ascii=True))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(_table(devices, available, used))
    if not used:
        console.print("No GPU: models run on the processor.\n")
    if missing:
        console.print("This build of llama.cpp can be replaced by one for:\n")
    for name, switch, runs_on in missing.values():
        console.print(f"  {name} ({runs_on})\n    {build_command(switch)}")


def _free(device: Device, available: int) -> int:
    # ggml counts all of the machine's memory as free.
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
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("device", "backend", "kind"):
        table.add_column(heading, no_wrap=True)
    for heading in ("free", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("offload", no_wrap=True)
    table.add_column("")
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
