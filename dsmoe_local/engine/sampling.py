"""Choosing a request's next token from its logits: argmax where that is all, else a sampler chain."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine import native
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.types import MAX_SEED, Request, SamplingParameters


class Chooser:
    """Chooses the next token from the last step's logits: argmax where that is all, else a sampler chain."""

    def __init__(
        self,
        model: native.Model,
        context: native.Context,
        request: Request,
        seed: int | None,
        prompt: Sequence[int],
    ) -> None:
        self._logprobs = request.logprobs
        self._sampler: native.Sampler | None = None
        if not _plain_greedy(request.sampling):
            self._sampler = native.Sampler(context, request.sampling, seed or 0)
            n_seen = request.sampling.repeat_last_n
            self._sampler.accept(prompt[len(prompt) - min(n_seen, len(prompt)) :])

    def __call__(self, index: int, logits: npt.NDArray[np.float32]) -> tuple[int, float | None]:
        """The next token and its log-probability. `index`: the token's place in the step's batch, or -1."""
        best = int(logits.argmax())
        # argmax finds a NaN first, wherever it is.
        if not np.isfinite(logits[best]):
            raise NativeError("the model computes NaN or infinity", remedy="check the file: dsmoe inspect")
        token_id = best if self._sampler is None else self._sampler.sample(index)
        return token_id, _logprob(logits, token_id, float(logits[best])) if self._logprobs else None

    def close(self) -> None:
        """Free the chain."""
        if self._sampler is not None:
            self._sampler.close()


def _logprob(logits: npt.NDArray[np.float32], token_id: int, peak: float) -> float:
    total = float(np.exp(logits - np.float32(peak)).sum(dtype=np.float64))
    return float(logits[token_id]) - peak - float(np.log(total))


def _plain_greedy(sampling: SamplingParameters) -> bool:
    penalized = sampling.repeat_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    return sampling.temperature <= 0 and not (penalized and sampling.repeat_last_n)


def choose_seed(sampling: SamplingParameters) -> int | None:
    """The seed to use, and to report: None where nothing is random."""
    if sampling.temperature <= 0:
        return None
    return secrets.randbelow(MAX_SEED + 1) if sampling.seed is None else sampling.seed
