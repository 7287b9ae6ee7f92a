"""Fits a model to this machine: chooses the context length and the placement. Loads no weights.

The available memory and the size of a context are measured here; `memory` and `placement` decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.engine import native
from dsmoe_local.engine.errors import OutOfMemoryError
from dsmoe_local.engine.load.machine import available_memory
from dsmoe_local.engine.load.memory import (
    PROCESS_BYTES,
    ContextRequest,
    MemoryPlan,
    paging_note,
    plan_memory,
)
from dsmoe_local.engine.load.placement import (
    HOST,
    DeviceMemory,
    Placement,
    PlacementOptions,
    WeightSizes,
    place,
    unused_workers,
    usable_memory,
    weight_sizes,
)
from dsmoe_local.engine.load.probe import BufferSizes, Probe, measure_context, sizes_by_context
from dsmoe_local.engine.types import CHAT_RATIO, ModelOptions
from dsmoe_local.engine.workers import Worker, check_workers, parse_workers
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.gguf_model import loaded_tensors
from dsmoe_local.model.hyperparameters import ModelOutline

_MAX_DEVICES = 16  # llama.cpp's own limit
_MAX_MEASUREMENTS = 8
_SCORES_SHARE = 16
"""With plain attention, buffers may take one part in this of the available memory."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How to load a model, with `n_context` tokens of KV cache.

    If `paged`, the weights exceed the memory and are paged from the file. `n_buffer_bytes` is the size of the
    cache and the compute buffers. `flash_attention` is a key of `native.FLASH_ATTENTION`. `notes` are for the
    user.
    """

    n_context: int
    flash_attention: str
    paged: bool
    placement: Placement
    n_buffer_bytes: int
    notes: tuple[str, ...]

    @property
    def mapped(self) -> bool:
        """True if the weights in main memory are mapped from the file.

        If experts stay in main memory beside a GPU, llama.cpp is faster without mapping.
        """
        return self.paged or all(device != HOST for _, device in self.placement.overrides)


def connect_workers(texts: Sequence[str]) -> dict[str, Worker]:
    """Make the devices of workers known to llama.cpp. Return the workers by endpoint.

    Raises UsageError for a wrong address, WorkerError for a worker that cannot be used.
    """
    workers = parse_workers(texts)
    if workers:
        native.check_rpc()
        check_workers(list(workers.values()))
    for endpoint in workers:
        native.add_worker(endpoint)
    return workers


def fit_model(
    options: ModelOptions,
    file: GgufFile,
    outline: ModelOutline,
    request: ContextRequest,
    context_of: Callable[[str, int], native.ContextOptions],
) -> Fit:
    """Choose the context length, the mode of flash attention and the placement.

    `context_of` returns the options for a mode and a context length.

    Raises UsageError, OutOfMemoryError, and ModelLoadError if llama.cpp refuses the model.
    """
    workers = connect_workers(options.workers)
    known = native.list_devices()
    can_offload = native.offload_devices(known)
    overrides = _overrides(options, known, can_offload)
    found, notes = _devices(options, known, can_offload)
    available = available_memory()
    devices = [_memory(device, workers, available) for device in found]
    total = available
    if options.n_gpu_layers != 0:
        total += sum(device.n_bytes for device in devices if not device.shared)
    tensors = loaded_tensors(file, outline)
    n_weights = sum(tensor.n_bytes for tensor in tensors)
    with Probe(file, outline) as probe:
        model = probe.open()
        try:
            plans = partial(_plan, model, request, context_of, weights=n_weights, available=total)
            offloads = bool(devices) and options.n_gpu_layers != 0
            most = None if offloads else available // _SCORES_SHARE
            flash_attention, plan, buffers = _plan_attention(options, plans, most)
        finally:
            model.close()
        weights = weight_sizes(tensors, outline, overrides if devices else ())
        asked = PlacementOptions(
            options.n_gpu_layers,
            options.n_cpu_moe,
            overrides if devices else (),
            options.offload_cache,
            available - PROCESS_BYTES - buffers.compute[HOST] if workers else None,
        )
        context = context_of(flash_attention, plan.n_context)
        placement = _place(probe, context, weights, devices, asked, buffers.cache // outline.n_layers)
    paged, more = _paged(plan, placement, devices, available)
    if placement.n_gpu_layers:
        notes.append(placement.describe())
    if placement.n_separated and options.n_cpu_moe is None:
        notes.append(_separation(placement.n_separated))
    unused = unused_workers(placement, devices)
    if workers and options.n_gpu_layers is None and len(unused) == len(workers):
        notes.append("the workers are not used: the model fits here. -ngl all places all layers on them")
    else:
        notes += [
            f"the worker {each} is not used: it has no room for a layer, or none is left" for each in unused
        ]
    notes += [*plan.notes, *more, *_overcommitment(placement, devices)]
    return Fit(plan.n_context, flash_attention, paged, placement, buffers.total, tuple(notes))


def _memory(device: native.Device, workers: Mapping[str, Worker], available: int) -> DeviceMemory:
    """Return the memory that may be used on a device. A worker's size, if the user gives one, counts."""
    worker = workers.get(device.description) if device.is_remote else None
    if worker is None:
        return usable_memory(device.name, device.n_free, shared=device.shares_memory, available=available)
    if worker.n_bytes is not None:
        return DeviceMemory(device.name, worker.n_bytes, worker=worker.endpoint)
    usable = usable_memory(device.name, device.n_free, shared=False, available=available)
    return replace(usable, worker=worker.endpoint)


def _plan(
    model: native.Model,
    request: ContextRequest,
    context_of: Callable[[str, int], native.ContextOptions],
    flash_attention: str,
    *,
    weights: int,
    available: int,
) -> tuple[MemoryPlan, BufferSizes]:
    """Return the plan for a mode of flash attention, and its buffers. Raises OutOfMemoryError."""
    sizes = sizes_by_context(model, partial(context_of, flash_attention))
    plan = plan_memory(request, lambda n: sizes(n).total, weights=weights, available=available)
    return plan, sizes(plan.n_context)


def _plan_attention(
    options: ModelOptions, plans: Callable[[str], tuple[MemoryPlan, BufferSizes]], most: int | None
) -> tuple[str, MemoryPlan, BufferSizes]:
    """Return the mode of flash attention with its plan and buffers. Raises OutOfMemoryError.

    On CPUs, plain attention is faster for decoding one sequence, above all after a long context, but not for
    prompts (benchmarks/settings.py). For several sequences, flash attention skips the cells of other
    sequences. Plain attention also needs memory for the scores of all cells: its compute buffers may have
    `most` bytes. None: a GPU computes.
    """
    is_free = options.flash_attention == "auto" and options.cache_type_v in native.FLOAT_CACHE_TYPES
    decodes = options.n_parallel == 1 and options.prompt_ratio <= CHAT_RATIO
    if is_free and most is not None and decodes:
        with suppress(OutOfMemoryError):  # flash attention needs less
            plan, buffers = plans("off")
            if not plan.notes and buffers.compute[HOST] <= most:
                return "off", plan, buffers
    return options.flash_attention, *plans(options.flash_attention)


def _place(
    probe: Probe,
    context: native.ContextOptions,
    weights: WeightSizes,
    devices: Sequence[DeviceMemory],
    options: PlacementOptions,
    cache: int,
) -> Placement:
    """Place the model and measure its compute buffers in turn, until the placement does not change.

    Buffers depend on the placement: a device that computes with weights in main memory needs room for copies.
    """
    largest: dict[str, int] = {}
    placement = place(weights, devices, options, cache=cache, compute=largest)
    for _ in range(_MAX_MEASUREMENTS):
        if not placement.devices:
            break
        model = probe.open(placement)
        try:
            measured = measure_context(model, context, placement.devices).compute
        finally:
            model.close()
        if placement.n_gpu_layers:
            # Keep the largest sizes so far, so that two placements cannot alternate.
            largest |= {name: max(size, largest.get(name, 0)) for name, size in measured.items()}
            found = place(weights, devices, options, cache=cache, compute=largest)
        else:
            found = _without_full(placement, devices, measured)
        if found == placement:
            break
        placement = found
    return placement


def _without_full(
    placement: Placement, devices: Sequence[DeviceMemory], compute: Mapping[str, int]
) -> Placement:
    """Drop devices without weights that have no room for `compute`, their buffers for long prompts."""
    room = {device.name: device.n_bytes for device in devices}
    kept = [
        index
        for index, share in enumerate(placement.shares)
        if share.weights or compute[share.name] <= room[share.name]
    ]
    return replace(
        placement,
        devices=tuple(placement.devices[index] for index in kept),
        split=tuple(placement.split[index] for index in kept),
        shares=tuple(placement.shares[index] for index in kept),
    )


def _devices(
    options: ModelOptions, known: Sequence[native.Device], can_offload: Sequence[native.Device]
) -> tuple[Sequence[native.Device], list[str]]:
    """Return the devices to offload to. If the build has no GPU, also a note about options without effect."""
    if not can_offload:
        flags = (
            ("-ngl", options.n_gpu_layers),
            ("--n-cpu-moe", options.n_cpu_moe),
            ("--tensor-override", options.tensor_overrides),
            ("--device", options.devices),
        )
        asked = [flag for flag, value in flags if value]
        verb = "has" if len(asked) == 1 else "have"
        note = f"no GPU in this build of llama.cpp: {', '.join(asked)} {verb} no effect"
        return (), [note] if asked else []
    if options.devices is None:
        if options.workers:
            # Devices are filled in this order: those of this machine first.
            can_offload = sorted(can_offload, key=lambda device: device.is_remote)
        return can_offload[:_MAX_DEVICES], []
    by_name = {device.name: device for device in known if device.is_gpu}
    for name in options.devices:
        if name not in by_name:
            raise UsageError(
                f"--device {safe_line(name, 60)}: there is no such GPU",
                remedy=f"it takes none, or some of {', '.join(by_name)}",
            )
    return [by_name[name] for name in dict.fromkeys(options.devices)][:_MAX_DEVICES], []


def _overrides(
    options: ModelOptions, known: Sequence[native.Device], can_offload: Sequence[native.Device]
) -> tuple[tuple[str, str], ...]:
    """Return the tensor overrides with the names of devices in place of buffer types. Raises UsageError."""
    for pattern, _ in options.tensor_overrides:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(
                f"--tensor-override {safe_line(pattern, 60)}: not a regular expression", where=str(error)
            ) from error
    if not can_offload:
        return ()
    types = native.buffer_types()
    names = {types[device.name]: device.name for device in known if device.name in types}
    for _, name in options.tensor_overrides:
        if name not in types:
            raise UsageError(
                f"--tensor-override: there is no buffer {safe_line(name, 60)}",
                remedy=f"use one of: {', '.join(types)}",
            )
    return tuple((pattern, names[types[name]]) for pattern, name in options.tensor_overrides)


def _paged(
    plan: MemoryPlan, placement: Placement, devices: Sequence[DeviceMemory], available: int
) -> tuple[bool, list[str]]:
    """Return whether to page the weights: those in main memory exceed it. Add a note if `plan` has none."""
    shared = {device.name for device in devices if device.shared}
    in_main = [placement.host, *(share for share in placement.shares if share.name in shared)]
    n_weights, n_cache = sum(share.weights for share in in_main), sum(share.cache for share in in_main)
    if plan.paged or n_weights + n_cache + PROCESS_BYTES <= available:
        return plan.paged, []
    return True, [paging_note(n_weights, n_cache, available)]


def _separation(n_layers: int) -> str:
    return (
        f"the workers have no room for the routed experts of {count(n_layers, 'layer')}, which stay here: "
        "each of these costs two round trips per token. Without -ngl, or with fewer layers, all stay whole; "
        "--n-cpu-moe N chooses which do not"
    )


def _overcommitment(placement: Placement, devices: Sequence[DeviceMemory]) -> list[str]:
    if placement.fits:
        return []
    needed = sum(share.weights + share.cache for share in placement.shares)
    free = sum(device.n_bytes for device in devices)
    sizes = f"the devices need {format_size(needed)} but have {format_size(free)}"
    return [f"{sizes}: loading may fail, so offload less (-ngl, --n-cpu-moe)"]
