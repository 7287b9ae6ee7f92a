"""How much context fits: the choice on plain numbers, and llama.cpp's own probe of what a context takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import MIXTURES, family_model, smollm2, tiny_model
from support.tiny_gguf import FILES, write_tiny

from dsmoe_local.engine import native
from dsmoe_local.engine.errors import ModelLoadError, OutOfMemoryError
from dsmoe_local.engine.load import probe as probing
from dsmoe_local.engine.load.machine import available_memory, physical_cores
from dsmoe_local.engine.load.memory import ContextRequest, MemoryPlan, _largest_context, plan_memory
from dsmoe_local.engine.load.placement import HOST
from dsmoe_local.engine.load.probe import MAX_MEASURED, Probe, measure_context, read_sizes, sizes_by_context
from dsmoe_local.model.cost import kv_bytes_per_token
from dsmoe_local.model.gguf_model import read_model

GB = 10**9
MIB = 2**20


def sixteen_b(n_context: int) -> int:
    """Cache and buffers of the 16B model, roughly."""
    return 229_376 * n_context + 100 * MIB


def plan(
    *,
    weights: float,
    available: float,
    n_context: int | None = None,
    n_trained: int = 4096,
    n_sequences: int = 1,
    unified: bool = True,
) -> MemoryPlan:
    request = ContextRequest(n_context, n_trained, n_sequences, unified)
    return plan_memory(request, sixteen_b, weights=int(weights * GB), available=int(available * GB))


def options(n_context: int, flash_attention: str = "auto", **more: Any) -> native.ContextOptions:
    return replace(native.ContextOptions(n_context, 512, 512, 1, 1, flash_attention), **more)


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        (tiny_model, options(256)),
        (tiny_model, options(8192, "off")),
        (smollm2, options(8192, n_ubatch=64)),
        (smollm2, options(8192, cache_type_k="q8_0", cache_type_v="q8_0")),
        (tiny_model, options(1000, n_sequences=3, n_outputs=3)),
        (tiny_model, options(8192, n_sequences=16, n_outputs=16, unified=False)),
        *((partial(family_model, name), options(8192)) for name in MIXTURES),
    ],
)
def test_a_probe_reports_what_llama_cpp_allocates(
    model: Callable[[], Path], asked: native.ContextOptions
) -> None:
    """Guards: sizes that depend on the vocabulary or the weights, which a probe does not have."""
    path = model()
    with Probe(*read_model(path)) as probe:
        probed = probe.open()
        sizes = measure_context(probed, asked)
        probed.close()
    loaded = native.Model(path)
    native.Context(loaded, asked).close()
    loaded.close()
    log = "\n".join(native.log_lines())
    cache = re.findall(r"KV buffer size = +([\d.]+) MiB", log)
    compute = re.findall(r"(?:compute|output) buffer size = +([\d.]+) MiB", log)
    assert sizes.cache == pytest.approx(sum(map(float, cache)) * MIB, abs=2**15)
    assert sizes.compute == {HOST: pytest.approx(sum(map(float, compute)) * MIB, abs=2**16)}


@pytest.mark.parametrize("name", FILES)
def test_the_cache_is_as_large_as_the_costs_say(name: str, tmp_path: Path) -> None:
    """Values that MLA does not cache; the cache of layers that are not loaded."""
    path = write_tiny(tmp_path / "tiny.gguf", FILES[name])
    for types in (("f16", "f16"), ("q8_0", "q8_0"), ("f32", "f16")):
        if FILES[name].is_mla and types[0] != types[1]:
            continue
        with Probe(*read_model(path)) as probe:
            model = probe.open()
            asked = options(1 << 15, cache_type_k=types[0], cache_type_v=types[1])
            found = measure_context(model, asked).cache
            model.close()
        assert found == pytest.approx((1 << 15) * kv_bytes_per_token(FILES[name], *types), abs=2**15)


def test_long_contexts_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: gigabytes allocated to measure a context that a header claims; a length measured twice."""
    measured: list[int] = []

    def measure(_: native.Model, asked: native.ContextOptions) -> probing.BufferSizes:
        measured.append(asked.n_context)
        return really_measure(model, asked)

    really_measure = probing.measure_context
    with Probe(*read_model(tiny_model())) as probe:
        model = probe.open()
        exact = really_measure(model, options(4 * MAX_MEASURED)).total
        monkeypatch.setattr(probing, "measure_context", measure)
        sizes = sizes_by_context(model, options)
        assert sizes(4 * MAX_MEASURED).total == pytest.approx(exact, rel=0.01)
        assert sizes(2**40).cache > 2**40
        assert sizes(512) is sizes(512)
        model.close()
    assert sorted(measured) == [512, MAX_MEASURED // 2, MAX_MEASURED]


def test_a_probe_counts_the_experts_asked_for() -> None:
    """Guards: buffers planned for fewer experts than are used."""
    file, hp = read_model(tiny_model())
    sizes = []
    for n_experts in (1, hp.n_routed_experts):
        with Probe(file, replace(hp, n_experts_per_token=n_experts)) as probe:
            model = probe.open()
            sizes.append(measure_context(model, options(512)).total)
            model.close()
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("failing", ["Probe._write", "scratch_folder"])
def test_a_probe_needs_no_temporary_files(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Guards: a model that cannot be loaded because the cache is full or read-only."""
    path = tiny_model()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with Probe(*read_model(path)) as probe:
        model = probe.open()
        sizes = measure_context(model, options(512))
        model.close()
    monkeypatch.setattr(f"dsmoe_local.engine.load.probe.{failing}", full)
    with Probe(*read_model(path)) as probe:
        model = probe.open()
        assert measure_context(model, options(512)) == sizes
        model.close()
    assert path.exists()


KILLED = """
import sys
from pathlib import Path
from dsmoe_local.engine.load.probe import Probe
from dsmoe_local.model.gguf_model import read_model
with Probe(*read_model(Path(sys.argv[1]))) as probe:
    print(probe._path, flush=True)
    input()
"""


def test_the_probe_of_a_killed_process_is_removed() -> None:
    """Guards: a file of the model's apparent size that stays for ever."""
    path = tiny_model()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with Probe(*read_model(path)):
            assert theirs.exists(), "its process still runs"
        process.kill()
    assert theirs.exists()
    assert theirs != path
    with Probe(*read_model(path)):
        assert not theirs.parent.exists()


def test_sizes_in_the_log_of_several_backends() -> None:
    """Guards: buffers of the host, or of device 10, counted for device 1; silence taken for sizes of 0."""
    log = [
        "llama_context: CUDA_Host  output buffer size =     2.00 MiB",
        "llama_kv_cache:      CUDA1 KV buffer size =   0.00 MiB",
        "llama_kv_cache: size =   48.00 MiB (   512 cells,   3 layers,  1/1 seqs), K (f16):   24.00 MiB",
        "sched_reserve: RPC0[127.0.0.1:50052] compute buffer size =    96.00 MiB",
        "sched_reserve:      CUDA1 compute buffer size =   1.00 MiB",
        "sched_reserve:     CUDA10 compute buffer size =   4.00 MiB",
        "sched_reserve:  CUDA_Host compute buffer size =   9.00 MiB",
        "sched_reserve: MTL0_Private compute buffer size =   3.00 MiB",
        "sched_reserve:        CPU compute buffer size =   7.00 MiB",
    ]
    sizes = read_sizes(log, ["RPC0", "CUDA1", "CUDA10", "MTL0"])
    wanted = {"RPC0": 96, "CUDA1": 1, "CUDA10": 4, "MTL0": 3, HOST: 18}
    assert {name: round(size / MIB) for name, size in sizes.compute.items()} == wanted
    assert sizes.total == pytest.approx((48 + 122) * MIB, abs=2**18)
    for silent in (log[:3], log[3:], []):
        with pytest.raises(ModelLoadError, match="does not report"):
            read_sizes(silent, ["CUDA1"])


def test_all_fits() -> None:
    """Guards: notes, or a smaller context, although everything fits."""
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
    chosen = plan(weights=10, available=10.9, n_context=4096)
    assert (chosen.n_context, chosen.paged) == (4096, True)


def test_request_that_cannot_be_met_does_not_page_the_weights() -> None:
    """Guards: weights that are paged for a context that is reduced anyway."""
    chosen = plan(weights=1, available=10, n_context=1_000_000)
    assert not chosen.paged
    assert 30_000 < chosen.n_context < 40_000
    assert sixteen_b(chosen.n_context) < 8.7 * GB
    assert len(chosen.notes) == 1


def test_request_too_large_is_reduced_with_a_note() -> None:
    """Guards: a context that cannot be allocated killing the process."""
    chosen = plan(weights=10, available=2, n_context=100_000)
    assert chosen.n_context < 100_000
    assert sixteen_b(chosen.n_context) < 2 * GB
    assert "context reduced from 100000" in chosen.notes[0]


@given(
    limit=st.integers(1, 4_000_000),
    wanted=st.integers(1, 4_000_000),
    power=st.sampled_from([0.3, 1, 1.01, 3]),
)
def test_the_largest_context_that_fits_is_found(limit: int, wanted: int, power: float) -> None:
    """Guards: a context that does not fit or is too small; many slow measurements, whatever the sizes are."""
    calls: list[int] = []

    def size(n_context: int) -> int:
        calls.append(n_context)
        return int(n_context**power * 10**9)  # no two lengths have the same size

    budget = size(limit)
    calls.clear()
    found = _largest_context(size, budget, wanted, 256)
    assert found == (wanted if wanted <= limit else limit // 256 * 256)
    assert len(calls) <= (8 if power == 1 else 50)


@pytest.mark.parametrize("unified", [True, False])
def test_many_sequences_want_a_context_each(unified: bool) -> None:
    """Guards: many requests that share one request's context; a note although no length was requested."""
    chosen = plan(weights=10, available=24, n_sequences=4, unified=unified)
    assert chosen == MemoryPlan(4 * 4096, False, ())
    chosen = plan(weights=10, available=13, n_sequences=4, unified=unified)
    assert chosen.n_context < 4 * 4096
    # In one shared cache any of them may still be as long as the model allows.
    assert bool(chosen.notes) is not unified
    if not unified:
        assert chosen.n_context % (4 * 256) == 0
        assert f"from {4 * 4096} to {chosen.n_context}" in chosen.notes[0]


@pytest.mark.parametrize(("n_sequences", "unified", "least"), [(1, True, 512), (16, False, 4096)])
def test_nothing_fits(n_sequences: int, unified: bool, least: int) -> None:
    """Guards: going on with a context of zero; padding of separate caches forgotten."""
    with pytest.raises(OutOfMemoryError, match=f"{least} tokens"):
        plan(weights=0, available=0.2, n_sequences=n_sequences, unified=unified)


def test_model_with_a_context_below_the_smallest() -> None:
    """Guards: tiny models refused for having less context than our smallest."""
    assert plan(weights=0, available=1, n_trained=64).n_context == 64


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
