"""A model in native memory: weights and vocabulary, and the call that loads them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import ModelLoadError, NativeError
from dsmoe_local.engine.native.library import clear_log, keep_log, last_error, lib


class Model:
    """Weights and vocabulary. Every method may be called from any thread until `close`."""

    def __init__(
        self,
        path: Path,
        *,
        n_gpu_layers: int = 0,
        repack: bool = True,
        n_experts_per_token: int | None = None,
        architecture: str = "deepseek",
        progress: Callable[[float], bool] | None = None,
        measure_only: bool = False,
    ) -> None:
        """Load `path`. `progress` hears fractions from 0 to 1; returning False gives up
        (InterruptedRunError).

        `measure_only` reads no weights and allocates nothing: contexts made from it only log their sizes.
        Raises ModelLoadError with llama.cpp's own reason.
        """
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = n_gpu_layers
        parameters.use_extra_bufts = repack
        parameters.load_mode = lib.LLAMA_LOAD_MODE_MMAP
        if measure_only:
            parameters.no_alloc = True
            parameters.load_mode = lib.LLAMA_LOAD_MODE_NONE
        if n_experts_per_token is not None:
            # The list ends with an empty key.
            self._overrides: Any = (lib.llama_model_kv_override * 2)()
            self._overrides[0].key = f"{architecture}.expert_used_count".encode()
            self._overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
            value: Any = self._overrides[0].value
            value.val_i64 = n_experts_per_token
            parameters.kv_overrides = self._overrides
        given_up = False

        def report(fraction: float, _: object) -> bool:
            nonlocal given_up
            given_up = given_up or (progress is not None and not progress(fraction))
            return not given_up

        self._progress = lib.llama_progress_callback(report)
        parameters.progress_callback = self._progress
        keep_log()
        clear_log()
        self.handle = lib.llama_model_load_from_file(bytes(path), parameters)
        if not self.handle:
            if given_up:
                raise InterruptedRunError("loading was interrupted")
            raise ModelLoadError(f"llama.cpp cannot load {safe_line(path.name)}", where=last_error())
        self.vocabulary = lib.llama_model_get_vocab(self.handle)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocabulary)
        self.n_context_trained: int = lib.llama_model_n_ctx_train(self.handle)
        self.n_parameters: int = lib.llama_model_n_params(self.handle)
        self.n_bytes: int = lib.llama_model_size(self.handle)
        self.bos: int = lib.llama_vocab_bos(self.vocabulary)
        self.eos: int = lib.llama_vocab_eos(self.vocabulary)
        self.adds_bos: bool = lib.llama_vocab_get_add_bos(self.vocabulary)
        self._pieces: dict[int, bytes] = {}

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        """Token ids of UTF-8 `text`, without BOS or EOS. `special`: text of special tokens becomes those
        tokens.

        Recursive over unbroken runs: call it where the stack is large.
        """
        room = len(text) + 16
        ids = (lib.llama_token * room)()
        count = lib.llama_tokenize(self.vocabulary, text, len(text), ids, room, False, special)
        if count < 0:
            raise NativeError("llama.cpp cannot tokenize the text", where=last_error())
        return ids[:count]

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; none for a control token. May be half a character."""
        known = self._pieces.get(token_id)
        if known is None:
            known = self._pieces[token_id] = self._read_piece(token_id, special=False)
        return known

    def text_of(self, token_id: int) -> str:
        """A token's own text, also of control tokens; "" for ids that are none (llama.cpp's -1)."""
        return "" if token_id < 0 else self._read_piece(token_id, special=True).decode("utf-8", "replace")

    def _read_piece(self, token_id: int, *, special: bool) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = lib.llama_token_to_piece(self.vocabulary, token_id, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def ends(self, token_id: int) -> bool:
        """Whether the token ends a reply (EOS, EOT and their like)."""
        return bool(lib.llama_vocab_is_eog(self.vocabulary, token_id))

    def special_texts(self) -> frozenset[str]:
        """The texts that become special tokens when `tokenize(special=True)` meets them."""
        wanted = (
            lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        )
        ids = (i for i in range(self.n_vocab) if lib.llama_vocab_get_attr(self.vocabulary, i) & wanted)
        return frozenset(text for text in map(self.text_of, ids) if text)

    def close(self) -> None:
        """Free the weights. Contexts must be closed before."""
        if self.handle:
            lib.llama_model_free(self.handle)
            self.handle = None
