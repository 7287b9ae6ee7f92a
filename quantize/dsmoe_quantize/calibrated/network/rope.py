"""Rotary positions (arXiv 2104.09864) with linear and YaRN (arXiv 2309.00071) scaling, as llama.cpp has them.

llama.cpp: ggml_rope_ext, and the factors in src/llama-context.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_local.model.architectures import ARCHITECTURES
from dsmoe_local.model.hyperparameters import Hyperparameters, RopeScaling

_BETAS = (32, 1)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of each position's angles, shape (n_tokens, n_angles).

    `of_adjacent`: each angle rotates two adjacent values; otherwise values i and i + n_angles.
    """

    cosines: Tensor
    sines: Tensor
    of_adjacent: bool

    def __call__(self, heads: Tensor) -> Tensor:
        """Return heads, shape (..., n_tokens, width), with their first 2 * n_angles values rotated."""
        n_rotated = 2 * self.cosines.shape[-1]
        rotated, rest = heads[..., :n_rotated], heads[..., n_rotated:]
        if self.of_adjacent:
            first, second = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            first, second = rotated.chunk(2, -1)
        turned = (
            first * self.cosines - second * self.sines,
            first * self.sines + second * self.cosines,
        )
        if self.of_adjacent:
            return torch.cat((torch.stack(turned, -1).flatten(-2), rest), -1)
        return torch.cat((*turned, rest), -1)


def rotation(hp: Hyperparameters, n_tokens: int, divisors: Tensor | None, device: torch.device) -> Rotation:
    """Return the rotation of positions 0 to n_tokens - 1. `divisors` are those of each frequency, or None."""
    frequencies = hp.rope_theta ** -(torch.arange(0, hp.rotary_dim, 2, dtype=torch.float64) / hp.rotary_dim)
    if divisors is not None:
        frequencies /= divisors.double()
    scaling = hp.rope_scaling
    if scaling is not None:
        kept = _kept(hp, scaling) if scaling.kind == "yarn" else 0.0
        frequencies = frequencies * kept + frequencies / scaling.factor * (1 - kept)
    angles = torch.outer(torch.arange(n_tokens, dtype=torch.float64), frequencies)
    magnitude = _magnitude(hp)
    parts = (magnitude * part for part in (angles.cos(), angles.sin()))
    cosines, sines = (part.float().to(device) for part in parts)
    return Rotation(cosines, sines, ARCHITECTURES[hp.architecture].rotates_adjacent_values)


def score_scale(hp: Hyperparameters) -> float:
    """Return the factor of attention scores, before the softmax."""
    scale = 1 / math.sqrt(hp.head_dim)
    scaling = hp.rope_scaling
    if scaling is None or not ARCHITECTURES[hp.architecture].yarn_scales_attention:
        return scale
    # src/models/deepseek2.cpp scales with the magnitude of YaRN whatever the kind is.
    logarithm = math.log(scaling.factor)
    magnitude = _magnitude(hp) if scaling.kind == "yarn" else 1 + 0.1 * logarithm
    return scale * (magnitude * (1 + 0.1 * scaling.mscale_all_dim * logarithm)) ** 2


def _magnitude(hp: Hyperparameters) -> float:
    scaling = hp.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.mscale_all_dim and ARCHITECTURES[hp.architecture].yarn_scales_attention:
        return scaling.attention_factor
    return scaling.attention_factor * scaling.yarn_magnitude


def _kept(hp: Hyperparameters, scaling: RopeScaling) -> Tensor:
    """Return how much of each frequency YaRN keeps: 1 for fast ones, 0 for those it divides by the factor."""
    n_angles = hp.rotary_dim // 2
    first, last = (
        n_angles * math.log(scaling.original_context / (beta * 2 * math.pi)) / math.log(hp.rope_theta)
        for beta in _BETAS
    )
    first, last = max(0, math.floor(first)), min(hp.rotary_dim - 1, math.ceil(last))
    ramp = (torch.arange(n_angles, dtype=torch.float64) - first) / max(0.001, last - first)
    return 1 - ramp.clamp(0, 1)
