"""Decides which device each weight and each layer's KV cache lies on. Pure arithmetic on sizes: devices are
listed, and buffers measured, elsewhere.

What every token reads goes to the devices first: attention, shared experts, dense FFNs and the output.
Routed experts come last, since a token reads a few of them only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine.types import ALL_LAYERS
from dsmoe_local.model.gguf_file import TensorInfo
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, layer_of, role_of

HOST = "CPU"
_MOST_RESERVED = 1 << 30  # a driver's own buffers, and what other programs may want meanwhile
_RESERVED_SHARE = 8


@dataclass(frozen=True, slots=True)
class Room:
    """A device with the bytes that weights, cache and buffers may take there.

    `shared`: they are taken from the machine's memory.
    """

    name: str
    n_bytes: int
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a person asked for: None is what fits, ALL_LAYERS all. Overrides are pairs of a regular expression
    of tensor names and a device, the first that matches counts.
    """

    n_gpu_layers: int | None = None
    n_cpu_moe: int | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    offload_cache: bool = True


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of one model: of each layer what every token reads and the routed experts, the output, and the
    embedding, which always lies on the host (`tied`: and is the output too, once more if that is offloaded).
    `fixed`: what overrides put on each device.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    output: int
    embedding: int
    fixed: Mapping[str, int]
    tied: bool = False

    @property
    def n_parts(self) -> int:
        """Layers as -ngl counts them: the output is the last."""
        return len(self.layers) + 1


@dataclass(frozen=True, slots=True)
class Share:
    """What lies on one device."""

    name: str
    n_layers: int
    weights: int
    cache: int
    has_output: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """A decision, as llama.cpp takes it: the last `n_gpu_layers` layers on the devices, `split` of them on
    each, except the tensors of `overrides`. `fits` is False where a person insists on too much.

    A device that would hold nothing is left out, since each takes buffers; but where nothing at all is
    offloaded they stay, for the long prompts that a GPU computes on weights of the host.
    """

    n_gpu_layers: int
    n_cpu_moe: int
    devices: tuple[str, ...]
    split: tuple[int, ...]
    overrides: tuple[tuple[str, str], ...]
    shares: tuple[Share, ...]
    host: Share
    fits: bool = True

    @property
    def host_bytes(self) -> int:
        """Weights and cache on the host."""
        return self.host.weights + self.host.cache

    def computing(self) -> str:
        """In words: which device computes what. Sizes are not in it: they follow the context."""
        if not self.devices:
            return "all on the CPU"
        counts = dict(zip(self.devices, self.split, strict=False))
        parts = [f"{device}: {counts.get(device, 0)} layers" for device in self.devices]
        return ", ".join([*parts, *(f"{device}: {pattern}" for pattern, device in self.overrides)])

    def describe(self) -> str:
        """In words: what lies where."""
        offloaded = [share for share in self.shares if share.weights or share.cache]
        experts = f"the routed experts of {_layers(self.n_cpu_moe)}" if self.n_cpu_moe else ""
        host = f"{self.host.name}: {_parts(self.host) if offloaded else ''}{experts}{_amounts(self.host)}"
        return "; ".join([*(f"{share.name}: {_parts(share)}{_amounts(share)}" for share in offloaded), host])


def room_of(name: str, n_free: int, *, shared: bool, available: int) -> Room:
    """The room on a device of which `n_free` bytes are free; the machine has `available` bytes of memory."""
    free = min(n_free, available) if shared else n_free
    return Room(name, max(0, free - min(_MOST_RESERVED, free // _RESERVED_SHARE)), shared)


def weigh(
    tensors: Iterable[TensorInfo], hp: Hyperparameters, overrides: Sequence[tuple[str, str]] = ()
) -> Weights:
    """Sum the tensors of a file by where they can go."""
    patterns = [(re.compile(pattern), device) for pattern, device in overrides]
    layers, experts = [0] * hp.n_layers, [0] * hp.n_layers
    fixed: dict[str, int] = {}
    output = embedding = 0
    for tensor in tensors:
        device = next((name for pattern, name in patterns if pattern.search(tensor.name)), None)
        layer = layer_of(tensor.name)
        role = role_of(tensor.name)
        if device is not None:
            fixed[device] = fixed.get(device, 0) + tensor.n_bytes
        elif layer is not None and layer < hp.n_layers:
            (experts if role is Role.ROUTED_EXPERT else layers)[layer] += tensor.n_bytes
        elif role is Role.EMBEDDING:
            embedding += tensor.n_bytes
            output += tensor.n_bytes if hp.tied_embeddings else 0
        else:
            output += tensor.n_bytes
    return Weights(tuple(layers), tuple(experts), output, embedding, fixed, hp.tied_embeddings)


def place(
    weights: Weights, rooms: Sequence[Room], wishes: Wishes, *, cache: int, compute: Mapping[str, int]
) -> Placement:
    """The best placement that fits, or what a person insists on. `cache` are the bytes of a layer's KV cache,
    `compute` those of each device's compute buffers.
    """
    # Overrides come out of the rooms first.
    rooms = [Room(room.name, room.n_bytes - weights.fixed.get(room.name, 0), room.shared) for room in rooms]
    candidates = list(_candidates(weights, wishes)) if rooms else [(0, 0)]
    for n_gpu, n_cpu_moe in candidates:
        items = _items(weights, n_gpu, n_cpu_moe, cache if wishes.offload_cache else 0)
        split = _fill(items, rooms, compute)
        if split is not None:
            return _placement(weights, rooms, wishes, n_gpu, n_cpu_moe, split, cache)
    # Only what a person insists on gets here: the least of what was asked for, spread as llama.cpp would.
    n_gpu, n_cpu_moe = candidates[-1]
    split = _spread(n_gpu, rooms)
    return _placement(weights, rooms, wishes, n_gpu, n_cpu_moe, split, cache, fits=False)


def _candidates(weights: Weights, wishes: Wishes) -> Iterable[tuple[int, int]]:
    """Pairs of -ngl and --n-cpu-moe, the best first."""
    n_layers, n_parts = len(weights.layers), weights.n_parts

    def count(wish: int, most: int) -> int:
        return most if wish == ALL_LAYERS else min(wish, most)

    if wishes.n_gpu_layers is None:
        gpu_layers: Sequence[int] = range(n_parts, -1, -1)
    else:
        gpu_layers = [count(wishes.n_gpu_layers, n_parts)]
    for n_gpu in gpu_layers:
        if wishes.n_cpu_moe is not None:
            yield n_gpu, count(wishes.n_cpu_moe, n_layers)
        elif n_gpu == gpu_layers[0] and any(weights.experts):
            # Fewer experts on the devices before fewer layers.
            first = n_parts - n_gpu
            yield from ((n_gpu, n_cpu_moe) for n_cpu_moe in (0, *range(first + 1, n_layers + 1)))
        else:
            yield n_gpu, n_layers if any(weights.experts) else 0


def _items(weights: Weights, n_gpu: int, n_cpu_moe: int, cache: int) -> list[int]:
    """Bytes on the devices of each of the last `n_gpu` layers, the output at the end."""
    layers = range(weights.n_parts - n_gpu, len(weights.layers))
    items = [
        weights.layers[layer] + cache + (weights.experts[layer] if layer >= n_cpu_moe else 0)
        for layer in layers
    ]
    return [*items, weights.output] if n_gpu else []


def _fill(items: Sequence[int], rooms: Sequence[Room], compute: Mapping[str, int]) -> tuple[int, ...] | None:
    """How many items go on each device, filled one after the other; None if they do not fit."""
    counts = []
    position = 0
    for room in rooms:
        left = room.n_bytes - compute.get(room.name, 0)
        start = position
        while position < len(items) and items[position] <= left:
            left -= items[position]
            position += 1
        counts.append(position - start)
    return tuple(counts) if position == len(items) else None


def _spread(n_items: int, rooms: Sequence[Room]) -> tuple[int, ...]:
    """How many items go on each device in proportion to their room."""
    total = sum(max(room.n_bytes, 1) for room in rooms)
    counts, done, reached = [], 0, 0
    for room in rooms:
        reached += max(room.n_bytes, 1)
        counts.append(n_items * reached // total - done)
        done += counts[-1]
    return tuple(counts)


def _placement(
    weights: Weights,
    rooms: Sequence[Room],
    wishes: Wishes,
    n_gpu: int,
    n_cpu_moe: int,
    split: tuple[int, ...],
    cache: int,
    *,
    fits: bool = True,
) -> Placement:
    first, n_layers = weights.n_parts - n_gpu, len(weights.layers)
    moved = [layer for layer in range(first, min(n_cpu_moe, n_layers)) if weights.experts[layer]]
    shares = []
    position = first
    for room, count in zip(rooms, split, strict=True):
        layers = range(position, min(position + count, n_layers))
        held = weights.fixed.get(room.name, 0) + sum(weights.layers[layer] for layer in layers)
        held += sum(weights.experts[layer] for layer in layers if layer not in moved)
        has_output = position <= n_layers < position + count
        held += weights.output if has_output else 0
        cached = cache * len(layers) if wishes.offload_cache else 0
        shares.append(Share(room.name, len(layers), held, cached, has_output))
        position += count
    below = min(first, n_layers)
    held = weights.embedding + weights.fixed.get(HOST, 0)
    held += sum(weights.layers[:below]) + sum(weights.experts[:below])
    held += sum(weights.experts[layer] for layer in moved)
    if not n_gpu and not weights.tied:
        held += weights.output
    host = Share(HOST, below, held, cache * n_layers - sum(share.cache for share in shares), not n_gpu)
    overrides = (*wishes.overrides, *([(_experts_pattern(moved), HOST)] if moved else []))
    used = [share.n_layers > 0 or share.weights > 0 for share in shares]
    kept = [index for index, room in enumerate(rooms) if used[index] or not any(used)]
    return Placement(
        n_gpu,
        len(moved),
        tuple(rooms[index].name for index in kept),
        tuple(split[index] for index in kept),
        overrides,
        tuple(shares[index] for index in kept),
        host,
        fits,
    )


def _experts_pattern(layers: Sequence[int]) -> str:
    return rf"^blk\.({'|'.join(map(str, layers))})\.ffn_(gate|up|down)_exps\.weight$"


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}, "


def _parts(share: Share) -> str:
    return (_layers(share.n_layers) if share.n_layers else "") + ("the output, " if share.has_output else "")


def _amounts(share: Share) -> str:
    cache = f", {format_size(share.cache)} of KV cache" if share.cache else ""
    return f"{format_size(share.weights)} of weights{cache}"
