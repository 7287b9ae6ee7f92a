"""The logits of scored tokens, cut into blocks, and their log-probabilities. Keeps nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.native import Row
from dsmoe_local.engine.observe.observer import Logits, Scored

_BLOCK = 16  # rows of logits that are worked on at once: 16B's 410 KB each stay in the cache


@dataclass(frozen=True, slots=True)
class Block:
    """Some scored tokens of one request.

    `targets[j]` stands at `index` + j in the prompt, and has the log-probability `logprobs[j]`. `shifted` are
    the logits less their row's greatest, `exponentials` theirs, and `totals` the sums of those: a token's
    log-probability is `shifted[j, id] - log_totals[j]`.
    """

    request_id: str
    index: int
    targets: npt.NDArray[np.int64]
    shifted: npt.NDArray[np.float32]
    exponentials: npt.NDArray[np.float32]
    totals: npt.NDArray[np.float64]
    log_totals: npt.NDArray[np.float64]
    logprobs: npt.NDArray[np.float64]


def blocks(rows: Sequence[Row], logits: Logits, scored: Sequence[Scored | None]) -> Iterator[Block]:
    """The scored tokens of a step. NativeError if the logits are not finite."""
    start = 0
    for row, score in zip(rows, scored, strict=False):
        if score is not None:
            for done in range(0, len(score.targets), _BLOCK):
                targets = np.asarray(score.targets[done : done + _BLOCK], np.int64)
                first = start + done
                yield _block(
                    score.request_id, score.start + done, targets, logits[first : first + len(targets)]
                )
        start += row.n_outputs


def _block(request_id: str, index: int, targets: npt.NDArray[np.int64], logits: Logits) -> Block:
    # What is not finite is told below.
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1, dtype=np.float64)
    log_totals = np.log(totals)
    logprobs = shifted[np.arange(len(targets)), targets] - log_totals
    if not (np.isfinite(totals).all() and np.isfinite(logprobs).all()):
        raise NativeError(
            "the model's logits are not finite",
            remedy="its weights may be damaged: download or convert it again",
        )
    return Block(request_id, index, targets, shifted, exponentials, totals, log_totals, logprobs)
