"""The layers in torch against llama.cpp: logits of every architecture, and the inputs of every matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support import llama_oracle
from support.family import MEMBERS, tiny_model, write_member
from support.models import family_hyperparameters, family_model
from support.observed import observed
from support.other_models import write_other
from support.tiny_gguf import FAMILY, MTP, write_tiny
from torch import Tensor

from dsmoe_convert.convert import convert_folder
from dsmoe_local.engine.native import Row
from dsmoe_local.engine.observe.arrays import unpack
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.model.gguf_file import Field, read_gguf
from dsmoe_local.model.gguf_model import metadata_of, read_model
from dsmoe_local.model.hyperparameters import Hyperparameters, RopeScaling
from dsmoe_quantize.calibrated.network.network import Network, open_network
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

IDS = [0, *range(20, 70), 5, 5, 300]
OTHER_IDS = IDS[::-1]
TOLERANCE = 1e-4
CPU = torch.device("cpu")

LINEAR, YARN = RopeScaling("linear", 4.0), RopeScaling("yarn", 4.0, 512, 1.2)
HEAD_FACTORS = RopeScaling("yarn", 4.0, 512, 0.9, 0.707)


def of_member(name: str, folder: Path) -> Path:
    checkpoint = write_member(folder / "model", MEMBERS[name], tiny_model(MEMBERS[name]))
    return convert_folder(checkpoint, folder / "tiny.gguf").path


def rewritten(source: Path, out: Path, fields: Mapping[str, Field], **tensors: Any) -> Path:
    """Copy a model with other values of metadata, and with more tensors."""
    file = read_gguf(source)
    writer = gguf.GGUFWriter(out, file.get("general.architecture"))
    for key, field in {**file.metadata, **fields}.items():
        if key != "general.architecture":
            writer.add_key_value(key, field.value, field.type, field.item_type)
    for tensor in gguf.GGUFReader(source).tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for name, weights in tensors.items():
        writer.add_tensor(f"{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def scaled(name: str, scaling: RopeScaling, folder: Path) -> Path:
    fields = metadata_of(replace(family_hyperparameters(name), rope_scaling=scaling))
    return rewritten(family_model(name), folder / "tiny.gguf", fields)


def llama(folder: Path, **tensors: Any) -> Path:
    plain = write_other(folder / "plain.gguf", "llama with biases")
    return rewritten(plain, folder / "tiny.gguf", {}, **tensors)


def tiny(hp: Hyperparameters, folder: Path, **more: Any) -> Path:
    return write_tiny(folder / "tiny.gguf", replace(hp, n_vocab=301), "f32", **more)


MODELS: Mapping[str, Callable[[Path], Path]] = {
    **{name: partial(of_member, name) for name in MEMBERS},
    "deepseek": lambda folder: family_model("deepseek"),
    "bailingmoe2": lambda folder: family_model("bailingmoe2"),
    "llama": partial(tiny, FAMILY["llama"]),
    "llama with biases": llama,
    "llama with frequencies": partial(llama, rope_freqs=np.linspace(1, 8, 8, dtype=np.float32)),
    "qwen2moe with a row": partial(tiny, FAMILY["qwen2moe"], as_rows="ffn_gate_inp_shexp"),
    "glm4moe with another layer": partial(tiny, MTP),
    "deepseek, linear": partial(scaled, "deepseek", LINEAR),
    "deepseek, YaRN": partial(scaled, "deepseek", YARN),
    "deepseek2, linear": partial(scaled, "deepseek2", LINEAR),
    "deepseek2, YaRN": partial(scaled, "deepseek2", YARN),
    "deepseek2, YaRN of heads": partial(scaled, "deepseek2", HEAD_FACTORS),
    "qwen3moe, YaRN": partial(scaled, "qwen3moe", YARN),
}
OBSERVED = [name for name in MODELS if "YaRN" not in name and "linear" not in name]


def after_all_layers(network: Network, tap: Any = None) -> Tensor:
    """Return the hidden states of two sequences."""
    hidden = network.embed(torch.tensor([IDS, OTHER_IDS]))
    for layer in range(network.n_layers):
        hidden = network.forward(layer, network.weights(layer, CPU), hidden, tap)
    return hidden


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """Guards: another rotation, norm, mask, scale or choice of experts; sequences that see each other."""
    path = MODELS[name](tmp_path)
    with open_network(*read_model(path)) as network, torch.no_grad():
        found = network.logits(after_all_layers(network)).numpy()
    for sequence, ids in zip(found, (IDS, OTHER_IDS), strict=True):
        expected = llama_oracle.logits(path, ids)
        assert np.abs(sequence - expected).max() < TOLERANCE * expected.std()


class Sums:
    """A tap that keeps sums of squares and counts, by tensor and expert or head."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[int, tuple[Tensor, int]]] = {}

    def __call__(
        self, tensor: str, inputs: Tensor, *, expert: int | None = None, gate: Tensor | None = None
    ) -> None:
        assert not inputs.requires_grad
        assert gate is None or gate.shape == (len(inputs),)
        of_tensor = self.seen.setdefault(tensor, {})
        assert (expert or 0) not in of_tensor
        of_tensor[expert or 0] = inputs.double().square().sum(0), len(inputs)


@pytest.mark.parametrize("name", OBSERVED)
def test_inputs_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """Guards: a matrix that no tap sees, inputs of another matrix, experts or heads mixed up."""
    path = MODELS[name](tmp_path)
    with observed(path, ObserverOptions("activations")) as model:
        for sequence, ids in enumerate((IDS, OTHER_IDS)):
            model.step(Row(sequence, 0, ids, len(ids)))
        inputs = model.summary("activations")["inputs"]
    sums = Sums()
    with open_network(*read_model(path)) as network, torch.no_grad():
        after_all_layers(network, sums)
    expected = {weight: each for each in inputs for weight in each["weights"] if weight.startswith("blk.")}
    assert sums.seen.keys() == expected.keys()
    for weight, each in expected.items():
        counts, squares = unpack(each["counts"]), unpack(each["sums"])
        for matrix, wanted in enumerate(squares):
            found, count = sums.seen[weight].get(matrix, (torch.zeros(len(wanted)), 0))
            assert count == counts[min(matrix, len(counts) - 1)]
            np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5 * squares.max(), err_msg=weight)


@pytest.mark.parametrize("name", ["deepseek", "deepseek3 groups", "qwen2moe"])
def test_gates_are_the_factors_of_experts(name: str, tmp_path: Path) -> None:
    """Guards: a gate before normalization and scale, or of another expert or token."""
    path = MODELS[name](tmp_path)
    outputs: dict[str, Tensor] = {}
    with open_network(*read_model(path)) as network, torch.no_grad():
        weights = network.weights(2, CPU)

        def add(
            tensor: str, inputs: Tensor, *, expert: int | None = None, gate: Tensor | None = None
        ) -> None:
            if "ffn_down_" in tensor:
                matrix = weights[tensor] if expert is None else weights[tensor][expert]
                factor = torch.ones(len(inputs)) if gate is None else gate
                outputs[tensor] = outputs.get(tensor, torch.zeros(len(matrix))) + factor @ (inputs @ matrix.T)

        hidden = torch.randn(1, 12, weights["blk.2.attn_norm.weight"].numel())
        full = network.forward(2, weights, hidden, add)
        assert len(outputs) == 2
        for tensor, output in list(outputs.items()):
            without = network.forward(2, {**weights, tensor: torch.zeros_like(weights[tensor])}, hidden)
            torch.testing.assert_close(output, (full - without).sum((0, 1)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek3 groups", "qwen2moe", "glm4moe norms, groups", "olmoe"])
def test_gradients_are_the_slopes(name: str, tmp_path: Path) -> None:
    """Guards: a weight whose gradient an operation in place or a copy loses."""
    with open_network(*read_model(MODELS[name](tmp_path))) as network:
        weights = {key: value.double() for key, value in network.weights(2, CPU).items()}
        generator = torch.Generator().manual_seed(1)
        width = weights["blk.2.attn_norm.weight"].numel()
        hidden = torch.randn(2, 5, width, generator=generator, dtype=torch.float64)
        target = torch.randn(2, 5, width, generator=generator, dtype=torch.float64)

        def loss(of: Mapping[str, Tensor]) -> Tensor:
            return (network.forward(2, of, hidden) * target).sum()

        for value in weights.values():
            value.requires_grad_()
        loss(weights).backward()
        for key, value in weights.items():
            if key.endswith("exp_probs_b.bias"):
                continue
            direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            ahead, behind = (loss({**weights, key: value + step * direction}) for step in (1e-6, -1e-6))
            assert value.grad is not None
            slope = (value.grad * direction).sum().item()
            assert slope == pytest.approx(((ahead - behind) / 2e-6).item(), rel=1e-4, abs=1e-5), key
            assert slope != 0


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q4", "q8"])
def test_weights_of_every_type(kind: str, tmp_path: Path) -> None:
    """Guards: rows or experts in another order, layers mixed up, a type that is read as another."""
    path = write_tiny(tmp_path / "tiny.gguf", FAMILY["glm4moe"], kind if kind[0] in "fb" else "f32")
    if kind[0] == "q":
        quantize_file(plan_quantization(path, resolve(kind)), tmp_path / "small.gguf")
        path = tmp_path / "small.gguf"
    expected = {each.name: each for each in gguf.GGUFReader(path).tensors}
    with open_network(*read_model(path)) as network:
        for layer in range(network.n_layers):
            weights = network.weights(layer, CPU)
            assert weights.keys() == {name for name in expected if name.startswith(f"blk.{layer}.")}
            for name, weight in weights.items():
                wanted = gguf.dequantize(expected[name].data, expected[name].tensor_type)
                np.testing.assert_allclose(weight, wanted.reshape(weight.shape), rtol=1e-6, err_msg=name)
