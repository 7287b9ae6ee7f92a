"""Which layers, experts and caches go where: the arithmetic on plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from dsmoe_local.engine.types import ALL_LAYERS
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import TensorInfo
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import tensor_specs
from dsmoe_local.model.presets import PRESETS

# Layer 0 is dense; the experts of the others weigh ten times what every token reads of a layer.
MOE = WeightSizes((30, 10, 10, 10), (0, 100, 100, 100), output=20, embedding=7, fixed={})
EVERYTHING = 30 + 3 * 110 + 20 + 4  # with a cache of 1 a layer


def placed(
    room: int,
    options: PlacementOptions | None = None,
    *,
    weights: WeightSizes = MOE,
    compute: Mapping[str, int] | None = None,
) -> Placement:
    return place(
        weights, [DeviceMemory("GPU0", room)], options or PlacementOptions(), cache=1, compute=compute or {}
    )


def infos(hp: Hyperparameters) -> list[TensorInfo]:
    return [TensorInfo(spec.name, spec.shape, GgmlType.Q8_0, 0) for spec in tensor_specs(hp)]


@pytest.mark.parametrize(
    ("room", "n_gpu_layers", "n_cpu_moe"),
    [
        (EVERYTHING, 5, 0),
        (EVERYTHING - 1, 5, 1),
        (EVERYTHING - 100, 5, 1),
        (EVERYTHING - 101, 5, 2),
        (EVERYTHING - 300, 5, 3),
        (EVERYTHING - 301, 4, 3),
        (20 + 11 + 11, 3, 2),
        (20, 1, 0),
        (19, 0, 0),
    ],
)
def test_experts_give_way_before_layers(room: int, n_gpu_layers: int, n_cpu_moe: int) -> None:
    """Guards: experts on the GPU in place of weights that every token reads; wrong sums by a byte."""
    chosen = placed(room)
    assert (chosen.n_gpu_layers, chosen.n_cpu_moe) == (n_gpu_layers, n_cpu_moe)
    assert chosen.fits


def test_experts_on_the_host_are_those_of_the_first_layers() -> None:
    """Guards: patterns that match other layers' experts, or shared ones."""
    chosen = placed(EVERYTHING - 101)
    ((pattern, device),) = chosen.overrides
    assert device == HOST
    hp = PRESETS["deepseekmoe-16b"].hp
    moved = weight_sizes(infos(hp), hp, [(pattern, HOST)])
    whole = weight_sizes(infos(hp), hp)
    assert [index for index, size in enumerate(moved.experts) if size != whole.experts[index]] == [1, 2]
    assert moved.layers == whole.layers


@pytest.mark.parametrize("name", ["deepseekmoe-16b", "deepseek-v2-lite", "qwen1.5-moe-a2.7b", "glm-4.5-air"])
@pytest.mark.parametrize("n_mtp_layers", [0, 1])
def test_weights_of_a_file_are_counted_once(name: str, n_mtp_layers: int) -> None:
    """Guards: tensors that are counted on no device, or on two."""
    hp = replace(PRESETS[name].hp, n_mtp_layers=n_mtp_layers)
    total = sum(info.n_bytes for info in infos(hp))
    weights = weight_sizes(infos(hp), hp)
    for options in (
        PlacementOptions(),
        PlacementOptions(n_gpu_layers=0),
        PlacementOptions(n_gpu_layers=5),
        PlacementOptions(ALL_LAYERS, 9),
        PlacementOptions(None, None, (("attn", HOST), ("shexp", "GPU0"))),
    ):
        weights = weight_sizes(infos(hp), hp, options.overrides)
        chosen = placed(10**10, options, weights=weights)
        assert chosen.host.weights + sum(share.weights for share in chosen.shares) == total
        assert chosen.host.cache + sum(share.cache for share in chosen.shares) == hp.n_layers


def test_layers_that_are_not_loaded_are_counted() -> None:
    """Layers shifted by one: llama.cpp counts layers for multi-token prediction, the last ones, as others."""
    weights = replace(MOE, layers=(*MOE.layers, 0), experts=(*MOE.experts, 0), n_unused=1)
    chosen = placed(EVERYTHING, weights=weights)
    assert (chosen.n_gpu_layers, chosen.split, chosen.host.cache) == (6, (6,), 0)
    assert chosen.describe() == placed(EVERYTHING).describe()
    chosen = placed(20 + 11 + 11, weights=weights)
    assert (chosen.n_gpu_layers, chosen.n_cpu_moe) == (4, 2)
    assert chosen.describe() == placed(20 + 11 + 11).describe()


def test_tied_embedding_is_held_twice_when_offloaded() -> None:
    """Guards: an output that is forgotten on the device, or counted twice on the host."""
    tied = WeightSizes((10,), (0,), output=7, embedding=7, fixed={}, tied=True)
    assert placed(0, weights=tied).host.weights == 17
    chosen = placed(100, weights=tied)
    assert (chosen.host.weights, chosen.shares[0].weights) == (7, 17)


def test_what_is_asked_for_is_done() -> None:
    """Guards: -ngl and --n-cpu-moe corrected in silence, and numbers beyond the model."""
    chosen = placed(EVERYTHING, PlacementOptions(2, 0))
    assert (chosen.n_gpu_layers, chosen.n_cpu_moe, chosen.fits) == (2, 0, True)
    chosen = placed(EVERYTHING, PlacementOptions(99, 99))
    assert (chosen.n_gpu_layers, chosen.n_cpu_moe, chosen.fits) == (5, 3, True)
    chosen = placed(50, PlacementOptions(ALL_LAYERS, 0))
    assert (chosen.n_gpu_layers, chosen.n_cpu_moe, chosen.fits) == (5, 0, False)
    chosen = placed(EVERYTHING, PlacementOptions(None, ALL_LAYERS))
    assert (chosen.n_gpu_layers, chosen.n_cpu_moe) == (5, 3)
    chosen = placed(EVERYTHING, PlacementOptions(ALL_LAYERS, None))
    assert (chosen.n_gpu_layers, chosen.n_cpu_moe) == (5, 0)


def test_compute_buffers_and_overrides_take_room() -> None:
    """Guards: weights that fill a device to the last byte."""
    assert placed(EVERYTHING + 5, compute={"GPU0": 6}).n_cpu_moe == 1
    fixed = WeightSizes(MOE.layers, MOE.experts, 20, 7, {"GPU0": 6})
    assert placed(EVERYTHING + 5, weights=fixed).n_cpu_moe == 1


def test_cache_can_stay_on_the_host() -> None:
    """Guards: --no-kv-offload that changes words only."""
    chosen = placed(EVERYTHING - 4, PlacementOptions(offload_cache=False))
    assert (chosen.n_cpu_moe, chosen.host.cache, chosen.shares[0].cache) == (0, 4, 0)


@pytest.mark.parametrize(
    ("main_memory", "split", "n_cpu_moe"),
    [
        (7 + EVERYTHING, (), 0),
        (7 + EVERYTHING - 1, (1, 0), 0),  # the output
        (7 + EVERYTHING - 21, (2, 0), 0),
        (7 + EVERYTHING - 20 - 111, (2, 0), 0),
        (7 + EVERYTHING - 20 - 112, (1, 2), 0),
        (7, None, 0),
    ],
)
def test_workers_get_what_does_not_fit_here(
    main_memory: int, split: tuple[int, ...] | None, n_cpu_moe: int
) -> None:
    """Guards: layers on another machine although this one has room; experts apart from their layers."""
    workers = [DeviceMemory(f"RPC{n}", 20 + 111 + 5, worker=f"host:{n}") for n in range(2)]
    chosen = place(MOE, workers, PlacementOptions(main_memory=main_memory), cache=1, compute={})
    if split is None:
        assert not chosen.fits or chosen.host.weights > main_memory
        return
    assert (chosen.split, chosen.n_cpu_moe, chosen.fits) == (tuple(n for n in split if n), n_cpu_moe, True)
    assert chosen.host.weights + chosen.host.cache <= main_memory


def test_a_gpu_of_this_machine_comes_before_workers() -> None:
    """Guards: a GPU that stays empty because there are workers."""
    devices = [DeviceMemory("GPU0", 150), DeviceMemory("RPC0", 1000, worker="host:1")]
    chosen = place(MOE, devices, PlacementOptions(main_memory=7 + 31 + 111), cache=1, compute={})
    assert chosen.devices == ("GPU0", "RPC0")
    assert chosen.describe().startswith("GPU0: 1 layer")
    assert "worker host:1 (RPC0): 1 layer, the output" in chosen.describe()
    enough = place(MOE, devices, PlacementOptions(main_memory=7 + 400), cache=1, compute={})
    assert enough.devices == ("GPU0",)


@pytest.mark.parametrize(
    ("rooms", "n_gpu_layers", "split", "n_cpu_moe", "fits"),
    [
        ((20, 300), ALL_LAYERS, (0, 5), 1, True),  # it fits only if experts stay behind
        ((31 + 111, 400), ALL_LAYERS, (2, 3), 0, True),
        ((31 + 11, 300), ALL_LAYERS, (2, 3), 1, True),  # those of the GPU of this machine may stay behind
        ((20, 100), 3, (1, 2), 2, True),
        ((0, 41), 3, (0, 3), 0, False),
        ((0, 20 + 111), None, (0, 2), 0, True),
    ],
)
def test_layers_on_workers_keep_their_experts(
    rooms: tuple[int, int], n_gpu_layers: int | None, split: tuple[int, int], n_cpu_moe: int, fits: bool
) -> None:
    """Guards: workers that wait for this machine in every layer, with megabytes of traffic per token."""
    devices = [DeviceMemory("GPU0", rooms[0]), DeviceMemory("RPC0", rooms[1], worker="host:1")]
    chosen = place(MOE, devices, PlacementOptions(n_gpu_layers), cache=1, compute={})
    held = dict(zip(chosen.devices, chosen.split, strict=True))
    assert tuple(held.get(device.name, 0) for device in devices) == split
    assert (chosen.n_cpu_moe, chosen.fits) == (n_cpu_moe, fits)


def test_workers_without_a_layer() -> None:
    """Guards: a worker that the user names and that holds nothing, without a word."""
    workers = [DeviceMemory(f"RPC{n}", room, worker=f"host:{n}") for n, room in enumerate((20, 900, 900))]
    chosen = place(MOE, workers, PlacementOptions(ALL_LAYERS), cache=1, compute={})
    assert unused_workers(chosen, workers) == ["host:0", "host:2"]
    assert unused_workers(chosen, workers[1:2]) == []


def test_experts_stay_here_if_the_workers_have_no_room() -> None:
    """Guards: 330 bytes sent to a worker of 50, which aborts, although the experts fit into main memory."""
    worker = DeviceMemory("RPC0", 30 + 3 * 10 + 20 + 4, worker="host:1")
    chosen = place(MOE, [worker], PlacementOptions(ALL_LAYERS, main_memory=400), cache=1, compute={})
    assert (chosen.fits, chosen.split, chosen.n_separated) == (True, (5,), 3)
    assert chosen.host.weights == MOE.embedding + 300
    whole = place(MOE, [worker], PlacementOptions(main_memory=400), cache=1, compute={})
    assert (whole.fits, whole.n_separated) == (True, 0)


def test_several_devices_are_filled_in_turn() -> None:
    """Guards: a layer that is larger than what is left on the device it is given to."""
    rooms = [DeviceMemory("GPU0", 150), DeviceMemory("GPU1", 120), DeviceMemory("GPU2", 1000)]
    chosen = place(MOE, rooms, PlacementOptions(), cache=1, compute={"GPU1": 9})
    assert chosen.split == (2, 1, 2)
    assert [share.weights for share in chosen.shares] == [140, 110, 130]
    chosen = place(MOE, [DeviceMemory("GPU0", 1000), *rooms], PlacementOptions(), cache=1, compute={})
    assert (chosen.devices, chosen.split) == (("GPU0",), (5,))


@settings(max_examples=200)
@given(
    layers=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 200)), min_size=1, max_size=8),
    output=st.integers(0, 60),
    rooms=st.lists(st.integers(0, 900), max_size=3),
    cache=st.integers(0, 9),
    compute=st.integers(0, 30),
)
def test_nothing_is_overfull(
    layers: list[tuple[int, int]], output: int, rooms: list[int], cache: int, compute: int
) -> None:
    """Guards: a device with more than its memory; layers that are on no device."""
    weights = WeightSizes(tuple(a for a, _ in layers), tuple(b for _, b in layers), output, 3, {})
    names = {f"GPU{number}": DeviceMemory(f"GPU{number}", size) for number, size in enumerate(rooms)}
    chosen = place(
        weights, list(names.values()), PlacementOptions(), cache=cache, compute=dict.fromkeys(names, compute)
    )
    assert chosen.fits
    assert sum(chosen.split) == (chosen.n_gpu_layers if rooms else 0)
    for share, count in zip(chosen.shares, chosen.split, strict=True):
        assert not count or share.weights + share.cache + compute <= names[share.name].n_bytes
    held = chosen.host.weights + sum(share.weights for share in chosen.shares)
    assert held == sum(a + b for a, b in layers) + output + 3


def test_reserve() -> None:
    """Guards: no memory left for the driver; a small card that is not used at all."""
    gb = 1 << 30
    assert usable_memory("a", 24 * gb, shared=False, available=0).n_bytes == 23 * gb
    assert usable_memory("a", 2 * gb, shared=False, available=0).n_bytes == 2 * gb - gb // 4
    assert usable_memory("a", 24 * gb, shared=True, available=8 * gb).n_bytes == 7 * gb
    assert usable_memory("a", 0, shared=False, available=8 * gb).n_bytes == 0


def test_words() -> None:
    """Guards: a description that differs from the placement."""
    assert placed(19).describe() == "CPU: 387 B of weights, 4 B of KV cache"
    roomy, tight = placed(EVERYTHING).compute_text(), placed(EVERYTHING - 101).compute_text()
    assert roomy == "GPU0: 5 layers"
    assert tight.startswith("GPU0: 5 layers, CPU: ")
    assert "exps" in tight
    assert placed(EVERYTHING - 101).describe() == (
        "GPU0: 4 layers, the output, 180 B of weights, 4 B of KV cache; "
        "CPU: the routed experts of 2 layers, 207 B of weights"
    )
    assert placed(20 + 11).describe() == (
        "GPU0: 1 layer, the output, 30 B of weights, 1 B of KV cache; "
        "CPU: 3 layers, the routed experts of 1 layer, 357 B of weights, 3 B of KV cache"
    )
