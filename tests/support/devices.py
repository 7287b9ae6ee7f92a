"""Devices that models can be offloaded to, without a GPU: those of an RPC worker, and Mesa's Vulkan driver.

A worker on loopback makes llama.cpp see GPUs that compute on this processor, and so does Vulkan. A registered
device stays for the life of a process and a lost worker ends it, so that everything that uses one runs in a
process of its own: `python -m support.devices TASK …`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.support.tools import free_port

FAKE_FREE = 2 << 30
BACKENDS = ("RPC", pytest.param("Vulkan", marks=pytest.mark.gpu))
"""Parameters of a fixture that yields `open_devices`."""
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices of a backend of ggml: what a process needs to see them."""

    backend: str
    endpoint: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def name(self, index: int) -> str:
        """Return the name of a device."""
        return f"{self.backend}{index}"


@contextlib.contextmanager
def open_devices(backend: str, n_devices: int) -> Iterator[Devices]:
    """Yield devices of "RPC" or "Vulkan". Skips the test where there are none."""
    if not has_backend(backend):
        pytest.skip(f"this build of llama.cpp has no {backend} backend")
    if backend == "RPC":
        with rpc_worker(n_devices) as endpoint:
            yield Devices(backend, endpoint)
        return
    # The same device, as often as it is named.
    devices = Devices(backend, environment={"GGML_VK_VISIBLE_DEVICES": ",".join("0" * n_devices)})
    listed = run_with_devices(devices, "dsmoe", "devices", "--json").stdout
    if devices.name(0) not in listed:
        pytest.skip("Vulkan finds no device: install a driver, such as Debian's mesa-vulkan-drivers")
    yield devices


def has_backend(name: str) -> bool:
    """Return whether this build of llama.cpp has a backend."""
    from dsmoe_local.engine.native.library import backend_function

    return bool(backend_function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)(name.encode()))


def _rpc_function(name: bytes, result: Any, *arguments: Any) -> Any:
    from dsmoe_local.engine.native.library import backend_function

    registry = backend_function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)(b"RPC")
    look_up = backend_function(
        "ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
    )
    return ctypes.CFUNCTYPE(result, *arguments)(look_up(registry, name))


@contextlib.contextmanager
def rpc_worker(n_devices: int) -> Iterator[str]:
    """Run a worker with `n_devices` devices and yield its endpoint."""
    endpoint = f"127.0.0.1:{free_port()}"
    worker = subprocess.Popen(
        _command("serve", endpoint, str(n_devices)),
        # Its log would fill a pipe that nobody reads.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=_ROOT,
        env=_environment(),
    )
    try:
        _wait_for(endpoint, worker)
        yield endpoint
    finally:
        worker.kill()
        worker.wait()


def run_cases(devices: Devices, cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Load and run each of the cases (see `_run`) in one process that has the devices."""
    done = run_with_devices(devices, "run", json.dumps(cases))
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def run_with_devices(devices: Devices, task: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a `task` of `main` in a process that has the devices."""
    return subprocess.run(
        _command(task, devices.endpoint, *arguments),
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**_environment(), **devices.environment},
        timeout=300,
        check=False,
    )


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "support.devices", *arguments]


def _environment() -> dict[str, str]:
    folders = [_ROOT, _ROOT / "convert", _ROOT / "quantize", _ROOT / "tests"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}


def _wait_for(endpoint: str, worker: subprocess.Popen[bytes]) -> None:
    host, _, port = endpoint.partition(":")
    deadline = time.monotonic() + 60
    while True:
        assert worker.poll() is None, "the RPC worker ended"
        assert time.monotonic() < deadline, "the RPC worker does not listen"
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return


def _serve(endpoint: str, n_devices: int) -> None:
    from dsmoe_local.engine.native.library import backend_function

    first = backend_function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)(0)
    devices = (ctypes.c_void_p * n_devices)(*[first] * n_devices)
    start = _rpc_function(
        b"ggml_backend_rpc_start_server",
        None,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_void_p,
    )
    start(endpoint.encode(), None, 1, n_devices, ctypes.addressof(devices))


def register(endpoint: str) -> None:
    """Register a worker's devices with llama.cpp in this process; nothing to do without an endpoint."""
    if not endpoint:
        return
    from dsmoe_local.engine.native.library import backend_function

    add = _rpc_function(b"ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
    backend_function("ggml_backend_register", None, ctypes.c_void_p)(add(endpoint.encode()))


def _summaries(path: str, ids: Sequence[int], placement: dict[str, Any]) -> dict[str, Any]:
    from support.observed import graph_summaries

    return graph_summaries(Path(path), ids, **placement)


def _run(case: dict[str, Any]) -> dict[str, Any]:
    """Load `model` with `options`, the devices having `free` bytes each, and complete some token ids.

    Returns what llama.cpp says of its buffers, the notes and progress, the words of the placement and the
    token ids; or the error.
    """
    from dsmoe_local.base.errors import DsmoeError
    from dsmoe_local.base.progress import Advanced, Event, Note, Started
    from dsmoe_local.engine import native
    from dsmoe_local.engine.engine import Engine
    from dsmoe_local.engine.types import NO_TEMPLATE, ModelOptions, Request, SamplingParameters

    notes: list[str] = []
    progress = {"done": 0, "total": 0}
    free = case.get("free", [FAKE_FREE] * 2)

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        elif isinstance(event, Started):
            progress["total"] += event.total
        elif isinstance(event, Advanced):
            progress["done"] += event.amount

    def list_devices() -> tuple[native.Device, ...]:
        rooms = iter(free)
        return tuple(replace(each, n_free=next(rooms)) if each.is_gpu else each for each in known)

    known = native.list_devices()

    class LoudModel(native.Model):
        def __init__(self, path: Path, **settings: Any) -> None:
            super().__init__(path, **settings)
            # Creating a context clears the log.
            log.extend(() if settings.get("measure_only") else native.log_lines())

    log: list[str] = []
    options = {"n_threads": 1, "chat_template": NO_TEMPLATE, **case.get("options", {})}
    for name in ("tensor_overrides", "devices"):
        if options.get(name) is not None:
            options[name] = tuple(tuple(x) if isinstance(x, list) else x for x in options[name])
    patched = patch.multiple(native, list_devices=list_devices, Model=LoudModel)
    try:
        with patched:
            engine = Engine.load(ModelOptions(Path(case["model"]), **options), listen)
    except DsmoeError as error:
        return {"error": type(error).__name__, "message": str(error), "notes": notes}
    with engine:
        request = Request("r", (0, 5, 6, 7), SamplingParameters(temperature=0), max_tokens=8)
        events = list(engine.submit(request))
        return {
            "buffers": _buffers([*log, *engine.log()]),
            "notes": notes,
            "progress": progress,
            "placement": engine.info.placement,
            "n_context": engine.info.n_context,
            "token_ids": [event.token_id for event in events if event.token_id is not None],
        }


def _buffers(log: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the MiB of each kind of buffer (model, KV, compute) on each device, from the log."""
    found: dict[str, dict[str, float]] = {"model": {}, "KV": {}, "compute": {}}
    for line in log:
        match = re.search(r"(\w+?)(?:\[\S*)? +(model|KV|compute) buffer size = +([\d.]+) MiB", line)
        if match:
            # "MTL0_Private" is memory of a device, "Vulkan_Host" is not.
            device = match[1].partition("_")[0]
            found[match[2]][device] = found[match[2]].get(device, 0.0) + float(match[3])
    return found


def main(task: str, endpoint: str, *arguments: str) -> None:
    """`serve` devices; or register them, then `run` cases, `observe` a model, or run a `dsmoe` command."""
    if task == "serve":
        _serve(endpoint, int(arguments[0]))
        return
    register(endpoint)
    if task == "run":
        json.dump([_run(case) for case in json.loads(arguments[0])], sys.stdout)
    elif task == "observe":
        json.dump(_summaries(*json.loads(arguments[0])), sys.stdout)
    else:
        from dsmoe_local.cli.main import dsmoe

        sys.argv = ["dsmoe", *arguments]
        dsmoe()


if __name__ == "__main__":
    main(*sys.argv[1:])
