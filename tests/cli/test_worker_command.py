"""`dsmoe worker` and `--rpc`."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner
from support.configured import complaint
from support.models import tiny_model
from support.workers import workers

from benchmarks.support.tools import free_port
from dsmoe_local.cli.commands import load_command

START = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


def start(host: str, port: str, *flags: str) -> str:
    """Run a worker that cannot listen at its address. Return what it says."""
    command = [sys.executable, "-c", START, "worker", "--host", host, "--port", port, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "localhost", "laptop"])
def test_other_machines_need_insecure(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a port without a password that the whole network can reach by mistake, perhaps by a name."""
    names = {"localhost": "10.0.0.1", "laptop": "10.0.0.2"}
    monkeypatch.setattr(socket, "gethostbyname", lambda name: names.get(name, name))
    told = complaint(capsys, "worker", "--host", host, status=2)
    assert "no password" in told
    assert "--insecure" in told
    assert "--ssh" in told


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_that_is_taken(host: str) -> None:
    """Guards: an exit without a message, or with llama.cpp's; a name that is passed to llama.cpp."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = start(host, port)
    assert f"127.0.0.1:{port} cannot be used" in told
    assert "--port" in told


@pytest.mark.parametrize("host", ["::1", "no.such.host.invalid", "a..b", "192.0.2.1"])
def test_an_address_that_cannot_be_used(host: str) -> None:
    """Guards: a traceback, or an address that llama.cpp cannot read."""
    told = start(host, str(free_port()), "--insecure")
    assert host in told
    assert "cannot be used" in told
    assert "--host" in told


def test_the_tunnel() -> None:
    """Guards: a command that a shell reads in another way; a worker that is started in its place."""
    result = CliRunner().invoke(load_command("worker"), ["--ssh", "me@desk top", "--port", "7"])
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if "ssh -t" in line)
    command = ["ssh", "-t", "-L", "7:127.0.0.1:7", "me@desk top", "dsmoe worker --port 7"]
    assert shlex.split(line) == command
    assert "--rpc 127.0.0.1:7" in result.stdout


def ask(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run `dsmoe chat -p`."""
    command = [sys.executable, "-c", START, "chat", str(tiny_model()), "-p", "hi", "--temp", "0", "-n", "20"]
    return subprocess.run(
        [*command, "-t", "1", "-c", "128", *flags],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


def test_an_answer_with_a_worker() -> None:
    """Guards: an option that the commands read, but not the engine."""
    with workers(1) as (worker,):
        with_worker = ask("--rpc", f"{worker.endpoint}=1GiB", "-ngl", "all")
    assert with_worker.returncode == 0, with_worker.stderr
    assert f"worker {worker.endpoint}" in with_worker.stderr
    assert with_worker.stdout == ask().stdout


def test_nobody_there() -> None:
    """Guards: a traceback, or a crash of the engine, instead of a message."""
    address = f"127.0.0.1:{free_port()}"
    done = ask("--rpc", address)
    assert done.returncode == 1
    assert f"the worker {address} refuses connections" in done.stderr
    assert "dsmoe worker" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
