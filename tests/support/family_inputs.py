"""The vectors that each matrix of a model of transformers multiplies: an oracle for importance matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import TensorSpec, tensor_specs

Squares = Mapping[str, tuple[NDArray[np.float64], list[int]]]


def squares(model: Any, hp: Hyperparameters, ids: Sequence[int]) -> Squares:
    """Return sums of squares (n_matrices, n_columns) and counts for each GGUF matrix, computed with torch."""
    seen: dict[str, Any] = {}
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(_Keeper(name, seen)))
    with torch.no_grad():
        model(torch.tensor([list(ids)]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return {spec.name: _of(spec, model, hp, seen) for spec in tensor_specs(hp) if len(spec.shape) > 1}


class _Keeper:
    """Keeps what a module is called with, and what it returns."""

    def __init__(self, name: str, seen: dict[str, Any]) -> None:
        self._name, self._seen = name, seen

    def __call__(self, module: Any, given: tuple[Any, ...], returned: Any) -> None:
        self._seen[self._name] = given, returned


def _of(
    spec: TensorSpec, model: Any, hp: Hyperparameters, seen: Mapping[str, Any]
) -> tuple[NDArray[np.float64], list[int]]:
    layer = f"model.layers.{spec.layer}."
    if spec.name.endswith("_exps.weight"):
        parts = _of_experts(model.get_submodule(f"{layer}mlp.experts"), *seen[f"{layer}mlp.experts"][0][:2])
        return _summed([hidden if "down" in spec.name else x for x, hidden in parts])
    if spec.name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
        keys = spec.name.endswith("attn_k_b.weight")
        heads = _queries(hp, seen, layer) if keys else _values(seen, layer)
        sums, counts = _summed(list(heads))
        return sums, counts[:1]
    given = seen[spec.sources[0].removesuffix(".weight")][0][0]
    return _summed([given.reshape(-1, given.shape[-1])])


def _of_experts(experts: Any, x: torch.Tensor, chosen: torch.Tensor) -> list[tuple[torch.Tensor, Any]]:
    """Return the vectors of each expert, and its neurons."""
    found = []
    for expert in range(len(experts.down_proj)):
        mine = x[(chosen == expert).any(1)]
        gate, up = (mine @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        found.append((mine, torch.nn.functional.silu(gate) * up))
    return found


def _queries(hp: Hyperparameters, seen: Mapping[str, Any], layer: str) -> torch.Tensor:
    """Return the parts of the queries that are not rotated, (heads, tokens, columns)."""
    q = seen.get(f"{layer}self_attn.q_b_proj") or seen[f"{layer}self_attn.q_proj"]
    heads: torch.Tensor = q[1][0].reshape(-1, hp.n_heads, hp.head_dim)
    return heads[..., : hp.nope_dim].transpose(0, 1)


def _values(seen: Mapping[str, Any], layer: str) -> torch.Tensor:
    """Return the weighted sums of compressed values, (heads, tokens, columns)."""
    attention: torch.Tensor = seen[f"{layer}self_attn"][1][1][0]
    compressed: torch.Tensor = seen[f"{layer}self_attn.kv_a_layernorm"][1]
    return attention @ compressed.reshape(-1, compressed.shape[-1])


def _summed(parts: Sequence[torch.Tensor]) -> tuple[NDArray[np.float64], list[int]]:
    return np.stack([part.double().square().sum(0).numpy() for part in parts]), [len(part) for part in parts]
