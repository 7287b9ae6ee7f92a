"""One layer during a forward pass: products with its matrices, norms, and who observes the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_quantize.calibrated.network.rope import Rotation


class Tap(Protocol):
    """Observes the inputs of the matrices of a layer."""

    def __call__(
        self, tensor: str, inputs: Tensor, *, expert: int | None = None, gate: Tensor | None = None
    ) -> None:
        """Take the vectors that a matrix multiplies, shape (n_tokens, n_columns), without gradient.

        `tensor` is the GGUF name. `expert` is the index of the matrix in a 3-D tensor: a routed expert, or a
        head in MLA. Experts without tokens are not reported. `gate`, shape (n_tokens,), is the factor by
        which the expert's output is multiplied for each token, if there is one.
        """
        ...


Weights = Mapping[str, Tensor | Sequence[Tensor]]
"""The tensors of a layer by their GGUF names. Those of routed experts may be lists of matrices."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of a layer, and what the forward pass needs besides.

    `prefix` is that of the names, for example "blk.3.".
    """

    hp: Hyperparameters
    prefix: str
    weights: Weights
    rotation: Rotation
    tap: Tap | None = None

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}{name}.weight" in self.weights

    def __getitem__(self, name: str) -> Tensor:
        found = self.weights[f"{self.prefix}{name}.weight"]
        assert isinstance(found, Tensor)
        return found

    def experts(self, name: str) -> Sequence[Tensor]:
        """Return the matrices of the routed experts."""
        found = self.weights[f"{self.prefix}{name}_exps.weight"]
        # Indexing a tensor for each expert would make a gradient of its full size for each of them.
        return found.unbind() if isinstance(found, Tensor) else found

    def bias(self, name: str) -> Tensor | None:
        """Return a bias, or None if the layer has none of this name."""
        found = self.weights.get(f"{self.prefix}{name}.bias")
        assert found is None or isinstance(found, Tensor)
        return found

    def multiply(self, name: str, x: Tensor) -> Tensor:
        """Return the products of `x`, shape (..., n_columns), with the rows of a matrix, plus its bias."""
        self.observe(name, x)
        return functional.linear(x, self[name], self.bias(name))

    def observe(self, name: str, x: Tensor, expert: int | None = None, gate: Tensor | None = None) -> None:
        """Pass the input of a matrix to the tap. `x` has the shape (..., n_columns)."""
        if self.tap is not None:
            gate = None if gate is None else gate.detach()
            tensor = f"{self.prefix}{name}.weight"
            self.tap(tensor, x.detach().reshape(-1, x.shape[-1]), expert=expert, gate=gate)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Return `x` normalized by its root mean square, over as many columns as the norm has weights."""
        weight = self[name]
        return rms_norm(x.unflatten(-1, (-1, len(weight))), weight, self.hp.rms_norm_eps).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the last dimension of `x` divided by its root mean square, times `weight`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight
