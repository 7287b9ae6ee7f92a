"""The children that read pickles and tokenizers: what they inherit, and what they cannot do."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe_convert import check_encoding, pickle_bin, restricted
from dsmoe_convert.errors import CheckpointError, TokenizerError
from dsmoe_local.base.errors import InterruptedRunError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has it")

PROBE = """
import json, os, resource, sys
from dsmoe_convert import restricted

def attempt(work):
    try:
        work()
    except BaseException as error:
        return type(error).__name__
    return "done"

def connect():
    import socket
    socket.create_connection(("127.0.0.1", int(sys.argv[1].split()[1])), 5).close()

restricted.leave_network()
import socket
restricted.confine(memory=64 << 20, seconds=3)
limits = ("RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_CORE", "RLIMIT_NOFILE")
print(json.dumps({
    "environment": sorted(os.environ),
    "folder": os.getcwd(),
    "files": sorted(os.listdir("/dev/fd")),
    "limits": {name: resource.getrlimit(getattr(resource, name))[1] for name in limits},
    "memory": attempt(lambda: bytearray(256 << 20)),
    "write": attempt(lambda: open(sys.argv[1].split()[0], "wb", 0).write(b"x")),
    "connect": attempt(connect),
}))
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules a child finds first."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return folder


def probe(modules: Path, argument: str) -> Mapping[str, Any]:
    (modules / "probe.py").write_text(PROBE)
    status, output = restricted.run_module("probe", argument, seconds=60)
    assert status == 0
    found: dict[str, Any] = json.loads(output)
    return found


def test_what_a_child_inherits(modules: Path, tmp_path: Path) -> None:
    """HF_TOKEN and all else of the environment, open files, and limits that are none."""
    found = probe(modules, f"{tmp_path / 'written'} 1")
    known = {*restricted._SET, *restricted._KEPT, "LC_CTYPE"}
    assert set(found["environment"]) <= known
    assert found["folder"] == "/"
    assert len(found["files"]) == 4  # the last is that of the listing itself
    limits = found["limits"]
    assert (limits["RLIMIT_FSIZE"], limits["RLIMIT_NPROC"], limits["RLIMIT_CORE"]) == (0, 0, 0)
    assert 3 <= limits["RLIMIT_CPU"] < 60
    assert limits["RLIMIT_NOFILE"] < 32
    assert found["write"] == "OSError"
    assert not (tmp_path / "written").exists() or not (tmp_path / "written").read_bytes()


@LINUX
def test_memory_is_limited(modules: Path, tmp_path: Path) -> None:
    """A pickle that asks for more memory than the machine has."""
    assert probe(modules, f"{tmp_path / 'written'} 1")["memory"] == "MemoryError"


def may_leave_the_network(modules: Path) -> bool:
    (modules / "leave.py").write_text(
        "import os\nfrom dsmoe_convert import restricted\n"
        "before = os.readlink('/proc/self/ns/net')\nrestricted.leave_network()\n"
        "print(os.readlink('/proc/self/ns/net') != before)\n"
    )
    return restricted.run_module("leave", "", seconds=60)[1] == b"True\n"


@LINUX
def test_there_is_no_network(modules: Path, tmp_path: Path) -> None:
    """A pickle that sends away what it finds."""
    if not may_leave_the_network(modules):
        pytest.skip("this system lets nobody leave the network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = probe(modules, f"{tmp_path / 'written'} {server.getsockname()[1]}")
    assert found["connect"] == "OSError"


def test_an_endless_child(modules: Path) -> None:
    """A child that neither answers nor ends; one that closes its output and goes on; one that has too much to
    say; one that is not wanted any more.
    """
    (modules / "endless.py").write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(restricted.GaveUpError, match="too long"):
        restricted.run_module("endless", "", seconds=0.5)
    (modules / "silent.py").write_text("import os, time\nos.close(1)\ntime.sleep(600)\n")
    with pytest.raises(restricted.GaveUpError, match="too long"):
        restricted.run_module("silent", "", seconds=0.5)
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedRunError):
        restricted.run_module("endless", "", seconds=60, stop=stop)


def test_an_endless_answer(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that fills the parent's memory."""
    monkeypatch.setattr(restricted, "MAX_OUTPUT", 1 << 20)
    (modules / "verbose.py").write_text("while True:\n    print('x' * 1000000)\n")
    with pytest.raises(restricted.GaveUpError, match="output is too long"):
        restricted.run_module("verbose", "", seconds=60)


REPORT = """
import json, os, resource
def report(*arguments, **options):
    raise ValueError(json.dumps([
        "HF_TOKEN" in os.environ, resource.getrlimit(resource.RLIMIT_FSIZE)[1],
        resource.getrlimit(resource.RLIMIT_NPROC)[1],
    ]))
"""


def test_the_reader_of_pickles_is_confined(modules: Path, tmp_path: Path) -> None:
    """A reader that opens the file before it has given anything up."""
    torch.save({"x": torch.zeros(3)}, tmp_path / "x.bin")
    (modules / "torch.py").write_text(REPORT + "load = report\n")
    with pytest.raises(CheckpointError) as caught:
        pickle_bin.read_tensors(tmp_path / "x.bin")
    assert "ValueError: [false, 0, 0]" in str(caught.value)


def test_the_reader_of_tokenizers_is_confined(modules: Path, tmp_path: Path) -> None:
    """As above: a tokenizer.json comes from the same place."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (modules / "tokenizers.py").write_text(REPORT + "class Tokenizer:\n    from_file = report\n")
    with pytest.raises(TokenizerError) as caught:
        check_encoding.encode(tmp_path / "tokenizer.json", "text")
    assert "[false, 0, 0]" in str(caught.value)


ANSWERS: dict[str, object] = {
    "no list": {"x": 1},
    "no entry": [None],
    "four parts": [["x", "F32", [1], 0]],
    "a name that is none": [[5, "F32", [1], 0, 4]],
    "a shape that is none": [["x", "F32", 1, 0, 4]],
    "a length that is none": [["x", "F32", ["1"], 0, 4]],
    "a negative length": [["x", "F32", [-1, -1], 0, 4]],
    "a negative offset": [["x", "I8", [4], -4, 4]],
    "negative bytes": [["x", "I8", [4], 4, -4]],
    "beyond the end": [["x", "F32", [1], 1 << 40, 4]],
    "another size": [["x", "F32", [2], 0, 4]],
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_answer_is_not_believed(case: str, modules: Path, tmp_path: Path) -> None:
    """A child that was taken over, and answers what it likes: a traceback, or a read outside of the file."""
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(100))
    answer = json.dumps({"tensors": ANSWERS[case]})
    (modules / "torch.py").write_text(f"import os\nos.write(1, {answer.encode()!r})\nos._exit(0)\n")
    with pytest.raises(CheckpointError, match="outside the file"):
        pickle_bin.read_tensors(path)
