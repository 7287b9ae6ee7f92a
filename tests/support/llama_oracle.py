"""llama.cpp itself, as an oracle: what it makes of a GGUF file. Through its C API, one model at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import llama_cpp  # noqa: TID251 - the oracle
import numpy as np
from numpy.typing import NDArray

_SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


@contextmanager
def loaded(path: Path, *, vocab_only: bool = False) -> Iterator[Any]:
    """A llama_model pointer for the file; AssertionError if llama.cpp refuses it."""
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = vocab_only
    # Without devices, since even with no layers there, a GPU would compute long prompts.
    devices = (ctypes.c_void_p * 1)()
    parameters.devices = ctypes.addressof(devices)
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"llama.cpp refuses {path}"
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def logits(
    path: Path, ids: Sequence[int], *, n_context: int = 256, handle: Any = None
) -> NDArray[np.float32]:
    """f32 logits of every position, shape (len(ids), n_vocab), with an f32 KV cache and one thread.

    `handle`: a model that is loaded already.
    """
    with loaded(path) if handle is None else nullcontext(handle) as model:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = n_context
        parameters.n_batch = parameters.n_ubatch = n_context
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(model, parameters)
        assert context
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for position, token in enumerate(ids):
                batch.token[position] = token
                batch.pos[position] = position
                batch.n_seq_id[position] = 1
                batch.seq_id[position][0] = 0
                batch.logits[position] = 1
            assert llama_cpp.llama_decode(context, batch) == 0
            n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            rows = [
                np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, position), (n_vocab,)).copy()
                for position in range(len(ids))
            ]
            return np.stack(rows)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return the log-probabilities of rows of logits."""
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    return result


def logprobs(path: Path, ids: Sequence[int]) -> NDArray[np.float64]:
    """Return the log-probabilities that each token but the last predicts, shape (len(ids) - 1, n_vocab)."""
    return log_softmax(logits(path, ids))[:-1]


class Vocabulary:
    """Tokenization of a file by llama.cpp."""

    def __init__(self, model: Any) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        raw = text.encode()
        buffer = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(
            self._vocab, raw, len(raw), buffer, len(buffer), add_special, parse_special
        )
        assert count >= 0
        return list(buffer[:count])

    def piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 256, 0, True)
        assert count >= 0
        return buffer.raw[:count]

    def ends(self) -> set[int]:
        """The tokens that end a reply."""
        n_tokens = llama_cpp.llama_vocab_n_tokens(self._vocab)
        return {token for token in range(n_tokens) if llama_cpp.llama_vocab_is_eog(self._vocab, token)}

    def special(self) -> dict[str, int | bool]:
        """BOS, EOS and whether BOS is added."""
        return {
            "bos": llama_cpp.llama_vocab_bos(self._vocab),
            "eos": llama_cpp.llama_vocab_eos(self._vocab),
            "add_bos": llama_cpp.llama_vocab_get_add_bos(self._vocab),
            "add_eos": llama_cpp.llama_vocab_get_add_eos(self._vocab),
        }


@contextmanager
def vocabulary(path: Path) -> Iterator[Vocabulary]:
    """The vocabulary of a file, without its weights."""
    with loaded(path, vocab_only=True) as model:
        yield Vocabulary(model)


def greedy(path: Path, prompt: Sequence[int], count: int, *, n_context: int = 256) -> list[int]:
    """`count` greedy tokens after `prompt`: the whole prompt in one step, then token by token.

    Two threads and llama.cpp's defaults, as a plain C program would do it. Ends early at an end-of-reply
    token, which is left out.
    """
    with loaded(path) as model:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = n_context
        parameters.n_threads = parameters.n_threads_batch = 2
        context = llama_cpp.llama_init_from_model(model, parameters)
        assert context
        vocab = llama_cpp.llama_model_get_vocab(model)
        n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        written: list[int] = []
        step = list(prompt)
        try:
            while len(written) < count:
                ids = (llama_cpp.llama_token * len(step))(*step)
                assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(step))) == 0
                row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (n_vocab,))
                best = int(row.argmax())
                if llama_cpp.llama_vocab_is_eog(vocab, best):
                    break
                written.append(best)
                step = [best]
        finally:
            llama_cpp.llama_free(context)
        return written
