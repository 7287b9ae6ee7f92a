"""The likeliest tokens of a row of logits and the normalization of log-probabilities, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int32]

_GROUPS_PER_TOKEN = 8


def near_top(logits: Logits, count: int) -> TokenIds:
    """Return the ids of at least the `count` highest logits, in ascending order.

    This is several times as fast as an exact selection. The logits are divided into groups. At least `count`
    logits are not below the `count`-th highest maximum of the groups.
    """
    size = len(logits)
    width = size // (_GROUPS_PER_TOKEN * count) if count else 0
    if width < 2:
        return np.arange(size, dtype=np.int32)
    groups = size // width
    maxima = logits[: groups * width].reshape(width, groups).max(axis=0)
    bound = np.partition(maxima, groups - count)[groups - count]
    return np.flatnonzero(logits >= bound).astype(np.int32)


def likeliest(logits: Logits, count: int) -> TokenIds:
    """Return the ids of the `count` highest logits, the highest first. Equal ones are in ascending order."""
    ids = near_top(logits, count)
    return ids[np.argsort(-logits[ids], kind="stable")[:count]]


def log_total(logits: Logits, peak: float) -> float:
    """Return the logarithm of the sum of exponentials. `peak` is the highest logit."""
    return peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
