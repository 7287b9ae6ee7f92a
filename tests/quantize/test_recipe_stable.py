"""The same input gives the same recipe and the same file: in another process, measured anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.imatrices import random_imatrix
from support.tiny_gguf import MOE, write_tiny

from dsmoe_quantize.imatrix_file import write_imatrix

QUANTIZE = "from dsmoe_local.cli.main import quantize; quantize()"
TARGET = ("--target-bpw", "5.2", "--max-slow-share", "50", "--sample", "4096")


def test_in_another_process(tmp_path: Path) -> None:
    """Guards: a choice that depends on the order of a set, on threads, on what an earlier run has kept."""
    source = write_tiny(tmp_path / "tiny-BF16.gguf", MOE)
    write_imatrix(random_imatrix(MOE), tmp_path / "m.imatrix.gguf")
    found = []
    for seed, threads in (("1", "1"), ("2", "3")):
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-c", QUANTIZE, source, "out.gguf", *TARGET, "--threads", threads]
        command += ["--imatrix", tmp_path / "m.imatrix.gguf", "--recipe-out", "recipe.toml"]
        paths = {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(folder / "cache")}
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **paths, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert any((folder / "cache").rglob("*.json")), "measured here"
        found.append([(folder / name).read_bytes() for name in ("recipe.toml", "out.gguf")])
    assert found[0] == found[1]
