"""Fits a model to this machine: asks what there is, lets `memory` and `placement` decide, and measures what
they could only bound. Loads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine import native
from dsmoe_local.engine.load.machine import available_memory
from dsmoe_local.engine.load.memory import (
    PROCESS,
    BufferOptions,
    MemoryPlan,
    compute_bytes,
    layer_cache_bytes,
    paging_note,
    plan_memory,
)
from dsmoe_local.engine.load.placement import HOST, Placement, Room, Weights, Wishes, place, room_of, weigh
from dsmoe_local.engine.load.probe import measure_compute
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.hyperparameters import Hyperparameters

_MOST_DEVICES = 16  # llama.cpp's own limit
_MOST_MEASUREMENTS = 4


@dataclass(frozen=True, slots=True)
class Fit:
    """How to load: `n_context` tokens of cache, the weights paged from the file or in memory, and where.
    `notes` say what a person should know of it.
    """

    n_context: int
    paged: bool
    placement: Placement
    notes: tuple[str, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices that llama.cpp may use."""
        return self.placement.devices

    @property
    def mapped(self) -> bool:
        """Whether weights on the host are pages of the file. What is computed on there beside a GPU is
        faster in memory of its own.
        """
        return self.paged or all(device != HOST for _, device in self.placement.overrides)


def fit_model(
    options: ModelOptions,
    file: GgufFile,
    hp: Hyperparameters,
    buffers: BufferOptions,
    context: native.ContextOptions,
) -> Fit:
    """Decide. `context` is what the context will be made with, but for its length. Raises UsageError,
    OutOfMemoryError, and ModelLoadError if llama.cpp cannot measure.
    """
    known = native.list_devices()
    can_offload = native.offload_devices(known)
    overrides = _overrides(options, known, can_offload)
    devices, notes = _devices(options, known, can_offload)
    available = available_memory()
    rooms = [
        room_of(device.name, device.n_free, shared=device.shares_memory, available=available)
        for device in devices
    ]
    wishes = Wishes(
        options.n_gpu_layers, options.n_cpu_moe, overrides if rooms else (), options.offload_cache
    )
    pool = available
    if options.n_gpu_layers != 0:
        pool += sum(room.n_bytes for room in rooms if not room.shared)
    plan = plan_memory(
        hp,
        buffers,
        weights=sum(tensor.n_bytes for tensor in file.tensors.values()),
        available=pool,
        requested=options.n_context,
    )
    weights = weigh(file.tensors.values(), hp, wishes.overrides)
    planner = _Planner(options, hp, buffers, weights, tuple(rooms), wishes, plan.n_context)
    placement = planner.place(replace(context, n_context=plan.n_context))
    paged, more = _paged(plan, placement, rooms, available)
    if placement.n_gpu_layers:
        notes.append(placement.describe())
    notes += [*plan.notes, *more, *_overfull(placement, rooms)]
    return Fit(plan.n_context, paged, placement, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Planner:
    """Places one model, with compute buffers as they are measured."""

    options: ModelOptions
    hp: Hyperparameters
    buffers: BufferOptions
    weights: Weights
    rooms: tuple[Room, ...]
    wishes: Wishes
    n_context: int

    def place(self, context: native.ContextOptions) -> Placement:
        """Place, measure the buffers, and place again until both agree."""
        bound = compute_bytes(self.hp, self.buffers, self.n_context)
        bounds = {room.name: bound for room in self.rooms}
        if self.wishes.n_gpu_layers is not None and self.wishes.n_cpu_moe is not None:
            return self._place(bounds)
        most: dict[str, int] = {}
        placement = self._place(most)
        for _ in range(_MOST_MEASUREMENTS):
            if not placement.n_gpu_layers:
                return placement
            measured = self._measure(placement, context)
            most |= {name: max(size, most.get(name, 0)) for name, size in measured.items()}
            again = self._place(most)
            if again == placement:
                return placement
            placement = again
        # They go round in a circle: what bounds all of them is safe.
        return self._place({name: max(bound, most.get(name, 0)) for name in bounds})

    def _place(self, compute: Mapping[str, int]) -> Placement:
        cache = layer_cache_bytes(self.hp, self.buffers, self.n_context)
        return place(self.weights, self.rooms, self.wishes, cache=cache, compute=compute)

    def _measure(self, placement: Placement, context: native.ContextOptions) -> dict[str, int]:
        return measure_compute(
            self.options.path,
            placement,
            context,
            n_experts_per_token=self.options.n_experts_per_token,
            architecture=self.hp.architecture,
        )


def _devices(
    options: ModelOptions, known: Sequence[native.Device], can_offload: Sequence[native.Device]
) -> tuple[Sequence[native.Device], list[str]]:
    """The devices to offload to. Where the build has none, what asks for them is said to have no effect."""
    if not can_offload:
        wishes = (
            ("-ngl", options.n_gpu_layers),
            ("--n-cpu-moe", options.n_cpu_moe),
            ("--tensor-override", options.tensor_overrides),
            ("--device", options.devices),
        )
        asked = [flag for flag, value in wishes if value]
        verb = "has" if len(asked) == 1 else "have"
        note = f"no GPU in this build of llama.cpp: {', '.join(asked)} {verb} no effect"
        return (), [note] if asked else []
    if options.devices is None:
        return can_offload[:_MOST_DEVICES], []
    by_name = {device.name: device for device in known if device.is_gpu}
    for name in options.devices:
        if name not in by_name:
            raise UsageError(
                f"--device {safe_line(name, 60)}: there is no such GPU",
                remedy=f"it takes none, or some of {', '.join(by_name)}",
            )
    return [by_name[name] for name in dict.fromkeys(options.devices)][:_MOST_DEVICES], []


def _overrides(
    options: ModelOptions, known: Sequence[native.Device], can_offload: Sequence[native.Device]
) -> tuple[tuple[str, str], ...]:
    """The tensor overrides, with devices' names for buffer types' names. UsageError if one cannot be."""
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
                remedy=f"there are {', '.join(types)}",
            )
    return tuple((pattern, names[types[name]]) for pattern, name in options.tensor_overrides)


def _paged(
    plan: MemoryPlan, placement: Placement, rooms: Sequence[Room], available: int
) -> tuple[bool, list[str]]:
    """Whether the weights that are left to the machine's own memory exceed it."""
    shared = {room.name for room in rooms if room.shared}
    here = [placement.host, *(share for share in placement.shares if share.name in shared)]
    n_weights, n_cache = (sum(share.weights for share in here), sum(share.cache for share in here))
    if plan.paged or n_weights + n_cache + PROCESS <= available:
        return plan.paged, []
    return True, [paging_note(n_weights, n_cache, available)]


def _overfull(placement: Placement, rooms: Sequence[Room]) -> list[str]:
    if placement.fits:
        return []
    wanted = sum(share.weights + share.cache for share in placement.shares)
    room = sum(room.n_bytes for room in rooms)
    return [f"{format_size(wanted)} are to lie on devices with room for {format_size(room)}: this may fail"]
