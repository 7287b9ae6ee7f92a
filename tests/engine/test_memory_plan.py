"""Context and weights against memory: the arithmetic, held to llama.cpp's own figures."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import TINY
from support.models import smollm2, tiny_model

from dsmoe_local.engine import native
from dsmoe_local.engine.errors import OutOfMemoryError
from dsmoe_local.engine.load.machine import available_memory, physical_cores
from dsmoe_local.engine.load.memory import (
    BufferOptions,
    MemoryPlan,
    buffer_bytes,
    layer_cache_bytes,
    plan_memory,
)
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.presets import PRESETS

GB = 10**9
BUFFERS = BufferOptions(512, True, "f16", "f16")


def sixteen_b() -> Hyperparameters:
    return PRESETS["deepseekmoe-16b"].hp


def plan(*, weights: float, available: float, requested: int | None = None) -> MemoryPlan:
    return plan_memory(
        sixteen_b(), BUFFERS, weights=int(weights * GB), available=int(available * GB), requested=requested
    )


@pytest.mark.parametrize("flash_attention", [True, False])
@pytest.mark.parametrize("n_ubatch", [64, 512])
@pytest.mark.parametrize("n_context", [256, 2048, 8192])
@pytest.mark.parametrize("which", ["tiny", "smollm2"])
def test_bound_holds_llama_cpp_s_own_sizes(
    which: str, n_context: int, n_ubatch: int, flash_attention: bool
) -> None:
    """Guards: buffers larger than planned, and plans so generous that they refuse what would fit."""
    path = tiny_model() if which == "tiny" else smollm2()
    check_bound(path, BufferOptions(n_ubatch, flash_attention, "f16", "f16"), n_context)


@pytest.mark.parametrize("flash_attention", [True, False])
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("n_sequences", [3, 16])
@pytest.mark.parametrize("n_context", [1000, 8192])
def test_bound_holds_for_many_sequences(
    n_context: int, n_sequences: int, unified: bool, flash_attention: bool
) -> None:
    """Guards: the padding of each share forgotten, or rows of logits."""
    options = BufferOptions(512, flash_attention, "f16", "f16", n_sequences, unified, n_sequences)
    check_bound(smollm2(), options, n_context)


def check_bound(path: Path, options: BufferOptions, n_context: int) -> None:
    _, hp = read_model(path)
    model = native.Model(path, measure_only=True)
    context = native.Context(
        model,
        native.ContextOptions(
            n_context,
            options.n_ubatch,
            options.n_ubatch,
            1,
            1,
            "auto" if options.flash_attention else "off",
            n_sequences=options.n_sequences,
            unified=options.unified,
            n_outputs=options.n_outputs,
        ),
    )
    log = "\n".join(native.log_lines())
    context.close()
    model.close()
    kv = float(re.findall(r"llama_kv_cache: size = +([\d.]+) MiB", log)[0]) * 2**20
    compute = sum(map(float, re.findall(r"(?:compute|output) buffer size = +([\d.]+) MiB", log))) * 2**20
    planned = buffer_bytes(hp, options, n_context)
    assert kv + compute <= planned + 2**16
    assert planned <= kv + 3 * compute + 6 * 2**20
    assert hp.n_layers * layer_cache_bytes(hp, options, n_context) == pytest.approx(kv, abs=2**13)


def test_kv_cache_of_the_16b_model() -> None:
    """Guards: the figure everything else rests on: 940 MB at 4,096 tokens."""
    no_buffers = BufferOptions(1, True, "f16", "f16")
    assert buffer_bytes(sixteen_b(), no_buffers, 4096) == pytest.approx(940e6, rel=0.01)
    halved = BufferOptions(1, True, "q8_0", "q8_0")
    assert buffer_bytes(sixteen_b(), halved, 4096) == pytest.approx(500e6, rel=0.02)


def test_all_fits() -> None:
    """Guards: notes, or a smaller context, where there is room."""
    assert plan(weights=10, available=16) == MemoryPlan(4096, False, ())


def test_smaller_context_beside_the_weights() -> None:
    """Guards: a default context that pushes the weights out of memory."""
    chosen = plan(weights=10, available=11.2)
    assert 2048 <= chosen.n_context < 4096
    assert not chosen.paged
    assert "context reduced from 4096" in chosen.notes[0]


def test_weights_that_exceed_memory_are_paged() -> None:
    """Guards: refusing the 16B model on an 8 GB laptop, or taking a useless context for it."""
    chosen = plan(weights=10, available=7)
    assert chosen.n_context == 4096
    assert chosen.paged
    assert "paged from disk" in chosen.notes[-1]


def test_request_is_granted_over_the_weights() -> None:
    """Guards: -c ignored although the buffers fit."""
    chosen = plan(weights=10, available=10.9, requested=4096)
    assert (chosen.n_context, chosen.paged) == (4096, True)


def test_request_that_cannot_be_met_does_not_page_the_weights() -> None:
    """Guards: a slow model and all memory taken, for a context that is not what was asked for anyway."""
    chosen = plan(weights=1, available=10, requested=1_000_000)
    assert not chosen.paged
    assert 30_000 < chosen.n_context < 40_000
    assert buffer_bytes(sixteen_b(), BUFFERS, chosen.n_context) < 8.7 * GB
    assert len(chosen.notes) == 1


def test_request_too_large_is_reduced_and_said() -> None:
    """Guards: a context that cannot be allocated killing the process."""
    chosen = plan(weights=10, available=2, requested=100_000)
    assert chosen.n_context < 100_000
    assert buffer_bytes(sixteen_b(), BUFFERS, chosen.n_context) < 2 * GB
    assert "context reduced from 100000" in chosen.notes[0]


@pytest.mark.parametrize("unified", [True, False])
def test_many_sequences_want_a_context_each(unified: bool) -> None:
    """Guards: sixteen requests squeezed into one request's context; a note about what nobody asked for."""
    buffers = replace(BUFFERS, n_sequences=4, unified=unified, n_outputs=4)
    chosen = plan_memory(sixteen_b(), buffers, weights=10 * GB, available=24 * GB, requested=None)
    assert chosen == MemoryPlan(4 * 4096, False, ())
    chosen = plan_memory(sixteen_b(), buffers, weights=10 * GB, available=13 * GB, requested=None)
    assert chosen.n_context < 4 * 4096
    # In one pool any of them may still be as long as the model allows.
    assert bool(chosen.notes) is not unified
    if not unified:
        assert chosen.n_context % (4 * 256) == 0
        assert f"from {4 * 4096} to {chosen.n_context}" in chosen.notes[0]


def test_each_share_is_padded() -> None:
    """Guards: a plan that is too small for what llama.cpp then makes of it."""
    streams = BufferOptions(1, True, "f16", "f16", n_sequences=16, unified=False)
    pool = BufferOptions(1, True, "f16", "f16", n_sequences=16)
    assert layer_cache_bytes(sixteen_b(), streams, 1600) == layer_cache_bytes(sixteen_b(), pool, 16 * 256)
    with pytest.raises(OutOfMemoryError, match="4096 tokens"):
        plan_memory(sixteen_b(), streams, weights=0, available=GB // 2, requested=None)


def test_nothing_fits() -> None:
    """Guards: going on with a context of zero."""
    with pytest.raises(OutOfMemoryError, match="512 tokens"):
        plan(weights=10, available=0.2)


def test_model_with_a_context_below_the_smallest() -> None:
    """Guards: tiny models refused for having less context than our smallest."""
    hp = replace(TINY, n_context=64)
    assert plan_memory(hp, BUFFERS, weights=0, available=GB, requested=None).n_context == 64


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_memory_of_the_system_and_of_cgroups(tmp_path: Path) -> None:
    """Guards: a container's limit overlooked, or its page cache counted as used."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo="MemTotal: 999 kB\nMemAvailable:    8000 kB\n")
    assert available_memory(proc, groups) == 8000 * 1024
    write(proc / "self", cgroup="0::/a/b\n")
    write(groups / "a" / "b", memory__max="max\n", memory__current="1\n")
    assert available_memory(proc, groups) == 8000 * 1024
    stat = "anon 1000000\ninactive_file 500000\nactive_file 100000\n"
    write(groups / "a", memory__max="4000000\n", memory__current="2000000\n", memory__stat=stat)
    assert available_memory(proc, groups) == 2_600_000
    write(proc / "self", cgroup="4:memory:/a\n0::/\n")
    write(
        groups / "memory" / "a",
        memory__limit_in_bytes="3000000",
        memory__usage_in_bytes="2500000",
        memory__stat="total_inactive_file 0\ntotal_active_file 100000\n",
    )
    assert available_memory(proc, groups) == 600_000


@pytest.mark.parametrize(
    ("own", "groups", "n_cores"),
    [
        ("0::/a/b\n", {"": "max 100000", "a": "400000 100000", "a/b": "max 100000"}, 4),
        ("0::/a/b\n", {"": "700000 100000", "a": "900000 100000", "a/b": "550000 100000"}, 5),
        ("0::/not/mounted\n", {"": "300000 100000"}, 3),
        ("0::/a\n", {"a": "10000 100000"}, 1),
        ("0::/a\n", {"a": "0 0", "": "x"}, 16),
        ("", {"": "100000 100000"}, 16),
    ],
)
def test_cpu_quota_of_v2(
    own: str, groups: dict[str, str], n_cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a quota of the process's own cgroup, or of one between it and the root, overlooked: more
    threads than processors, which then wait for each other.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5000, 5016)), raising=False)
    write(tmp_path / "proc" / "self", cgroup=own)
    for name, limit in groups.items():
        write(tmp_path / "cgroup" / name, cpu__max=f"{limit}\n")
    assert physical_cores(tmp_path / "proc", tmp_path / "cgroup") == n_cores


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_cpu_quota_of_v1(mount: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the older cgroups' quota, which has other names, overlooked; "none" (-1) taken for a number."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5000, 5016)), raising=False)
    own = "12:pids:/p\n4:cpu,cpuacct:/a/b\n1:name=systemd:/s\n"
    write(tmp_path / "proc" / "self", cgroup=own)
    root = tmp_path / "cgroup" / mount
    for folder, quota in (("", -1), ("a", 600_000), ("a/b", -1), ("s", 100_000), ("p", 100_000)):
        write(root / folder, cpu__cfs_quota_us=f"{quota}\n", cpu__cfs_period_us="100000\n")
    assert physical_cores(tmp_path / "proc", tmp_path / "cgroup") == 6


def test_this_machine() -> None:
    """Guards: figures that cannot be."""
    assert 1 <= physical_cores() <= 4096
    assert available_memory() > 2**20
