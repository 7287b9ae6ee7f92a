"""llama.cpp's sampler chain, and the candidates it is applied to."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine.native.library import lib
from dsmoe_local.engine.types import SamplingParameters

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("probability", np.float32)])
# With a lower temperature, float32 logits overflow to infinity, and infinity minus infinity is NaN.
_LOWEST_TEMPERATURE = 1e-6
_MIROSTAT_TOKENS = 100  # number of likeliest tokens that mirostat 1 fits its curve to


class Candidates:
    """A llama_token_data_array. Samplers sort and truncate it in place."""

    def __init__(self) -> None:
        self._rows = np.zeros(0, _CANDIDATE)
        self._all_ids = np.zeros(0, np.int32)
        self._array: Any = lib.llama_token_data_array()

    def fill(self, logits: npt.NDArray[np.float32], ids: npt.NDArray[np.int32] | None = None) -> None:
        """Set the candidates and their logits. Without `ids` they are the whole vocabulary."""
        count = len(logits)
        if count > len(self._rows):
            self._rows = np.zeros(count, _CANDIDATE)
        rows = self._rows[:count]
        if ids is None:
            if len(self._all_ids) != count:
                self._all_ids = np.arange(count, dtype=np.int32)
            ids = self._all_ids
        rows["id"] = ids
        rows["logit"] = logits
        array = self._array
        array.data = ctypes.cast(self._rows.ctypes.data, lib.llama_token_data_p)
        array.size, array.selected, array.sorted = count, -1, False

    def run(self, chain: Any) -> int:  # noqa: ANN401 - a ctypes pointer
        """Apply a sampler chain and return the token that it selects."""
        lib.llama_sampler_apply(chain, ctypes.byref(self._array))
        token_id: int = self._array.data[self._array.selected].id
        return token_id


class Sampler:
    """The sampler chain of one reply, starting with top-k. Biases and penalties are not part of it."""

    def __init__(self, n_vocab: int, parameters: SamplingParameters, seed: int) -> None:
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for stage in _stages(n_vocab, parameters, seed):
            lib.llama_sampler_chain_add(self._chain, stage)

    def choose(self, candidates: Candidates) -> int:
        """Sample one of the candidates. Fill the buffer again before the next call."""
        return candidates.run(self._chain)

    def close(self) -> None:
        """Free the chain and its samplers."""
        if self._chain:
            lib.llama_sampler_free(self._chain)
            self._chain = None


def _stages(n_vocab: int, p: SamplingParameters, seed: int) -> Iterable[Any]:
    temperature = lib.llama_sampler_init_temp(max(p.temperature, _LOWEST_TEMPERATURE))
    if p.mirostat:
        yield temperature
        if p.mirostat == 1:
            yield lib.llama_sampler_init_mirostat(
                n_vocab, seed, p.mirostat_tau, p.mirostat_eta, _MIROSTAT_TOKENS
            )
        else:
            yield lib.llama_sampler_init_mirostat_v2(seed, p.mirostat_tau, p.mirostat_eta)
        return
    yield lib.llama_sampler_init_top_k(p.top_k)
    yield lib.llama_sampler_init_typical(p.typical_p, 1)
    yield lib.llama_sampler_init_top_p(p.top_p, 1)
    yield lib.llama_sampler_init_min_p(p.min_p, 1)
    yield temperature
    yield lib.llama_sampler_init_dist(seed)
