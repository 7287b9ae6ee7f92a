"""What weights are calibrated on, and how."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from dsmoe_local.base.text import safe_line


class Rounding(StrEnum):
    """How codes are chosen.

    NEAREST: each weight gets the nearest code, under scales that weigh columns by their activations. GPTQ:
    later columns make up for the errors of earlier ones. LEARNED: codes and scales are trained so that the
    output of the layer changes least.
    """

    NEAREST = "nearest"
    GPTQ = "gptq"
    LEARNED = "learned"


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """A text as token ids, (n_sequences, n_tokens), and how to round. `digest` identifies the text."""

    tokens: NDArray[np.int32]
    text: str
    digest: str
    rounding: Rounding = Rounding.GPTQ
    seed: int = 0

    @property
    def record(self) -> str:
        """What the metadata of the new file says."""
        return (
            f'rounding = "{self.rounding}", text = "{safe_line(self.text, 80)}", digest = "{self.digest}",'
            f" tokens = {self.tokens.size}, seed = {self.seed}"
        )

    @property
    def tokens_digest(self) -> str:
        """A digest of the token ids and their order."""
        return hashlib.sha256(f"{self.tokens.shape}".encode() + self.tokens.tobytes()).hexdigest()
