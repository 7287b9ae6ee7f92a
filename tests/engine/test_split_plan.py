"""Plans of models on several machines: sums that must be those of the model, and the arithmetic of speeds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import family_model, smollm2, tiny_model
from support.workers import counted, workers

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.errors import OutOfMemoryError
from dsmoe_local.engine.load.memory import PROCESS_BYTES
from dsmoe_local.engine.load.network import Network, bytes_per_token, parse_network
from dsmoe_local.engine.load.split_plan import Machine, SplitPlan, header_of, plan_split
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Request, SamplingParameters
from dsmoe_local.model.cost import bytes_per_token as bytes_read
from dsmoe_local.model.cost import kv_bytes_per_token
from dsmoe_local.model.ggml import GgmlType, Tensor
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.layout import unquantized
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.plan import plan_types
from dsmoe_quantize.policy.types import resolve

GB = 10**9
NETWORK = Network(100e6, (1e-3, 3e-3))
NAMES = ("deepseekmoe-16b", "deepseekmoe-145b", "deepseek-v3", "qwen3-235b-a22b", "olmoe-1b-7b", "llama2-7b")


def tensors_of(name: str, word: str) -> list[Tensor]:
    hp = PRESETS[name].hp
    return list(plan_types(unquantized(hp, GgmlType.BF16), hp, resolve(word)).choices)


def plan(name: str, *sizes: float, n_context: int = 1024, word: str = "BF16") -> SplitPlan:
    hp = PRESETS[name].hp
    machines = [Machine(int(size), (25e9, 50e9)) for size in sizes]
    return plan_split(header_of(hp, tensors_of(name, word)), hp, machines, NETWORK, n_context)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_machines", [1, 2, 4])
def test_nothing_is_lost_or_counted_twice(name: str, n_machines: int) -> None:
    """Guards: tensors on no machine or on two; reads of a layer on the wrong machine."""
    hp, tensors = PRESETS[name].hp, tensors_of(name, "BF16")
    total = sum(tensor.n_bytes for tensor in tensors)
    size = total // n_machines + total // hp.n_layers + 4 * GB
    found = plan(name, *[size] * n_machines)
    cache = kv_bytes_per_token(hp) * 1024
    assert [share.machine.n_bytes for share in found.shares] == [size] * n_machines
    assert sum(share.weights for share in found.shares) == total
    assert sum(share.cache for share in found.shares) == pytest.approx(cache, rel=1e-3)
    assert sum(share.n_layers for share in found.shares) == hp.n_layers
    assert sum(share.read for share in found.shares) == pytest.approx(bytes_read(hp, tensors), rel=1e-9)
    assert all(share.n_bytes <= size for share in found.shares)
    *before, last = (share for share in found.shares if share.n_bytes)
    assert last.has_output
    assert not any(share.has_output for share in before)
    # A machine's reads are in proportion to its layers: none is charged for those of another one.
    for share in found.shares:
        assert share.read < 1.5 * bytes_read(hp, tensors) * share.n_layers / hp.n_layers + GB


@pytest.mark.parametrize(
    ("name", "word", "published"),
    [
        # huggingface.co/bartowski/deepseek-ai_DeepSeek-V3-0324-GGUF, in GB
        ("deepseek-v3", "Q8_0", 713.29),
        ("deepseek-v3", "Q6_K", 550.80),
        ("deepseek-v3", "Q4_1", 419.94),
        ("deepseek-v3", "Q4_K_M", 404.43),
        # arXiv 2401.06066, table 5, and arXiv 2505.09388: parameters at 16 bits
        ("deepseekmoe-145b", "BF16", 2 * 144.6),
        ("qwen3-235b-a22b", "BF16", 2 * 235),
    ],
)
def test_published_sizes(name: str, word: str, published: float) -> None:
    """Guards: types or shapes of models that nobody here has as a file."""
    found = plan(name, 2000 * GB, word=word)
    assert found.shares[0].weights == pytest.approx(published * GB, rel=0.003)


def test_the_speed() -> None:
    """Guards: a network that is forgotten, or counted for a model that fits here; the ends exchanged."""
    found = plan("deepseekmoe-16b", 60 * GB, 8 * GB)
    here, unused = found.shares
    assert (unused.n_bytes, unused.n_layers, found.n_workers, found.network_bytes) == (0, 0, 0, 0)
    read = here.read + here.cache / 2
    assert found.tokens_per_second(0.5) == pytest.approx((25e9 / read, 50e9 / read))
    found = plan("deepseekmoe-16b", 14 * GB, 14 * GB, 14 * GB)
    sending = found.network_bytes / 100e6
    assert found.n_workers == 2
    assert found.network_seconds == pytest.approx((sending + 2e-3, sending + 6e-3))
    read = sum(share.read for share in found.shares)
    least, most = found.tokens_per_second(0.0)
    assert 1 / most == pytest.approx(read / 50e9 + sending + 2e-3)
    assert 1 / least == pytest.approx(read / 25e9 + sending + 6e-3)


def test_a_model_that_does_not_fit() -> None:
    """Guards: a plan that exceeds a machine's memory; a wrong sum of what is missing."""
    with pytest.raises(OutOfMemoryError, match=r"on 2 machines: 1[34]\.\d GB are missing"):
        plan("deepseekmoe-16b", 10 * GB, 10 * GB)
    hp, tensors = PRESETS["deepseekmoe-16b"].hp, tensors_of("deepseekmoe-16b", "BF16")
    found = plan("deepseekmoe-16b", 60 * GB).shares[0]
    assert found.process == PROCESS_BYTES
    exact = found.n_bytes
    assert plan("deepseekmoe-16b", exact).shares[0].n_layers == hp.n_layers
    with pytest.raises(OutOfMemoryError, match="on 1 machine: 10 MB are missing"):
        plan("deepseekmoe-16b", exact - 10**7)
    layer = sum(tensor.n_bytes for tensor in tensors) / hp.n_layers
    with pytest.raises(OutOfMemoryError, match="on 80 machines: layers are not divided"):
        plan("deepseekmoe-16b", *[layer * 0.8] * 80)


@pytest.mark.parametrize(
    ("text", "megabytes", "round_trip"),
    [
        ("1GbE", 117.5, 0.4e-3),
        ("2.5 gbe", 293.75, 0.4e-3),
        ("100Mbit/s", 11.75, 0.4e-3),
        ("10Gbit", 1175, 0.4e-3),
        ("100mbps", 11.75, 0.4e-3),
        ("40MB/s", 40, 0.4e-3),
        ("100MBps", 100, 0.4e-3),
        ("1Gbps", 117.5, 0.4e-3),
        ("1GiB/s", 1073.741824, 0.4e-3),
        ("WiFi", 30, 2e-3),
        *((text, 0, 0) for text in ("", "fast", "0GbE", "1", "GbE", "-1GbE", "1GB", "1TbE", "..MB/s")),
    ],
)
def test_networks(text: str, megabytes: float, round_trip: float) -> None:
    """Guards: bits taken for bytes; a number without a unit that is off by a factor of a million."""
    if megabytes:
        network = parse_network(text)
        assert network.bandwidth == pytest.approx(megabytes * 1e6)
        assert network.round_trip[0] == round_trip
    else:
        with pytest.raises(UsageError):
            parse_network(text)


@pytest.mark.parametrize(
    ("architecture", "n_workers", "n_gpu_layers", "tolerance"),
    [
        ("deepseek", 1, -1, 0),
        ("deepseek", 1, 2, 0),
        ("deepseek", 2, -1, 0),
        # A dense layer, and layers without shared experts, pass on two vectors. MLA has one cell index.
        ("deepseek", 2, 3, 0.1),
        ("deepseek2", 2, 3, 0.15),
        ("qwen3moe", 2, 3, 0.15),
    ],
)
def test_bytes_on_the_network(architecture: str, n_workers: int, n_gpu_layers: int, tolerance: float) -> None:
    """Guards: traffic that the plan forgets; a llama.cpp that sends the graph again for every token."""
    path = tiny_model() if architecture == "deepseek" else family_model(architecture)
    with workers(n_workers) as running, counted(running) as (addresses, traffic):
        options = ModelOptions(
            path,
            n_context=256,
            n_threads=1,
            n_gpu_layers=n_gpu_layers,
            workers=tuple(f"{address}=1KiB" for address in addresses),
        )
        with EngineClient.load(options) as engine:
            # The first reply sends the prompt, and the graphs.
            _, few, many = (measured(engine, traffic, n_tokens) for n_tokens in (2, 10, 60))
    file, hp = read_model(path)
    expected = bytes_per_token(
        n_workers,
        256,  # llama.cpp pads the cells in use
        hidden_size=file.tensors["token_embd.weight"].shape[-1],
        n_vocab=hp.n_vocab,
        layers_here=n_gpu_layers > 0,
    )
    assert (many - few) / 50 == pytest.approx(expected, rel=tolerance)


def measured(engine: EngineClient, traffic: list[int], n_tokens: int) -> int:
    before = sum(traffic)
    request = Request(
        "r",
        (0, 5, 6, 7),
        SamplingParameters(temperature=0),
        n_tokens,
        logit_bias=tuple((token_id, -100.0) for token_id in range(3)),
    )
    *_, last = engine.submit(request)
    assert last.usage is not None
    assert last.usage.completion_tokens == n_tokens
    return sum(traffic) - before


@pytest.mark.parametrize("model", [tiny_model, smollm2])
def test_buffers_of_a_worker(model: Callable[[], Path]) -> None:
    """Guards: a worker that needs much more memory than this machine, whose buffers the plan takes for it."""
    file, hp = read_model(model())
    (here,) = plan_split(file, hp, [Machine(4 * GB, (1.0, 1.0))], NETWORK, 2048).shares
    with workers(1) as (running,):
        options = ModelOptions(
            file.path, n_context=2048, n_gpu_layers=hp.n_layers, workers=(running.endpoint,)
        )
        with EngineClient.load(options) as engine:
            log = "\n".join(engine.log())
    *_, found = re.findall(r"RPC0\S* compute buffer size = +([\d.]+) MiB", log)
    assert 0.8 < float(found) * 2**20 / here.buffers < 1.25
