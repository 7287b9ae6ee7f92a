"""Logit biases and repetition penalties, which change the logits before a token is sampled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from dsmoe_local.engine.sampling.likeliest import Logits
from dsmoe_local.engine.types import SamplingParameters


class Adjustments:
    """Applies logit biases, then penalties for the last `repeat_last_n` tokens, as in llama.cpp."""

    def __init__(self, sampling: SamplingParameters, bias: Sequence[tuple[int, float]]) -> None:
        self._sampling = sampling
        self._biased = np.array([token_id for token_id, _ in bias], np.int64)
        self._bias = np.array([value for _, value in bias], np.float32)
        self._lowered = frozenset(token_id for token_id, _ in bias) if all(b <= 0 for _, b in bias) else None
        self._recent: deque[int] = deque(maxlen=sampling.repeat_last_n)
        self._counts: dict[int, int] = {}
        penalized = sampling.repeat_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
        self._penalizes = bool(penalized and sampling.repeat_last_n)

    @property
    def any(self) -> bool:
        """True if any logits are changed."""
        return self._penalizes or len(self._bias) > 0

    def keeps_first(self, token_id: int) -> bool:
        """Return True if the likeliest token, `token_id`, certainly stays the likeliest."""
        return not self._penalizes and self._lowered is not None and token_id not in self._lowered

    def remember(self, token_ids: Iterable[int]) -> None:
        """Add tokens of the prompt or the reply to the penalized ones."""
        if not self._penalizes:
            return
        for token_id in token_ids:
            if len(self._recent) == self._recent.maxlen:
                oldest = self._recent[0]
                self._counts[oldest] -= 1
                if not self._counts[oldest]:
                    del self._counts[oldest]
            self._recent.append(token_id)
            self._counts[token_id] = self._counts.get(token_id, 0) + 1

    def apply(self, logits: Logits) -> Logits:
        """Return a changed copy of `logits`, or `logits` if nothing changes."""
        if not self.any:
            return logits
        changed = logits.copy()
        # `add.at` adds both values if an id is given twice.
        np.add.at(changed, self._biased, self._bias)
        if self._counts:
            p = self._sampling
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            seen = changed[ids]
            repeat = np.float32(p.repeat_penalty)
            # Dividing a negative logit by the penalty would make the token likelier.
            seen = np.where(seen <= 0, seen * repeat, seen / repeat)
            changed[ids] = seen - (counts * np.float32(p.frequency_penalty) + np.float32(p.presence_penalty))
        return changed
