"""The same input gives the same recipe and the same file: in another process, measured anew or kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.imatrices import random_imatrix
from support.tiny_gguf import FOUR_LAYERS, write_tiny

from dsmoe_quantize.imatrix_file import write_imatrix

QUANTIZE = "from dsmoe_local.cli.main import quantize; quantize()"
TARGETS = {
    "first": ("--target-bpw", "5.2", "--max-slow-share", "50"),
    "second": ("--target-bpw", "6.1", "--cpu", "none"),
}


def quantize(folder: Path, target: str, seed: str, threads: str) -> list[bytes]:
    """The recipe and the model, made by a process of its own with what `folder` has kept."""
    command = [sys.executable, "-c", QUANTIZE, "../tiny-BF16.gguf", f"{target}.gguf"]
    command += [*TARGETS[target], "--sample", "4096", "--threads", threads]
    command += ["--imatrix", "../m.imatrix.gguf", "--recipe-out", f"{target}.toml"]
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
    return [(folder / f"{target}{ending}").read_bytes() for ending in (".toml", ".gguf")]


def test_in_another_process(tmp_path: Path) -> None:
    """Guards: a choice that depends on the order of a set, on threads, on what an earlier run has kept."""
    write_tiny(tmp_path / "tiny-BF16.gguf", FOUR_LAYERS)
    write_imatrix(random_imatrix(FOUR_LAYERS), tmp_path / "m.imatrix.gguf")
    found: list[dict[str, list[bytes]]] = []
    # Each target is measured for in one folder, and solved from what is kept in the other.
    for seed, threads, order in (("1", "1", ("first", "second")), ("2", "3", ("second", "first"))):
        folder = tmp_path / seed
        folder.mkdir()
        made = {}
        for target in order:
            made[target] = quantize(folder, target, seed, threads)
            assert len(list((folder / "cache").rglob("*.json"))) == 1, "measured once"
        found.append(made)
    assert found[0] == found[1]
    assert found[0]["first"] != found[0]["second"]
