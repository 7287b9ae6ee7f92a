"""A model that exceeds the memory: which pages are kept, which are read ahead, and that the text is the same.

The system is the oracle of what is in memory and locked (mincore, /proc), gguf's reader of where tensors lie.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.models import MIXTURES, family_model, tiny_model
from support.other_models import OTHERS, write_other
from support.split_files import split_with_gguf
from support.tiny_gguf import FILES, MOE, NARROW, write_tiny

from dsmoe_local.base import progress
from dsmoe_local.base.errors import FileError, InterruptedRunError, UsageError
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.load import fit, loaded_model, mapped_file, prefetch, resident
from dsmoe_local.engine.load.mapped_file import MappedFile, MappedFiles, Range, whole_pages
from dsmoe_local.engine.load.placement import HOST, DeviceShare, Placement
from dsmoe_local.engine.load.resident import Resident, host_tensors, plan_resident, speed_note
from dsmoe_local.engine.native import tensors
from dsmoe_local.engine.types import ModelOptions, ObserverOptions, Request, SamplingParameters
from dsmoe_local.model.gguf_model import loaded_tensors, read_any_model, read_model
from dsmoe_local.model.layout import Role, layer_of, role_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")

PAGE = mmap.PAGESIZE
AMPLE = 1 << 40
NAMES_KEPT = (
    "norm",
    "attn_",
    "ffn_gate_inp",
    "shexp",
    "ffn_gate.",
    "ffn_up.",
    "ffn_down.",
    "output.",
    "exp_probs_b",
)


def placement(n_gpu_layers: int = 0, n_cpu_moe: int = 0) -> Placement:
    return Placement(n_gpu_layers, n_cpu_moe, (), (), (), (), DeviceShare("CPU", 0, 0, 0))


def ignore(event: progress.Event) -> None:
    pass


def make_resident(path: Path, ranges: tuple[Range, ...]) -> Resident:
    return Resident([path], ranges, ignore, threading.Event())


def in_memory(path: Path) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Of each page of a file, whether the system has it in its cache."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-size // PAGE), np.uint8)
        assert libc.mincore(view.ctypes.data, size, pages.ctypes.data) == 0
        del view
    return (pages & 1).astype(np.bool_)


def locked_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmLck:"))


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file of 24 MB of which nothing is in memory."""
    path = tmp_path / "cold.bin"
    path.write_bytes(os.urandom(24 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(path).any():
        pytest.skip("the file system keeps files in memory")
    return path


@pytest.fixture
def may_lock() -> None:
    mapped_file.raise_lock_limit()
    with mmap.mmap(-1, 1 << 20) as area:
        view = np.frombuffer(area, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        allowed = ctypes.CDLL(None).mlock(address, ctypes.c_size_t(1 << 20)) == 0
        del view
    if not allowed:
        pytest.skip("this system forbids locking memory")


@pytest.mark.parametrize("name", ["tied", *FILES])
def test_what_every_token_reads_is_kept(tmp_path: Path, name: str) -> None:
    """Guards: a missing tensor; experts, the embedding or layers that are not loaded kept in memory."""
    path = write_tiny(tmp_path / "m.gguf", {"tied": NARROW, **FILES}[name])
    file, hp = read_model(path)
    found = host_tensors(loaded_tensors(file, hp), hp, placement())
    ranges = plan_resident(found.always, AMPLE)
    kept = {page for pages in ranges for page in range(pages.start // PAGE, pages.end // PAGE)}
    wanted: set[int] = set()
    experts = 0
    for tensor in gguf.GGUFReader(path).tensors:
        if (layer_of(tensor.name) or 0) >= hp.n_layers:
            continue
        experts += int(tensor.n_bytes) if "_exps" in tensor.name else 0
        if "_exps" in tensor.name or (tensor.name == "token_embd.weight" and name != "tied"):
            continue
        assert tensor.name == "token_embd.weight" or any(part in tensor.name for part in NAMES_KEPT)
        start, end = int(tensor.data_offset), int(tensor.data_offset) + int(tensor.n_bytes)
        wanted |= set(range(start // PAGE, -(-end // PAGE)))
    assert kept == wanted
    assert found.expert_bytes == experts


def test_budget_is_never_exceeded_and_small_tensors_come_first(tmp_path: Path) -> None:
    """Guards: locking all memory; no memory left for experts; a reversed order of priority."""
    file, hp = read_model(write_tiny(tmp_path / "m.gguf", MOE))
    always = host_tensors(file.tensors.values(), hp, placement()).always
    whole = sum(pages.size for pages in plan_resident(always, AMPLE))
    previous = -1
    for budget in range(0, 2 * whole, whole // 37):
        size = sum(pages.size for pages in plan_resident(always, budget))
        assert size <= budget * 3 // 4
        previous = max(previous, size)
    assert previous == whole
    assert plan_resident(always, 0) == plan_resident(always, -5) == ()
    # Room for a few pages: the norm of the output, not the output.
    few = plan_resident(always, 4 * PAGE)
    norm = file.tensors["output_norm.weight"]
    assert any(pages.start <= norm.offset < pages.end for pages in few)
    output = file.tensors["output.weight"]
    assert not any(pages.start <= output.offset + output.n_bytes // 2 < pages.end for pages in few)


def test_the_pages_of_a_split_model(tmp_path: Path) -> None:
    """Guards: pages of one file kept at the offsets of another, or joined across files."""
    files = split_with_gguf(write_tiny(tmp_path / "m.gguf", NARROW), tmp_path / "split", 5)
    file, hp = read_model(files[0])
    assert len(files) > 3
    ranges = plan_resident(host_tensors(file.tensors.values(), hp, placement()).always, AMPLE)
    kept = {(pages.part, page) for pages in ranges for page in range(pages.start // PAGE, pages.end // PAGE)}
    wanted: set[tuple[int, int]] = set()
    for part, path in enumerate(files):
        for tensor in gguf.GGUFReader(path).tensors:
            if "_exps" not in tensor.name:
                start, end = int(tensor.data_offset), int(tensor.data_offset) + int(tensor.n_bytes)
                wanted |= {(part, page) for page in range(start // PAGE, -(-end // PAGE))}
    assert kept == wanted
    held = Resident(files, ranges, ignore, threading.Event())
    held.close()
    with pytest.raises(FileError):
        Resident([files[0], tmp_path / "missing"], (), ignore, threading.Event())


def test_what_lies_on_a_gpu_is_not_kept(tmp_path: Path) -> None:
    """Guards: pages of offloaded layers locked, experts left on the host not counted."""
    file, hp = read_model(write_tiny(tmp_path / "m.gguf", MOE))
    found = host_tensors(file.tensors.values(), hp, placement(n_gpu_layers=4, n_cpu_moe=7))
    assert {layer_of(tensor.name) for tensor in found.always} == set(range(6))  # of nine, three and output
    assert {layer_of(tensor.name) for tensor in found.experts} == set(range(1, 7))
    everything = host_tensors(file.tensors.values(), hp, placement(n_gpu_layers=10))
    assert everything.always == ()
    assert everything.experts == ()


@pytest.mark.usefixtures("may_lock")
def test_pages_are_locked_until_close(cold: Path) -> None:
    """Guards: pages that are not locked, wrong pages, or pages that stay locked."""
    before = locked_bytes()
    ranges = (Range(0, 4 * PAGE), Range(64 * PAGE, 3000 * PAGE))
    kept = make_resident(cold, ranges)
    try:
        assert kept.mode == "locked"
        assert locked_bytes() - before == kept.n_locked == kept.n_bytes == 2940 * PAGE
        pages = in_memory(cold)
        assert pages[:4].all()
        assert pages[64:3000].all()
    finally:
        kept.close()
    assert locked_bytes() == before
    kept.close()


def test_pages_are_touched_where_locking_is_forbidden(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an error where locking is forbidden; pages touched in every step, or only once."""
    locks: list[Range] = []
    touches: list[Range] = []

    def lock(self: MappedFile, pages: Range) -> bool:
        locks.append(pages)
        return len(locks) == 1

    really_touch = MappedFile.touch

    def touch(self: MappedFile, pages: Range) -> None:
        touches.append(pages)
        really_touch(self, pages)

    monkeypatch.setattr(MappedFile, "lock", lock)
    monkeypatch.setattr(MappedFile, "touch", touch)
    monkeypatch.setattr(resident, "_LOCK_BYTES", 1024 * PAGE)
    kept = make_resident(cold, (Range(0, 3000 * PAGE),))
    second, third = Range(1024 * PAGE, 2048 * PAGE), Range(2048 * PAGE, 3000 * PAGE)
    assert touches == [second, third]
    assert in_memory(cold)[1024:3000].all()
    assert kept.n_locked == 1024 * PAGE
    assert kept.mode.startswith("8.09 MB of them touched every second")
    for now, count in ((100.0, 4), (100.5, 4), (101.5, 6)):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        kept.refresh()
        assert len(touches) == count
    kept.close()


def test_interrupted_while_pages_are_read(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a load that cannot be interrupted, or leaves its pages locked."""
    before = locked_bytes()
    stop = threading.Event()
    monkeypatch.setattr(resident, "_LOCK_BYTES", 256 * PAGE)
    seen: list[progress.Event] = []

    def listen(event: progress.Event) -> None:
        seen.append(event)
        if isinstance(event, progress.Advanced):
            stop.set()

    with pytest.raises(InterruptedRunError):
        Resident([cold], (Range(0, 3000 * PAGE),), listen, stop)
    assert len([event for event in seen if isinstance(event, progress.Advanced)]) == 1
    assert isinstance(seen[-1], progress.Finished)
    assert locked_bytes() == before


def test_long_pieces_are_fetched_whole(cold: Path) -> None:
    """Guards: the kernel silently truncates read-ahead requests at the device's limit."""
    file = MappedFile(cold)
    try:
        file.fetch(Range(512 * PAGE, 5000 * PAGE))
        # A page that is asked for is there once it has been read, which a read of it waits for.
        with cold.open("rb") as other:
            os.posix_fadvise(other.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            before = read_bytes()
            for page in range(512, 5000):
                os.pread(other.fileno(), 1, page * PAGE)
            assert read_bytes() - before == 0
            os.pread(other.fileno(), 1, 6000 * PAGE)
            assert read_bytes() - before == PAGE
    finally:
        file.close()


def read_bytes() -> int:
    """What this thread has read from disk."""
    lines = Path(f"/proc/self/task/{threading.get_native_id()}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def test_limits_of_a_disk(tmp_path: Path) -> None:
    """Guards: limits that are not found for a partition; an error for a file system without a disk."""
    device = os.makedev(8, 3)
    assert mapped_file._fetch_bytes(device, tmp_path) == 128 << 10
    disk = tmp_path / "sda"
    (disk / "queue").mkdir(parents=True)
    (disk / "queue" / "read_ahead_kb").write_text("512\n")
    (disk / "queue" / "max_sectors_kb").write_text("1280\n")
    (disk / "sda3").mkdir()
    (tmp_path / "8:3").symlink_to(disk / "sda3")
    assert mapped_file._fetch_bytes(device, tmp_path) == 1280 << 10
    (tmp_path / "8:0").symlink_to(disk)
    assert mapped_file._fetch_bytes(os.makedev(8, 0), tmp_path) == 1280 << 10


def test_files_that_cannot_be_mapped(tmp_path: Path) -> None:
    """Guards: a bare OSError or ValueError from the system."""
    with pytest.raises(FileError):
        MappedFile(tmp_path / "missing")
    (tmp_path / "empty").touch()
    with pytest.raises(FileError):
        MappedFile(tmp_path / "empty")


def test_what_is_told(cold: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards: a wrong bound, or a note about a model that fits."""
    file, hp = read_model(write_tiny(tmp_path / "m.gguf", MOE))
    found = host_tensors(file.tensors.values(), hp, placement())
    always = sum(tensor.n_bytes for tensor in found.always)
    monkeypatch.setattr(resident, "read_speed", lambda path: 1e9)
    half = speed_note(cold, found, hp, always, found.expert_bytes // 2)
    # Two of three experts are used, and half of them are in memory.
    paged = found.expert_bytes // 3
    assert half.endswith(f"at 1 GB/s that is at most {1e9 / paged:.2g} tokens/s")
    assert speed_note(cold, found, hp, always, found.expert_bytes) == ""
    assert "from disk" in speed_note(cold, found, hp, 0, found.expert_bytes)
    monkeypatch.setattr(resident, "read_speed", lambda path: None)
    assert speed_note(cold, found, hp, always, 0).endswith("from disk")


def test_speed_of_a_disk(cold: Path, tmp_path: Path) -> None:
    """Guards: measuring the page cache; errors on file systems without direct reads."""
    speed = mapped_file.read_speed(cold)
    assert speed is None or 1e5 < speed < 1e12
    assert not in_memory(cold).any()
    (tmp_path / "small").write_bytes(b"x")
    assert mapped_file.read_speed(tmp_path / "small") is None


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> list[Range]:
    """Tiny models are taken to exceed the memory; the list of what is read ahead."""
    monkeypatch.setattr(loaded_model, "available_memory", lambda: 16 << 20)

    def fit_model(*arguments: Any) -> fit.Fit:
        return replace(fit.fit_model(*arguments), paged=True, n_buffer_bytes=0)

    monkeypatch.setattr(loaded_model, "fit_model", fit_model)
    fetched: list[Range] = []
    fetch = MappedFiles.fetch

    def record(self: MappedFiles, pages: Range) -> None:
        fetched.append(pages)
        fetch(self, pages)

    monkeypatch.setattr(MappedFiles, "fetch", record)
    return fetched


def load(notes: list[str], path: Path | None = None, **more: Any) -> Engine:
    def listen(event: progress.Event) -> None:
        if isinstance(event, progress.Note):
            notes.append(event.text)

    options = ModelOptions(path or tiny_model(), n_threads=2, chat_template="deepseek-moe", **more)
    return Engine.load(options, listen, threading.Event())


def text_of(engine: Engine) -> str:
    request = Request("r", "Once upon a time", sampling=SamplingParameters(temperature=0), max_tokens=12)
    return "".join(event.text for event in engine.submit(request))


@pytest.mark.parametrize(
    ("model", "per_file"),
    [(tiny_model, 0), (tiny_model, 9), *((partial(family_model, name), 0) for name in MIXTURES)],
)
def test_text_of_a_paged_model_and_what_was_read_ahead(
    model: Callable[[], Path], per_file: int, short_of_memory: list[Range], tmp_path: Path
) -> None:
    """Guards: different text; prefetched experts other than the chosen ones, or in another file."""
    path = split_with_gguf(model(), tmp_path / "tiny", per_file)[0] if per_file else model()
    file, hp = read_model(path)
    notes: list[str] = []
    with load(notes, path, observers=(ObserverOptions("routing"),)) as engine:
        text = text_of(engine)
        layers = engine.observe("routing")["layers"]
    assert any("stay in memory" in note for note in notes)
    wanted: set[tuple[int, int]] = set()
    for layer in layers:
        for kind in ("gate", "up", "down"):
            tensor = file.tensors[f"blk.{layer['layer']}.ffn_{kind}_exps.weight"]
            size = tensor.n_bytes // hp.n_routed_experts
            for expert in np.flatnonzero(layer["counts"]).tolist():
                pages = whole_pages(tensor.offset + expert * size, tensor.offset + (expert + 1) * size)
                wanted |= {(tensor.part, page) for page in range(pages.start, pages.end, PAGE)}
    fetched = {
        (pages.part, page) for pages in short_of_memory for page in range(pages.start, pages.end, PAGE)
    }
    assert fetched == wanted
    assert len({part for part, _ in wanted}) == (2 if per_file else 1)
    with load([], model(), n_context=64) as roomy:
        assert text_of(roomy) == text


@pytest.mark.parametrize("name", OTHERS)
def test_paging_of_a_model_without_a_table(name: str, short_of_memory: list[Range], tmp_path: Path) -> None:
    """Guards: experts in an unknown form that are not read ahead; weights of unknown names that are paged."""
    path = write_other(tmp_path / "model.gguf", name)
    notes: list[str] = []
    with load(notes, path) as engine:
        assert text_of(engine)
    assert any("stay in memory" in note for note in notes)
    tensors_of = read_any_model(path)[0].tensors.values()
    experts = {each.name for each in tensors_of if role_of(each.name) is Role.ROUTED_EXPERT}
    assert bool(experts) == bool(short_of_memory)
    placement = Placement(0, 0, (), (), (), (), DeviceShare(HOST, 0, 0, 0))
    found = host_tensors(tensors_of, read_any_model(path)[1], placement)
    rest = {each.name for each in tensors_of} - experts
    always = {each.name for each in found.always}
    assert always == rest - (set() if OTHERS[name].tied else {"token_embd.weight"})


@pytest.mark.usefixtures("short_of_memory", "may_lock")
def test_engine_lets_go_of_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: pages that stay locked after the engine is closed, or after a failed load."""
    before = locked_bytes()
    with load([]):
        assert locked_bytes() > before
    assert locked_bytes() == before
    with pytest.raises(UsageError):
        load([], observers=(ObserverOptions("routing", (("no_such", 1),)),))
    assert locked_bytes() == before


def test_engine_without_reading_ahead(short_of_memory: list[Range], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a load that fails, instead of being slower, because the graph cannot be read."""

    def refuse() -> None:
        raise UsageError("no graph here")

    monkeypatch.setattr(tensors, "check_layout", refuse)
    notes: list[str] = []
    with load(notes) as engine:
        assert text_of(engine)
    assert short_of_memory == []
    assert "experts are not prefetched: no graph here" in notes


def test_long_prompts_fetch_no_more_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: prefetched experts that evict each other before they are used."""
    path = write_tiny(tmp_path / "m.gguf", MOE)
    file, hp = read_model(path)
    experts = host_tensors(file.tensors.values(), hp, placement()).experts
    kept = make_resident(path, ())
    fetched: list[Range] = []
    monkeypatch.setattr(kept.files, "fetch", fetched.append)
    watcher = prefetch.Prefetch(experts, hp.n_routed_experts, kept, 20 * PAGE)
    assert next(iter(watcher.nodes)) == b"ffn_moe_weights-1"
    watcher.fetch(experts[:3], [0, 2])
    first, second = (experts[0].offset, experts[0].offset + 2 * experts[0].n_bytes // 3)
    assert [pages.start for pages in fetched[:2]] == [first // PAGE * PAGE, second // PAGE * PAGE]
    assert sum(pages.size for pages in fetched) == 20 * PAGE
    watcher.close()
