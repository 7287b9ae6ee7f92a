"""A llama.cpp context: the KV cache and compute buffers of a model. Decodes batches."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.native.library import clear_log, last_error, lib, load_error
from dsmoe_local.engine.native.model import Model

CACHE_TYPES = {
    "f32": lib.GGML_TYPE_F32,
    "f16": lib.GGML_TYPE_F16,
    "bf16": 30,  # the bindings lack the name
    "q8_0": lib.GGML_TYPE_Q8_0,
    "q5_1": lib.GGML_TYPE_Q5_1,
    "q5_0": lib.GGML_TYPE_Q5_0,
    "q4_1": lib.GGML_TYPE_Q4_1,
    "q4_0": lib.GGML_TYPE_Q4_0,
    "iq4_nl": lib.GGML_TYPE_IQ4_NL,
}
FLOAT_CACHE_TYPES = ("f32", "f16", "bf16")
FLASH_ATTENTION = {
    "auto": lib.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "off": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "on": lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}
DECODED, NO_SLOT, ABORTED = 0, 1, 2  # what `Context.decode` returns
MAX_SEQUENCES = 256  # llama.cpp's own limit
ALL_SEQUENCES = -1

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """Sizes and modes of a context. The strings are keys of CACHE_TYPES and FLASH_ATTENTION.

    `n_context` is the number of cells. If `unified`, all sequences share them; otherwise each has `n_context
    / n_sequences`. A batch may have `n_outputs` rows of logits. `eval_callback` is ggml's scheduler callback
    as a ctypes object, which the caller must keep alive.
    """

    n_context: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    n_threads_batch: int
    flash_attention: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    n_sequences: int = 1
    unified: bool = True
    offload_cache: bool = True
    n_outputs: int = 1
    eval_callback: Any = None


class Row(NamedTuple):
    """Consecutive tokens of one sequence in a batch. The last `n_outputs` of them get logits."""

    sequence: int
    position: int
    token_ids: Sequence[int]
    n_outputs: int


class Context:
    """A llama.cpp context. Only one thread may use it at a time, except for `abort`.

    Sequences with ids below `n_sequences` can be decoded. In a unified cache, ids up to MAX_SEQUENCES - 1 can
    own cells too, but not be decoded.
    """

    def __init__(self, model: Model, options: ContextOptions) -> None:
        """Allocate the cache and buffers. Raises ModelLoadError with llama.cpp's log message."""
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = options.n_context
        parameters.n_batch = options.n_batch
        parameters.n_ubatch = options.n_ubatch
        parameters.n_seq_max = options.n_sequences
        parameters.kv_unified = options.unified
        parameters.offload_kqv = options.offload_cache
        # Rows of logits for a whole ubatch would take 200 MB for the 16B model.
        parameters.n_outputs_max = options.n_outputs
        parameters.n_threads = options.n_threads
        parameters.n_threads_batch = options.n_threads_batch
        parameters.flash_attn_type = FLASH_ATTENTION[options.flash_attention]
        parameters.type_k = CACHE_TYPES[options.cache_type_k]
        parameters.type_v = CACHE_TYPES[options.cache_type_v]
        if options.eval_callback is not None:
            parameters.cb_eval = options.eval_callback
        # The callback is C's strlen: nonzero if the first byte is set. Unlike Python code, it needs no GIL.
        self._abort = ctypes.create_string_buffer(2)
        self._strlen = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        parameters.abort_callback = self._strlen
        parameters.abort_callback_data = ctypes.addressof(self._abort)
        self.model = model
        self.options = options
        clear_log()
        self.handle = lib.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise load_error("llama.cpp cannot create a context for the model")
        self.n_batch: int = lib.llama_n_batch(self.handle)
        self.n_ubatch: int = lib.llama_n_ubatch(self.handle)
        self._memory = lib.llama_get_memory(self.handle)
        self._n_outputs = 0
        self._make_batch(self.n_batch)

    def _make_batch(self, capacity: int) -> None:
        """Create a llama_batch whose memory is numpy arrays, so llama_batch_free must not be called."""
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._outputs = np.zeros(capacity, np.int8)
        self._n_ids = np.ones(capacity, np.int32)
        ids = np.arange(MAX_SEQUENCES, dtype=np.int32)
        self._ids = ids
        self._id_address = [ids.ctypes.data + index * ids.itemsize for index in range(MAX_SEQUENCES)]
        self._sequences = np.full(capacity, self._id_address[0], np.uint64)
        self._count = np.arange(capacity, dtype=np.int32)
        self._batch = lib.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(lib.llama_token)),
            pos=self._positions.ctypes.data_as(ctypes.POINTER(lib.llama_pos)),
            n_seq_id=self._n_ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._sequences.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(lib.llama_seq_id))),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def decode(self, rows: Sequence[Row]) -> int:
        """Decode a batch of at most n_batch tokens and n_outputs outputs.

        Returns DECODED, NO_SLOT (no room in the cache; nothing changed) or ABORTED (only some of the tokens
        are in the cache, see `n_cached`). Raises NativeError if llama.cpp fails.
        """
        count = n_outputs = 0
        for sequence, position, token_ids, wanted in rows:
            end = count + len(token_ids)
            self._tokens[count:end] = token_ids
            self._positions[count:end] = self._count[: end - count]
            self._positions[count:end] += position
            self._sequences[count:end] = self._id_address[sequence]
            self._outputs[count:end] = 0
            if wanted:
                self._outputs[end - wanted : end] = 1
                n_outputs += wanted
            count = end
        self._batch.n_tokens = count
        status: int = lib.llama_decode(self.handle, self._batch)
        if status not in (DECODED, NO_SLOT, ABORTED):
            raise NativeError(f"llama.cpp cannot decode (status {status})", where=last_error())
        self._n_outputs = n_outputs if status == DECODED else 0
        return status

    def logits(self) -> npt.NDArray[np.float32]:
        """Return the last batch's logits, shape (n_outputs, n_vocab). The next `decode` overwrites them."""
        pointer = lib.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(pointer, shape=(self._n_outputs, self.model.n_vocab))

    def n_cached(self, sequence: int) -> int:
        """Return the number of positions of a sequence in the KV cache."""
        last: int = lib.llama_memory_seq_pos_max(self._memory, sequence)
        return last + 1

    def can_continue(self, sequence: int, count: int) -> bool:
        """Return True if the cache has all cells that the token at position `count` attends to.

        With sliding window attention, older cells may have been overwritten. That does not matter to a
        sequence of exactly `count` tokens, the only ones that are continued if the model is not rewindable.
        """
        if not self.model.n_window or not self.model.rewindable:
            return True
        first: int = lib.llama_memory_seq_pos_min(self._memory, sequence)
        return 0 <= first <= max(0, count + 1 - self.model.n_window)

    def forget(self, sequence: int, start: int, end: int = -1) -> None:
        """Remove the positions from `start` to `end` of a sequence (-1: to its end)."""
        lib.llama_memory_seq_rm(self._memory, sequence, start, end)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of `source` to the empty sequence `target`.

        In a unified cache both share the cells, at no cost. Otherwise the next step copies the data.
        """
        if self.options.unified:
            lib.llama_memory_seq_cp(self._memory, source, target, 0, count)
        else:
            # llama.cpp can only copy the whole cache of a sequence.
            lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)
            lib.llama_memory_seq_rm(self._memory, target, count, -1)

    @property
    def can_shift(self) -> bool:
        """True if cached positions can be shifted."""
        return self.model.has_plain_cache and bool(lib.llama_memory_can_shift(self._memory))

    def shift(self, sequence: int, start: int, distance: int) -> None:
        """Decrease the positions from `start` on by `distance`. The sequence must not share cells."""
        lib.llama_memory_seq_add(self._memory, sequence, start, -1, -distance)

    def state_size(self, sequence: int = ALL_SEQUENCES) -> int:
        """Return the number of bytes that `write_state` needs."""
        if sequence == ALL_SEQUENCES:
            size: int = lib.llama_state_get_size(self.handle)
        else:
            size = lib.llama_state_seq_get_size(self.handle, sequence)
        return size

    def write_state(self, target: Buffer, sequence: int = ALL_SEQUENCES) -> bool:
        """Copy the state of the cache, or of one sequence, to `target`, which has `state_size` bytes.

        Returns False on failure. `sequence` must be below `n_sequences`: llama.cpp writes the cells of others
        without a sequence id.
        """
        data = np.frombuffer(target, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if sequence == ALL_SEQUENCES:
            n_bytes: int = lib.llama_state_get_data(self.handle, pointer, data.size)
        else:
            n_bytes = lib.llama_state_seq_get_data(self.handle, pointer, data.size, sequence)
        return n_bytes == data.size

    def read_state(self, source: Buffer, sequence: int = ALL_SEQUENCES) -> bool:
        """Load a state into the cache, or into one sequence. Returns False on failure, with nothing loaded.

        It fails if there are too few free cells, or if the cache has other types or layers. llama.cpp checks
        little else.
        """
        data = np.frombuffer(source, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if sequence == ALL_SEQUENCES:
            n_bytes: int = lib.llama_state_set_data(self.handle, pointer, data.size)
        else:
            n_bytes = lib.llama_state_seq_set_data(self.handle, pointer, data.size, sequence)
        if n_bytes == data.size:
            return True
        if sequence == ALL_SEQUENCES:
            lib.llama_memory_clear(self._memory, True)
        else:
            self.forget(sequence, 0)
        return False

    def abort(self) -> None:
        """Make the current and all later calls of `decode` return ABORTED. A CPU stops after a graph node."""
        self._abort[0] = b"\x01"

    def clear_abort(self) -> None:
        """Undo `abort`, so that `decode` works again."""
        self._abort[0] = b"\x00"

    def close(self) -> None:
        """Free the cache and buffers."""
        if self.handle:
            lib.llama_free(self.handle)
            self.handle = None


def check_modes(cache_type_k: str, cache_type_v: str, flash_attention: str) -> None:
    """Raise UsageError for cache types or a flash attention mode that llama.cpp does not support."""
    for flag, value in (("-ctk", cache_type_k), ("-ctv", cache_type_v)):
        if value not in CACHE_TYPES:
            raise UsageError(
                f"{flag} {safe_line(value)} is not a type for the KV cache",
                remedy=f"it takes {', '.join(CACHE_TYPES)}",
            )
    if flash_attention not in FLASH_ATTENTION:
        raise UsageError(
            f"-fa {safe_line(flash_attention)} is not a mode of flash attention",
            remedy=f"it takes {', '.join(FLASH_ATTENTION)}",
        )
    if flash_attention == "off" and cache_type_v not in FLOAT_CACHE_TYPES:
        raise UsageError(
            "a quantized V cache needs flash attention", remedy="leave out -fa off, or use -ctv f16"
        )
