"""Offloading, on devices without a GPU: llama.cpp itself says what lies where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.devices import BACKENDS, Devices, open_devices, run_cases
from support.tiny_gguf import DENSE, FILES, MOE, write_tiny

from dsmoe_local.engine.load.placement import weight_sizes
from dsmoe_local.model.cost import kv_bytes_per_token
from dsmoe_local.model.gguf_model import loaded_tensors, read_model
from dsmoe_local.model.hyperparameters import Hyperparameters

MIB = 2**20
ROUNDING = 0.02  # the log has two decimals; tensors are padded
HP = replace(MOE, n_routed_experts=16, n_experts_per_token=3, n_context=256)
CASES: dict[str, dict[str, Any]] = {
    "none": {"n_gpu_layers": 0},
    "no device": {"devices": []},
    "output": {"n_gpu_layers": 1},
    "some": {"n_gpu_layers": 4, "n_cpu_moe": 0},
    "some without experts": {"n_gpu_layers": 6, "n_cpu_moe": 6},
    "all": {"n_gpu_layers": -1, "n_cpu_moe": 0},
    "more than all": {"n_gpu_layers": 99, "n_cpu_moe": 0},
    "three without experts": {"n_gpu_layers": -1, "n_cpu_moe": 3},
    "all without experts": {"n_gpu_layers": -1, "n_cpu_moe": -1},
    "auto": {},
    "second device": {},  # by its name, which depends on the backend
    "override": {"tensor_overrides": [[r"blk\.[2-4]\.attn", "CPU"], ["output", "CPU"]]},
    "cache on the host": {"offload_cache": False},
    "parallel": {"n_parallel": 4, "unified": False},
}
N_PARTS = HP.n_layers + 1
# Layers on the devices as -ngl counts them, and the first layer that has its experts there.
ON_DEVICE = {
    "none": (0, 0),
    "no device": (0, 0),
    "output": (1, 0),
    "some": (4, 0),
    "some without experts": (6, 6),
    "all": (N_PARTS, 0),
    "more than all": (N_PARTS, 0),
    "three without experts": (N_PARTS, 3),
    "all without experts": (N_PARTS, HP.n_layers),
    "auto": (N_PARTS, 0),
    "second device": (N_PARTS, 0),
    "parallel": (N_PARTS, 0),
}


@pytest.fixture(scope="module", params=BACKENDS)
def devices(request: pytest.FixtureRequest) -> Iterator[Devices]:
    with open_devices(request.param, 2) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "moe.gguf", HP)


@pytest.fixture(scope="module")
def results(devices: Devices, model: Path) -> dict[str, dict[str, Any]]:
    cases = [{"model": str(model), "options": options} for options in CASES.values()]
    cases[list(CASES).index("second device")]["options"] = {"devices": [devices.name(1)]}
    return dict(zip(CASES, run_cases(devices, cases), strict=True))


def offloaded(buffers: dict[str, dict[str, float]], kind: str) -> float:
    return sum(size for name, size in buffers[kind].items() if is_device(name))


def is_device(name: str) -> bool:
    """False for the CPU, and for main memory of a device, such as Vulkan_Host."""
    return name[-1].isdigit()


def expected(model: Path, n_gpu_layers: int, n_cpu_moe: int) -> float:
    """MiB of weights that these settings put on devices."""
    file, hp = read_model(model)
    weights = weight_sizes(file.tensors.values(), hp)
    first = N_PARTS - n_gpu_layers
    on_device = sum(weights.layers[first:]) + sum(weights.experts[max(first, n_cpu_moe) :])
    return (on_device + (weights.output if n_gpu_layers else 0)) / MIB


@pytest.mark.parametrize("name", ON_DEVICE)
def test_weights_and_cache_lie_where_they_should(
    name: str, results: dict[str, dict[str, Any]], model: Path
) -> None:
    """Guards: experts or layers on the wrong side; a KV cache that stays behind."""
    found = results[name]
    n_gpu_layers, n_cpu_moe = ON_DEVICE[name]
    assert offloaded(found["buffers"], "model") == pytest.approx(
        expected(model, n_gpu_layers, n_cpu_moe), abs=ROUNDING
    )
    n_layers = min(n_gpu_layers, HP.n_layers + 1) - (1 if n_gpu_layers else 0)
    cache = sum(found["buffers"]["KV"].values())
    assert offloaded(found["buffers"], "KV") == pytest.approx(cache * n_layers / HP.n_layers, abs=ROUNDING)


@pytest.mark.parametrize("name", FILES)
def test_every_architecture_is_placed(name: str, devices: Devices, tmp_path: Path) -> None:
    """Tensors of an architecture that are counted for the wrong layer or device."""
    hp = replace(FILES[name], n_context=256)
    path = write_tiny(tmp_path / "tiny.gguf", hp)
    file, hp = read_model(path)
    weights = weight_sizes(loaded_tensors(file, hp), hp)
    wanted = {(0, 0): "host", (2 + hp.n_mtp_layers, 0): "one layer", (-1, 2): "all but experts"}
    cases = [{"model": str(path), "options": {"n_gpu_layers": n, "n_cpu_moe": moe}} for n, moe in wanted]
    for found, (n_gpu, n_cpu_moe) in zip(run_cases(devices, cases), wanted, strict=True):
        first = weights.n_parts - (n_gpu if n_gpu >= 0 else weights.n_parts)
        on_device = sum(weights.layers[first:]) + sum(weights.experts[max(first, n_cpu_moe) :])
        on_device += weights.output if n_gpu else 0
        assert offloaded(found["buffers"], "model") == pytest.approx(on_device / MIB, abs=ROUNDING)
        cached = kv_bytes_per_token(hp) / hp.n_layers * max(0, hp.n_layers - first) * 256
        assert offloaded(found["buffers"], "KV") == pytest.approx(cached / MIB, abs=ROUNDING)


def test_the_text_is_the_same_wherever_weights_lie(results: dict[str, dict[str, Any]]) -> None:
    """Guards: tensors that are read as another device lays them out."""
    texts = {name: found["token_ids"] for name, found in results.items()}
    assert len(texts["none"]) == 8
    assert all(text == texts["none"] for text in texts.values()), texts


def test_the_bar_fills_however_weights_are_read(results: dict[str, dict[str, Any]], model: Path) -> None:
    """Guards: a bar that stops when weights are copied, not mapped."""
    for found in results.values():
        assert found["progress"] == {"done": model.stat().st_size, "total": model.stat().st_size}


def test_devices_are_those_asked_for(devices: Devices, results: dict[str, dict[str, Any]]) -> None:
    """Guards: --device that is not obeyed; buffers on a device without weights."""
    for name, device in (("second device", devices.name(1)), ("all", devices.name(0))):
        buffers = results[name]["buffers"]
        assert {key for kind in buffers.values() for key in kind if is_device(key)} == {device}
    for kind in results["no device"]["buffers"].values():
        assert set(kind) == {"CPU"}


def test_overrides_and_cache_on_the_host(results: dict[str, dict[str, Any]], model: Path) -> None:
    """Guards: --tensor-override and --no-kv-offload without effect."""
    file, _ = read_model(model)
    names = [f"blk.{layer}.attn_" for layer in (2, 3, 4)] + ["output"]
    kept = sum(info.n_bytes for info in file.tensors.values() if info.name.startswith(tuple(names)))
    kept += sum(
        info.n_bytes
        for info in file.tensors.values()
        if "attn_output" in info.name and info.name[4] not in "234"
    )
    on_device = offloaded(results["override"]["buffers"], "model")
    assert on_device == pytest.approx(expected(model, N_PARTS, 0) - kept / MIB, abs=ROUNDING)
    assert offloaded(results["cache on the host"]["buffers"], "KV") == 0


def test_where_things_lie_is_told(devices: Devices, results: dict[str, dict[str, Any]]) -> None:
    """Guards: an offload without a note; a note although nothing is offloaded."""
    for name, found in results.items():
        told = [note for note in found["notes"] if devices.backend in note]
        assert told == ([found["placement"]] if ON_DEVICE.get(name, (1, 0))[0] else [])
    assert "routed experts of 2 layers" in results["three without experts"]["placement"]


@pytest.mark.parametrize("hp", [HP, DENSE], ids=["moe", "dense"])
def test_auto_fits_what_llama_cpp_allocates(hp: Hyperparameters, devices: Devices, tmp_path: Path) -> None:
    """Guards: buffers that the arithmetic forgot; a device that is left half empty."""
    path = write_tiny(tmp_path / "m.gguf", hp)
    rooms = [share * MIB for share in (1, 3, 6, 9, 14, 40)]
    cases: list[dict[str, Any]] = [
        {"model": str(path), "free": list(free)}
        for free in [*((room, 0) for room in rooms), (3 * MIB, 6 * MIB)]
    ]
    results = run_cases(devices, cases)
    used = []
    for case, found in zip(cases, results, strict=True):
        for index, free in enumerate(case["free"]):
            held = sum(kind.get(devices.name(index), 0) for kind in found["buffers"].values())
            assert held * MIB <= free - free // 8 + ROUNDING * MIB
        used.append(offloaded(found["buffers"], "model"))
        assert found["token_ids"] == results[0]["token_ids"]
    assert used[:6] == sorted(used[:6])
    assert used[0] < used[2] < used[5]
    largest = max(weight_sizes(read_model(path)[0].tensors.values(), hp).layers) / MIB
    assert used[5] == pytest.approx(sum(results[0]["buffers"]["model"].values()), abs=largest + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": ["GPU7"]}, "there is no such GPU\nit takes none, or some of {}0, {}1"),
        ({"tensor_overrides": [["attn", "CUDA0"]]}, "there is no buffer CUDA0"),
        ({"tensor_overrides": [["(", "CPU"]]}, "not a regular expression"),
        ({"n_gpu_layers": -2}, "-ngl -2"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str, devices: Devices, model: Path) -> None:
    """Guards: a typing error that is treated as the default."""
    (found,) = run_cases(devices, [{"model": str(model), "options": options}])
    assert found["error"] == "UsageError"
    assert message.replace("{}", devices.backend) in found["message"]


def test_more_than_fits_is_said(devices: Devices, model: Path) -> None:
    """Guards: a crash without a note beforehand."""
    case = {"model": str(model), "free": [MIB, 0], "options": {"n_gpu_layers": -1, "n_cpu_moe": 0}}
    (found,) = run_cases(devices, [case])
    assert any("loading may fail" in note for note in found["notes"])
