"""`dsmoe worker`: serves this machine's devices to models on other machines."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING

import click

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.options import FLAG, NUMBER, Group, option, text_value, typed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsmoe_local.engine.native import Device


@define_command(
    "worker",
    ("dsmoe worker", "Wait for a model at 127.0.0.1:50052."),
    ("dsmoe worker --ssh desktop", "Print how to use the machine `desktop` through ssh."),
    ("dsmoe chat model.gguf --rpc 127.0.0.1:50052", "Use a worker."),
)
@option(
    "--host",
    "host",
    "Address to listen at.",
    text_value("ADDRESS"),
    default="127.0.0.1",
    # `dsmoe serve` has options of these names.
    section_only=True,
    envvar="DSMOE_WORKER_HOST",
)
@option(
    "--port",
    "port",
    "Port.",
    typed(click.IntRange(1, 65535), "N"),
    default=50052,
    section_only=True,
    envvar="DSMOE_WORKER_PORT",
)
@option("-t, --threads", "n_threads", "Threads.", NUMBER, shown="physical cores")
@option(
    "--ssh",
    "ssh",
    "Print the commands that use a worker on HOST through ssh.",
    text_value("HOST"),
)
@option(
    "--insecure",
    "insecure",
    "Listen at an address that other machines can reach.",
    FLAG,
    Group.ACCESS,
    section_only=True,
    envvar="DSMOE_WORKER_INSECURE",
)
def command(host: str, port: int, n_threads: int | None, ssh: str | None, insecure: bool) -> None:
    """Compute layers of models that run on other machines, with llama.cpp's RPC protocol.

    A worker serves one model at a time. It uses its GPUs, or else its CPU. docs/workers.md explains which
    layers it gets.
    """
    from dsmoe_local.serve.options import is_loopback

    if ssh is not None:
        _show_tunnel(ssh, port)
        return
    address = _resolve(host)
    if not insecure and not is_loopback(address):
        raise UsageError(
            f"{safe_line(host, 60)} can be reached from other machines, and the protocol has no password and "
            "no encryption: whoever reaches the port can read the conversation and crash the worker",
            remedy="use ssh (dsmoe worker --ssh HOST shows how), or --insecure in a network that you trust",
        )
    _serve(address, port, n_threads)


def _resolve(host: str) -> str:
    """Return the IPv4 address of `host`: llama.cpp accepts no names to listen at. Raises DsmoeError."""
    import socket

    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a valid name"
        raise DsmoeError(
            f"{safe_line(host, 60)} cannot be used: {reason}",
            remedy="name an IPv4 address of this machine with --host",
        ) from error


def _show_tunnel(ssh: str, port: int) -> None:
    target = shlex.quote(safe_line(ssh, 200))
    click.echo("On this machine, in a terminal of its own:\n")
    click.echo(f"  ssh -t -L {port}:127.0.0.1:{port} {target} 'dsmoe worker --port {port}'\n")
    click.echo("Then, in another one:\n")
    click.echo(f"  dsmoe chat MODEL --rpc 127.0.0.1:{port}")


def _serve(host: str, port: int, n_threads: int | None) -> None:
    # Both must be set before llama.cpp's libraries are loaded.
    from dsmoe_local.engine.process.spawn import child_environment

    os.environ.update(child_environment())
    from dsmoe_local.engine import native
    from dsmoe_local.engine.load.machine import available_memory, physical_cores

    native.check_rpc()
    _check_address(host, port)
    found = native.list_devices()
    devices = native.offload_devices(found) or [each for each in found if each.kind is native.DeviceKind.CPU]
    threads = n_threads or physical_cores()
    _announce(devices, host, port, threads, available_memory())
    # llama.cpp's loop does not return to Python, so that only the default actions can end it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    native.serve_devices(f"{host}:{port}", [device.name for device in devices], threads)
    raise DsmoeError(f"{host}:{port} cannot be used", remedy="name another port with --port")


def _check_address(host: str, port: int) -> None:
    """Raise DsmoeError if the worker cannot listen at the address: llama.cpp does not say why."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DsmoeError(
                f"{host}:{port} cannot be used: {error.strerror}",
                remedy="name another port with --port, or an IPv4 address of this machine with --host",
            ) from error


def _announce(devices: Sequence[Device], host: str, port: int, n_threads: int, available: int) -> None:
    for device in devices:
        # ggml reports all of the main memory as free.
        n_free = min(device.n_free, available) if device.shares_memory else device.n_free
        click.echo(f"{device.name}: {device.description}, {format_size(n_free)} free, {n_threads} threads")
    free = available >> 30
    limit = f"={free}GiB" if len(devices) == 1 and devices[0].shares_memory and free else ""
    click.echo(f"use it with --rpc {host}:{port}{limit}")
