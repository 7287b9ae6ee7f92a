"""Loops over llama_decode and nothing else, through the bindings' C functions: the speed of llama.cpp itself.

They share no code with the engine.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import llama_cpp  # noqa: TID251 - the loop that the engine is held against, not the engine
import numpy as np

_N_BATCH = 2048


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Drop a line of the log."""


def silence() -> None:
    """Switch llama.cpp's log off in this process."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The corpus as token ids, and the ids that would end a reply."""

    corpus: tuple[int, ...]
    ends: tuple[int, ...]


def read_vocabulary(path: Path, texts: Sequence[str]) -> Vocabulary:
    """Tokenize texts with the vocabulary of a model. The weights are not loaded."""
    silence()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(bytes(path), parameters)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path} (`dsmoe demo` makes the demo model)")
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    ids: list[int] = []
    for text in texts:
        raw = text.encode()
        room = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), room, len(room), False, False)
        ids += room[:count]
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)
    ends = tuple(i for i in range(n_vocab) if llama_cpp.llama_vocab_is_eog(vocabulary, i))
    llama_cpp.llama_model_free(model)
    return Vocabulary(tuple(ids), ends)


class Bare:
    """A model, a context, and a batch in numpy arrays. Greedy; it does not stop at an end of text."""

    def __init__(
        self,
        path: Path,
        *,
        n_context: int,
        n_threads: int,
        n_sequences: int = 1,
        unified: bool = True,
    ) -> None:
        silence()
        self._model: Any = llama_cpp.llama_model_load_from_file(
            bytes(path), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = n_context
        settings.n_batch = _N_BATCH
        settings.n_seq_max = settings.n_outputs_max = n_sequences
        settings.n_threads = settings.n_threads_batch = n_threads
        settings.kv_unified = unified
        self._context: Any = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp has no room for a context of {n_context} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._n_vocab: int = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._make_batch(n_sequences)

    def _make_batch(self, n_sequences: int) -> None:
        self._tokens = np.zeros(_N_BATCH, np.int32)
        self._positions = np.zeros(_N_BATCH, np.int32)
        self._wanted = np.zeros(_N_BATCH, np.int8)
        self._ones = np.ones(_N_BATCH, np.int32)
        self._ids = np.arange(n_sequences, dtype=np.int32)
        self._addresses = self._ids.ctypes.data + 4 * np.arange(n_sequences, dtype=np.uint64)
        self._sequences = np.full(_N_BATCH, self._addresses[0], np.uint64)
        pointer = ctypes.POINTER
        self._batch = llama_cpp.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(pointer(llama_cpp.llama_token)),
            pos=self._positions.ctypes.data_as(pointer(llama_cpp.llama_pos)),
            n_seq_id=self._ones.ctypes.data_as(pointer(ctypes.c_int32)),
            seq_id=self._sequences.ctypes.data_as(pointer(pointer(llama_cpp.llama_seq_id))),
            logits=self._wanted.ctypes.data_as(pointer(ctypes.c_int8)),
        )

    def read(self, ids: Sequence[int], *, position: int = 0, sequence: int = 0) -> int:
        """Prefill one sequence in whole batches. Return the likeliest next token."""
        for start in range(0, len(ids), _N_BATCH):
            part = ids[start : start + _N_BATCH]
            self._tokens[: len(part)] = part
            self._positions[: len(part)] = np.arange(len(part)) + position + start
            self._sequences[: len(part)] = self._addresses[sequence]
            self._wanted[: len(part)] = 0
            self._wanted[len(part) - 1] = 1
            self._decode(len(part))
        return int(self._likeliest(1)[0])

    def _decode(self, count: int) -> None:
        self._batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise SystemExit(f"the bare loop cannot decode (status {status})")

    def _likeliest(self, count: int) -> Any:  # noqa: ANN401 - a numpy array or scalar
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (count, self._n_vocab)).argmax(1)

    def read_seconds(self, ids: Sequence[int], cached: Sequence[int] = ()) -> float:
        """Return the seconds of a prefill of `ids` after `cached`, up to the choice of the next token."""
        llama_cpp.llama_memory_clear(self._memory, False)
        if cached:
            self.read(cached)
        started = time.perf_counter()
        self.read(ids, position=len(cached))
        return time.perf_counter() - started

    def decode_rate(self, prompts: Sequence[Sequence[int]], n_new: int) -> float:
        """Decode `n_new` tokens of each prompt together. Return the tokens per second after the first."""
        llama_cpp.llama_memory_clear(self._memory, False)
        width = len(prompts)
        chosen = np.array([self.read(ids, sequence=at) for at, ids in enumerate(prompts)], np.int32)
        self._sequences[:width] = self._addresses[:width]
        self._positions[:width] = [len(ids) for ids in prompts]
        self._wanted[:width] = 1
        started = time.perf_counter()
        for _ in range(n_new - 1):
            self._tokens[:width] = chosen
            self._decode(width)
            chosen = self._likeliest(width)
            self._positions[:width] += 1
        return width * (n_new - 1) / (time.perf_counter() - started)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


class HighLevel:
    """The `Llama` class of the bindings, streaming, as its users call it."""

    def __init__(self, path: Path, *, n_context: int, n_threads: int) -> None:
        # Its default would be half the processors.
        self._llama: Any = llama_cpp.Llama(
            str(path), n_ctx=n_context, n_threads=n_threads, n_threads_batch=n_threads, verbose=False
        )
        silence()

    def decode_rate(self, prompt: Sequence[int], n_new: int) -> float:
        """Return the tokens per second after the first one. Half a character yields no piece: steps count."""
        self._llama.reset()
        evaluate, steps = self._llama.eval, list[float]()

        def timed(tokens: Sequence[int]) -> None:
            evaluate(tokens)
            steps.append(time.perf_counter())

        self._llama.eval = timed
        try:
            for _ in self._llama.create_completion(
                list(prompt), max_tokens=n_new, temperature=0.0, stream=True
            ):
                pass
        finally:
            self._llama.eval = evaluate
        if len(steps) < 2:
            raise SystemExit("llama_cpp.Llama ended its reply at once")
        return (len(steps) - 1) / (steps[-1] - steps[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()
