"""Chooses the device of each weight and of each layer's KV cache. It only computes with sizes.

The weights that every token reads are offloaded first: attention, shared experts, dense FFNs and the output.
Routed experts are offloaded last, since a token reads only a few of them. Workers get what this machine has
no room for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import count
from dsmoe_local.engine.types import ALL_LAYERS
from dsmoe_local.model.ggml import Tensor
from dsmoe_local.model.hyperparameters import ModelOutline
from dsmoe_local.model.layout import Role, is_output, layer_of, role_of

HOST = "CPU"
_MAX_RESERVED = 1 << 30  # left free on a device for its driver and for other programs
_RESERVED_SHARE = 8  # or one part in 8, if that is less


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The bytes that weights, cache and buffers may take on a device.

    `shared`: the device uses the machine's main memory. `worker` is the address of the worker that the device
    belongs to; "" for a device of this machine.
    """

    name: str
    n_bytes: int
    shared: bool = False
    worker: str = ""


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """The user's options. None: offload as much as fits. ALL_LAYERS: all layers.

    `overrides` are pairs of a regular expression of tensor names and a device; the first match counts.
    `main_memory`: if `n_gpu_layers` is None, fill that many bytes of main memory before using workers.
    """

    n_gpu_layers: int | None = None
    n_cpu_moe: int | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    offload_cache: bool = True
    main_memory: int | None = None


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """Bytes of a model's weights: for each layer its routed experts (`experts`) and the rest (`layers`).

    The last `n_unused` layers are for multi-token prediction: llama.cpp counts them, but does not load them.
    The embedding always stays on the host. If `tied`, it is also the output, and has a second copy if the
    output is offloaded. `fixed` are the bytes that overrides place on each device; no other field includes
    them.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    output: int
    embedding: int
    fixed: Mapping[str, int]
    tied: bool = False
    n_unused: int = 0

    @property
    def n_used(self) -> int:
        """Layers that are loaded and have a KV cache."""
        return len(self.layers) - self.n_unused

    @property
    def n_parts(self) -> int:
        """Layers as -ngl counts them: the output is one more."""
        return len(self.layers) + 1


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """The layers, and the bytes of weights and KV cache, on one device.

    The routed experts of `n_without_experts` of these layers are in main memory.
    """

    name: str
    n_layers: int
    weights: int
    cache: int
    has_output: bool = False
    worker: str = ""
    n_without_experts: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """The placement of a model, as llama.cpp's parameters.

    The last `n_gpu_layers` layers are on the devices, `split` of them on each, except for the tensors that
    match `overrides`. `fits` is false if the user requested more than fits.

    A device that would hold nothing is left out, since llama.cpp allocates buffers on each. If nothing is
    offloaded, all devices stay: llama.cpp computes long prompts on a GPU with weights from the host.
    """

    n_gpu_layers: int
    n_cpu_moe: int
    devices: tuple[str, ...]
    split: tuple[int, ...]
    overrides: tuple[tuple[str, str], ...]
    shares: tuple[DeviceShare, ...]
    host: DeviceShare
    fits: bool = True

    @property
    def n_separated(self) -> int:
        """Number of layers on workers whose routed experts are in this machine's memory.

        Each of them costs two round trips per token. llama.cpp then also sends the graph again for each part.
        """
        return sum(share.n_without_experts for share in self.shares if share.worker)

    def compute_text(self) -> str:
        """Return the layers of each device as text. Without sizes, since those depend on the context."""
        if not self.devices:
            return "all on the CPU"
        counts = dict(zip(self.devices, self.split, strict=False))
        parts = [f"{device}: {counts.get(device, 0)} layers" for device in self.devices]
        return ", ".join([*parts, *(f"{device}: {pattern}" for pattern, device in self.overrides)])

    def describe(self) -> str:
        """Return the layers, experts and bytes on each device as text for the user."""
        offloaded = [share for share in self.shares if share.weights or share.cache]
        experts = f"the routed experts of {count(self.n_cpu_moe, 'layer')}, " if self.n_cpu_moe else ""
        host = f"{self.host.name}: {_parts(self.host) if offloaded else ''}{experts}{_amounts(self.host)}"
        parts = (f"{_name(share)}: {_parts(share)}{_amounts(share)}" for share in offloaded)
        return "; ".join([*parts, host])


def usable_memory(name: str, n_free: int, *, shared: bool, available: int) -> DeviceMemory:
    """Return the usable memory of a device with `n_free` free bytes. `available`: bytes of main memory."""
    free = min(n_free, available) if shared else n_free
    return DeviceMemory(name, max(0, free - min(_MAX_RESERVED, free // _RESERVED_SHARE)), shared)


def weight_sizes(
    tensors: Iterable[Tensor], outline: ModelOutline, overrides: Sequence[tuple[str, str]] = ()
) -> WeightSizes:
    """Sum the loaded tensors of a file by layer and role."""
    patterns = [(re.compile(pattern), device) for pattern, device in overrides]
    layers, experts = [0] * outline.n_stored_layers, [0] * outline.n_stored_layers
    fixed: dict[str, int] = {}
    output = embedding = 0
    for tensor in tensors:
        device = next((name for pattern, name in patterns if pattern.search(tensor.name)), None)
        layer = layer_of(tensor.name)
        role = role_of(tensor.name)
        if device is not None:
            fixed[device] = fixed.get(device, 0) + tensor.n_bytes
        elif layer is not None:
            (experts if role is Role.ROUTED_EXPERT else layers)[layer] += tensor.n_bytes
        elif role is Role.EMBEDDING:
            embedding += tensor.n_bytes
            output += tensor.n_bytes if is_output(tensor.name, outline) else 0
        else:
            output += tensor.n_bytes
    return WeightSizes(
        tuple(layers), tuple(experts), output, embedding, fixed, outline.tied_embeddings, outline.n_mtp_layers
    )


def place(
    weights: WeightSizes,
    devices: Sequence[DeviceMemory],
    options: PlacementOptions,
    *,
    cache: int,
    compute: Mapping[str, int],
) -> Placement:
    """Return the best placement that fits, or the one that the user asked for even if it does not.

    `cache`: bytes of one layer's KV cache. `compute`: bytes of compute buffers by device.
    """
    if options.main_memory is not None and options.n_gpu_layers is None:
        placement = _place_here_first(weights, devices, options, cache, compute, options.main_memory)
        if placement is not None:
            return placement
    devices = [_without_fixed(device, weights) for device in devices]
    whole = options.n_cpu_moe is None and any(device.worker for device in devices)
    candidates = list(_candidates(weights, options, whole)) if devices else [(0, 0)]
    separated: Placement | None = None
    for n_gpu, n_cpu_moe in candidates:
        items = _items(weights, n_gpu, n_cpu_moe, cache if options.offload_cache else 0)
        split = _fill(items, devices, compute)
        if split is None:
            continue
        placement = _placement(weights, devices, options, n_gpu, n_cpu_moe, split, cache)
        if not (whole and placement.n_separated):
            return placement
        separated = separated or placement
    if separated is not None:
        return separated
    # The user requested more than fits. The smallest candidate is split as llama.cpp would split it.
    n_gpu, n_cpu_moe = candidates[-1]
    n_cpu_moe = 0 if whole else n_cpu_moe
    split = _proportional_split(n_gpu, devices)
    placement = _placement(weights, devices, options, n_gpu, n_cpu_moe, split, cache)
    return replace(placement, fits=False)


def unused_workers(placement: Placement, devices: Sequence[DeviceMemory]) -> list[str]:
    """Return the addresses of workers that hold nothing, although their devices were offered."""
    used = {share.worker for share in placement.shares if share.weights}
    return list(dict.fromkeys(each.worker for each in devices if each.worker and each.worker not in used))


def _without_fixed(device: DeviceMemory, weights: WeightSizes) -> DeviceMemory:
    """Return a device without the bytes that overrides place there."""
    return replace(device, n_bytes=device.n_bytes - weights.fixed.get(device.name, 0))


def _place_here_first(
    weights: WeightSizes,
    devices: Sequence[DeviceMemory],
    options: PlacementOptions,
    cache: int,
    compute: Mapping[str, int],
    main_memory: int,
) -> Placement | None:
    """Return the placement with the fewest layers on workers; None if the model does not fit.

    Workers get whole layers: each change between machines costs a trip through the network.
    """
    shared = {device.name for device in devices if device.shared}

    def fits(placement: Placement) -> bool:
        held = [placement.host, *(share for share in placement.shares if share.name in shared)]
        return placement.fits and sum(share.weights + share.cache for share in held) <= main_memory

    here = [device for device in devices if not device.worker]
    placement = place(weights, here, replace(options, main_memory=None), cache=cache, compute=compute)
    if fits(placement):
        return placement
    devices = [_without_fixed(device, weights) for device in devices]
    n_cpu_moe = options.n_cpu_moe or 0
    if n_cpu_moe == ALL_LAYERS:
        n_cpu_moe = len(weights.layers)
    for n_gpu in range(1, weights.n_parts + 1):
        items = _items(weights, n_gpu, n_cpu_moe, cache if options.offload_cache else 0)
        split = _fill(items, devices, compute)
        if split is None:
            return None
        placement = _placement(weights, devices, options, n_gpu, n_cpu_moe, split, cache)
        if fits(placement):
            return placement
    return None


def _candidates(weights: WeightSizes, options: PlacementOptions, whole: bool) -> Iterable[tuple[int, int]]:
    """Yield pairs of n_gpu_layers and n_cpu_moe, the best first.

    `whole`: layers keep their experts, unless `n_gpu_layers` of them do not fit.
    """
    n_layers, n_parts = len(weights.layers), weights.n_parts

    def resolved(requested: int, most: int) -> int:
        return most if requested == ALL_LAYERS else min(requested, most)

    if options.n_gpu_layers is None:
        gpu_layers: Sequence[int] = range(n_parts, -1, -1)
    else:
        gpu_layers = [resolved(options.n_gpu_layers, n_parts)]
    for n_gpu in gpu_layers:
        if options.n_cpu_moe is not None:
            yield n_gpu, resolved(options.n_cpu_moe, n_layers)
        elif n_gpu == gpu_layers[0] and any(weights.experts):
            # First fewer experts are offloaded, then fewer layers.
            first = n_parts - n_gpu
            yield from ((n_gpu, n_cpu_moe) for n_cpu_moe in (0, *range(first + 1, n_layers + 1)))
        else:
            yield n_gpu, n_layers if any(weights.experts) and not whole else 0


def _items(weights: WeightSizes, n_gpu: int, n_cpu_moe: int, cache: int) -> list[int]:
    """Return the bytes on the devices of each of the last `n_gpu` layers, the output at the end."""
    layers = range(weights.n_parts - n_gpu, len(weights.layers))
    items = [
        weights.layers[layer]
        + (cache if layer < weights.n_used else 0)
        + (weights.experts[layer] if layer >= n_cpu_moe else 0)
        for layer in layers
    ]
    return [*items, weights.output] if n_gpu else []


def _fill(
    items: Sequence[int], devices: Sequence[DeviceMemory], compute: Mapping[str, int]
) -> tuple[int, ...] | None:
    """Return how many items go on each device, filled one after the other; None if they do not fit."""
    counts = []
    position = 0
    for device in devices:
        left = device.n_bytes - compute.get(device.name, 0)
        start = position
        while position < len(items) and items[position] <= left:
            left -= items[position]
            position += 1
        counts.append(position - start)
    return tuple(counts) if position == len(items) else None


def _proportional_split(n_items: int, devices: Sequence[DeviceMemory]) -> tuple[int, ...]:
    """Return how many items go on each device in proportion to its memory."""
    total = sum(max(device.n_bytes, 1) for device in devices)
    counts, done, reached = [], 0, 0
    for device in devices:
        reached += max(device.n_bytes, 1)
        counts.append(n_items * reached // total - done)
        done += counts[-1]
    return tuple(counts)


def _placement(
    weights: WeightSizes,
    devices: Sequence[DeviceMemory],
    options: PlacementOptions,
    n_gpu: int,
    n_cpu_moe: int,
    split: tuple[int, ...],
    cache: int,
) -> Placement:
    first, n_layers = weights.n_parts - n_gpu, len(weights.layers)
    moved = [layer for layer in range(first, min(n_cpu_moe, n_layers)) if weights.experts[layer]]
    shares = []
    position = first
    for device, n_items in zip(devices, split, strict=True):
        layers = range(position, min(position + n_items, n_layers))
        held = weights.fixed.get(device.name, 0) + sum(weights.layers[layer] for layer in layers)
        held += sum(weights.experts[layer] for layer in layers if layer not in moved)
        has_output = position <= n_layers < position + n_items
        held += weights.output if has_output else 0
        n_used = sum(layer < weights.n_used for layer in layers)
        cached = cache * n_used if options.offload_cache else 0
        n_apart = sum(layer in moved for layer in layers)
        shares.append(DeviceShare(device.name, n_used, held, cached, has_output, device.worker, n_apart))
        position += n_items
    n_host = min(first, weights.n_used)
    held = weights.embedding + weights.fixed.get(HOST, 0)
    held += sum(weights.layers[:n_host]) + sum(weights.experts[:n_host])
    held += sum(weights.experts[layer] for layer in moved)
    if not n_gpu and not weights.tied:
        held += weights.output
    host = DeviceShare(HOST, n_host, held, cache * weights.n_used - sum(s.cache for s in shares), not n_gpu)
    overrides = (*options.overrides, *([(_experts_pattern(moved), HOST)] if moved else []))
    used = [n > 0 or share.weights > 0 for share, n in zip(shares, split, strict=True)]
    kept = [index for index in range(len(devices)) if used[index] or not any(used)]
    return Placement(
        n_gpu,
        len(moved),
        tuple(devices[index].name for index in kept),
        tuple(split[index] for index in kept),
        overrides,
        tuple(shares[index] for index in kept),
        host,
    )


def _experts_pattern(layers: Sequence[int]) -> str:
    return rf"^blk\.({'|'.join(map(str, layers))})\.ffn_(gate|up|gate_up|down)_exps\.weight$"


def _name(share: DeviceShare) -> str:
    return f"worker {share.worker} ({share.name})" if share.worker else share.name


def _parts(share: DeviceShare) -> str:
    layers = f"{count(share.n_layers, 'layer')}, " if share.n_layers else ""
    return layers + ("the output, " if share.has_output else "")


def _amounts(share: DeviceShare) -> str:
    cache = f", {format_size(share.cache)} of KV cache" if share.cache else ""
    return f"{format_size(share.weights)} of weights{cache}"
