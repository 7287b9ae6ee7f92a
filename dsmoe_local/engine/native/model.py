"""Loads a model with llama.cpp and gives access to its vocabulary."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsmoe_local.base.errors import InterruptedRunError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.native.devices import buffer_types, device_list
from dsmoe_local.engine.native.library import clear_log, keep_log, last_error, lib, load_error
from dsmoe_local.engine.native.repack import repack_buffer


class _BufferOverride(ctypes.Structure):
    # llama_model_tensor_buft_override, which the bindings lack.
    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


class Model:
    """A loaded model. Any thread may call its methods until `close`.

    `n_window`: some layers attend to the last `n_window` positions only, so that older cells of the KV cache
    may be overwritten; 0 if there are none. `rewindable` is false for recurrent and hybrid models, whose
    state of a sequence can be continued or dropped, but not cut.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_gpu_layers: int = 0,
        devices: Sequence[str] | None = None,
        split: Sequence[int] = (),
        overrides: Sequence[tuple[str, str]] = (),
        mapped: bool = True,
        repack: bool = True,
        repacked: Sequence[str] = (),
        n_experts_per_token: int | None = None,
        architecture: str = "deepseek",
        progress: Callable[[float], bool] | None = None,
        measure_only: bool = False,
    ) -> None:
        """Load `path`. Raises ModelLoadError with llama.cpp's log message, UsageError for an unknown device.

        - The last `n_gpu_layers` layers are placed on `devices` (None: llama.cpp's default). The output
          counts as a layer. `split` is the number of layers on each device (empty: in proportion to free
          memory).
        - `overrides` are pairs of a regular expression of tensor names and a buffer type. The first match
          counts.
        - `mapped`: memory-map the weights on the CPU.
        - `repack`: repack all weights that can be. `repacked` has regular expressions of weights to repack in
          any case; `can_repack` must be true for all of them.
        - `progress` is called with fractions from 0 to 1. If it returns False, InterruptedRunError is raised.
        - `measure_only`: read no weights and allocate nothing. A context of the model only logs its sizes.
        """
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = n_gpu_layers
        parameters.use_extra_bufts = repack
        parameters.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mapped else lib.LLAMA_LOAD_MODE_NONE
        if measure_only:
            parameters.no_alloc = True
            parameters.load_mode = lib.LLAMA_LOAD_MODE_NONE
        self._place(parameters, devices, split, overrides, repacked)
        if n_experts_per_token is not None:
            self._override_active_experts(parameters, architecture, n_experts_per_token)
        self.handle = self._load(path, parameters, progress)
        self.vocabulary = lib.llama_model_get_vocab(self.handle)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocabulary)
        self.n_context_trained: int = lib.llama_model_n_ctx_train(self.handle)
        self.n_parameters: int = lib.llama_model_n_params(self.handle)
        self.n_bytes: int = lib.llama_model_size(self.handle)
        self.bos: int = lib.llama_vocab_bos(self.vocabulary)
        self.eos: int = lib.llama_vocab_eos(self.vocabulary)
        self.n_window: int = lib.llama_model_n_swa(self.handle)
        self.rewindable = not (
            lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle)
        )
        self.adds_bos: bool = lib.llama_vocab_get_add_bos(self.vocabulary)
        self._pieces: dict[int, bytes] = {}

    def _load(self, path: Path, parameters: Any, progress: Callable[[float], bool] | None) -> Any:  # noqa: ANN401
        interrupted = False

        def report(fraction: float, _: object) -> bool:
            nonlocal interrupted
            interrupted = interrupted or (progress is not None and not progress(fraction))
            return not interrupted

        # llama.cpp keeps a pointer to it.
        self._progress = lib.llama_progress_callback(report)
        parameters.progress_callback = self._progress
        keep_log()
        clear_log()
        handle = lib.llama_model_load_from_file(bytes(path), parameters)
        if not handle:
            if interrupted:
                raise InterruptedRunError("loading was interrupted")
            raise load_error(f"llama.cpp cannot load {safe_line(path.name)}")
        return handle

    def _place(
        self,
        parameters: Any,  # noqa: ANN401 - a ctypes struct
        devices: Sequence[str] | None,
        split: Sequence[int],
        overrides: Sequence[tuple[str, str]],
        repacked: Sequence[str],
    ) -> None:
        # llama.cpp keeps pointers to these arrays, so they must live as long as the model.
        if devices is not None:
            self._devices = device_list(devices)
            parameters.devices = ctypes.addressof(self._devices)
        if split:
            self._split = (ctypes.c_float * lib.llama_max_devices())(*split)
            parameters.tensor_split = self._split
        if overrides or repacked:
            types = buffer_types()
            unknown = next((name for _, name in overrides if name not in types), None)
            if unknown is not None:
                raise UsageError(
                    f"there is no buffer type {safe_line(unknown, 60)}",
                    remedy=f"use one of: {', '.join(types)}",
                )
            pairs: list[tuple[str, int | None]] = [(pattern, types[name]) for pattern, name in overrides]
            pairs += [(pattern, repack_buffer()) for pattern in repacked]
            self._patterns = (_BufferOverride * (len(pairs) + 1))(
                *(_BufferOverride(os.fsencode(pattern), buffer_type) for pattern, buffer_type in pairs)
            )
            parameters.tensor_buft_overrides = ctypes.addressof(self._patterns)

    def _override_active_experts(self, parameters: Any, architecture: str, count: int) -> None:  # noqa: ANN401
        # The list ends with an empty key.
        self._overrides: Any = (lib.llama_model_kv_override * 2)()
        self._overrides[0].key = f"{architecture}.expert_used_count".encode()
        self._overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
        value: Any = self._overrides[0].value
        value.val_i64 = count
        parameters.kv_overrides = self._overrides

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        """Return the token ids of UTF-8 `text`, without BOS and EOS.

        With `special`, the texts of special tokens become those tokens. llama.cpp recurses for each letter of
        a word, so the calling thread needs a large stack. Raises NativeError.
        """
        capacity = len(text) + 16
        ids = (lib.llama_token * capacity)()
        count = lib.llama_tokenize(self.vocabulary, text, len(text), ids, capacity, False, special)
        if count < 0:
            raise NativeError("llama.cpp cannot tokenize the text", where=last_error())
        return ids[:count]

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of a token, which may be a part of a character; b"" for a control token."""
        known = self._pieces.get(token_id)
        if known is None:
            known = self._pieces[token_id] = self._read_piece(token_id, special=False)
        return known

    def text_of(self, token_id: int) -> str:
        """Return the text of a token, also of a control token; "" for -1, llama.cpp's LLAMA_TOKEN_NULL."""
        return "" if token_id < 0 else self._read_piece(token_id, special=True).decode("utf-8", "replace")

    def text_of_all(self, token_ids: Sequence[int]) -> str:
        """Return the text of a sequence of tokens. An incomplete character becomes U+FFFD."""
        pieces = (self._read_piece(token_id, special=True) for token_id in token_ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def _read_piece(self, token_id: int, *, special: bool) -> bytes:
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            count = lib.llama_token_to_piece(self.vocabulary, token_id, buffer, capacity, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            capacity = -count

    def ends(self, token_id: int) -> bool:
        """Return True if the token ends a reply, such as EOS and EOT."""
        return bool(lib.llama_vocab_is_eog(self.vocabulary, token_id))

    def special_texts(self) -> frozenset[str]:
        """Return the texts that `tokenize(..., special=True)` turns into special tokens."""
        wanted = (
            lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        )
        ids = (i for i in range(self.n_vocab) if lib.llama_vocab_get_attr(self.vocabulary, i) & wanted)
        return frozenset(text for text in map(self.text_of, ids) if text)

    @property
    def has_plain_cache(self) -> bool:
        """True if all positions of a sequence stay in the KV cache, so that parts can be saved and moved."""
        return self.rewindable and not self.n_window

    def close(self) -> None:
        """Free the weights. All contexts must be closed first."""
        if self.handle:
            lib.llama_model_free(self.handle)
            self.handle = None
