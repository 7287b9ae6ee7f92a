"""The only module that imports llama_cpp: owns every native handle, and the callbacks that native code holds.

Thin and typed: a model with its vocabulary, a context with one sequence, a sampler chain, and the log, which
goes into a ring instead of onto the screen. No policy: what to load, decode or sample is decided above.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as lib  # noqa: TID251

from dsmoe_local.base.errors import InterruptedRunError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import ModelLoadError, NativeError
from dsmoe_local.engine.types import SamplingParameters

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
FLASH_ATTENTION = {
    "auto": lib.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "off": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "on": lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}
DECODED, NO_SLOT, ABORTED = 0, 1, 2  # what `Context.decode` returns

# ggml.h's levels; the bindings' comment lists an older set.
_LOG_DEBUG, _LOG_ERROR, _LOG_CONTINUED = 1, 4, 5
_DEVICE_GPU, _DEVICE_INTEGRATED_GPU = 1, 2

_log: deque[tuple[int, str]] = deque(maxlen=400)


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _: object) -> None:
    line = text.decode("utf-8", "replace")
    if level == _LOG_CONTINUED and _log:
        previous, start = _log.pop()
        _log.append((previous, start + line))
    elif level != _LOG_DEBUG:
        _log.append((level, line))


lib.llama_log_set(_keep_log, None)
lib.llama_backend_init()


def log_lines() -> tuple[str, ...]:
    """llama.cpp's last few hundred log lines, made safe to print."""
    return tuple(safe_line(line.rstrip()) for _, line in list(_log))


def last_error() -> str:
    """The first error of the log's latest run of errors: the cause; what follows it only repeats that it
    failed.
    """
    errors: list[str] = []
    for level, line in reversed(list(_log)):
        if level == _LOG_ERROR and line.strip():
            errors.append(safe_line(line.strip(), 110))
        elif errors:
            break
    return errors[-1] if errors else ""


def gpu_names() -> tuple[str, ...]:
    """The GPU devices that this build of llama.cpp sees."""
    count = _backend("ggml_backend_dev_count", ctypes.c_size_t)
    get = _backend("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    name = _backend("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    kind = _backend("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    devices = [get(index) for index in range(count())]
    gpus = [device for device in devices if kind(device) in (_DEVICE_GPU, _DEVICE_INTEGRATED_GPU)]
    return tuple(name(device).decode("utf-8", "replace") for device in gpus)


def _backend(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:  # noqa: ANN401 - ctypes types
    # Through llama_cpp's own handle: the wheel's other copies of libggml have registries of their own.
    function = lib._lib[name]
    function.restype, function.argtypes = result, list(arguments)
    return function  # type: ignore[no-any-return]


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
        # Again: whoever else uses llama_cpp in this process may have set it since.
        lib.llama_log_set(_keep_log, None)
        _log.clear()
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


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """Sizes and modes of a context; the strings are keys of CACHE_TYPES and FLASH_ATTENTION."""

    n_context: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    n_threads_batch: int
    flash_attention: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"


class Context:
    """The KV cache and compute buffers of one sequence. One thread at a time, but `abort` from any."""

    def __init__(self, model: Model, options: ContextOptions) -> None:
        """Raises ModelLoadError with llama.cpp's own reason."""
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = options.n_context
        parameters.n_batch = options.n_batch
        parameters.n_ubatch = options.n_ubatch
        parameters.n_seq_max = 1
        # One row of logits per step at most: the buffer for a whole ubatch of them would be 200 MB at 16B.
        parameters.n_outputs_max = 1
        parameters.n_threads = options.n_threads
        parameters.n_threads_batch = options.n_threads_batch
        parameters.flash_attn_type = FLASH_ATTENTION[options.flash_attention]
        parameters.type_k = CACHE_TYPES[options.cache_type_k]
        parameters.type_v = CACHE_TYPES[options.cache_type_v]
        # strlen as the callback: true while the buffer holds a byte. It costs no GIL, unlike a Python
        # function.
        self._abort = ctypes.create_string_buffer(2)
        self._strlen = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        parameters.abort_callback = self._strlen
        parameters.abort_callback_data = ctypes.addressof(self._abort)
        self.model = model
        _log.clear()
        self.handle = lib.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise ModelLoadError("llama.cpp cannot make a context for the model", where=last_error())
        self.n_batch: int = lib.llama_n_batch(self.handle)
        self.n_ubatch: int = lib.llama_n_ubatch(self.handle)
        self._memory = lib.llama_get_memory(self.handle)
        self._make_batch(self.n_batch)

    def _make_batch(self, room: int) -> None:
        """A llama_batch over numpy memory, filled by slices; never pass it to llama_batch_free."""
        self._tokens = np.zeros(room, np.int32)
        self._positions = np.zeros(room, np.int32)
        self._outputs = np.zeros(room, np.int8)
        self._n_sequences = np.ones(room, np.int32)
        self._sequence = np.zeros(1, np.int32)
        self._sequences = np.full(room, self._sequence.ctypes.data, np.uint64)
        self._batch = lib.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(lib.llama_token)),
            pos=self._positions.ctypes.data_as(ctypes.POINTER(lib.llama_pos)),
            n_seq_id=self._n_sequences.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._sequences.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(lib.llama_seq_id))),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def decode(self, token_ids: Sequence[int], position: int, *, logits: bool) -> int:
        """Run `token_ids` (at most n_batch) at `position` and up; `logits` of the last one if wanted.

        Returns DECODED, NO_SLOT (nothing changed) or ABORTED (`n_cached` says what stayed). Raises
        NativeError.
        """
        count = len(token_ids)
        self._tokens[:count] = token_ids
        self._positions[:count] = np.arange(position, position + count, dtype=np.int32)
        self._outputs[:count] = 0
        self._outputs[count - 1] = logits
        self._batch.n_tokens = count
        status: int = lib.llama_decode(self.handle, self._batch)
        if status not in (DECODED, NO_SLOT, ABORTED):
            raise NativeError(f"llama.cpp cannot decode (status {status})", where=last_error())
        return status

    def logits(self) -> npt.NDArray[np.float32]:
        """The last step's logits, shape (n_vocab,): a view that the next `decode` overwrites."""
        pointer = lib.llama_get_logits_ith(self.handle, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,))

    @property
    def n_cached(self) -> int:
        """How many positions the KV cache holds."""
        last: int = lib.llama_memory_seq_pos_max(self._memory, 0)
        return last + 1

    def forget(self, position: int) -> None:
        """Drop the KV cache from `position` on."""
        lib.llama_memory_seq_rm(self._memory, 0, position, -1)

    def abort(self) -> None:
        """Make the running and every later `decode` return ABORTED, within a graph node on a CPU."""
        self._abort[0] = b"\x01"

    def clear_abort(self) -> None:
        """Let `decode` run again."""
        self._abort[0] = b"\x00"

    def close(self) -> None:
        """Free the cache and buffers."""
        if self.handle:
            lib.llama_free(self.handle)
            self.handle = None


class Sampler:
    """One request's sampler chain, in llama.cpp's own order."""

    def __init__(self, context: Context, parameters: SamplingParameters, seed: int) -> None:
        self._context = context
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for stage in self._stages(parameters, seed):
            lib.llama_sampler_chain_add(self._chain, stage)

    def _stages(self, p: SamplingParameters, seed: int) -> Iterable[Any]:
        yield lib.llama_sampler_init_penalties(
            self._context.model.n_vocab,
            p.repeat_last_n,
            p.repeat_penalty,
            p.frequency_penalty,
            p.presence_penalty,
        )
        if p.temperature <= 0:
            yield lib.llama_sampler_init_greedy()
            return
        yield lib.llama_sampler_init_top_k(p.top_k)
        yield lib.llama_sampler_init_typical(p.typical_p, 1)
        yield lib.llama_sampler_init_top_p(p.top_p, 1)
        yield lib.llama_sampler_init_min_p(p.min_p, 1)
        yield lib.llama_sampler_init_temp(p.temperature)
        yield lib.llama_sampler_init_dist(seed)

    def accept(self, token_ids: Iterable[int]) -> None:
        """Let the penalties know tokens that were not sampled here."""
        for token_id in token_ids:
            lib.llama_sampler_accept(self._chain, token_id)

    def sample(self) -> int:
        """Choose from the last step's logits; the choice is accepted."""
        token_id: int = lib.llama_sampler_sample(self._chain, self._context.handle, -1)
        return token_id

    def close(self) -> None:
        """Free the chain and its samplers."""
        if self._chain:
            lib.llama_sampler_free(self._chain)
            self._chain = None


def check_modes(cache_type_k: str, cache_type_v: str, flash_attention: str) -> None:
    """UsageError for modes that llama.cpp does not know, or would refuse late."""
    for flag, value in (("-ctk", cache_type_k), ("-ctv", cache_type_v)):
        if value not in CACHE_TYPES:
            raise UsageError(
                f"{flag} {safe_line(value)} is not a KV type", remedy=f"it takes {', '.join(CACHE_TYPES)}"
            )
    if flash_attention not in FLASH_ATTENTION:
        raise UsageError(f"-fa {safe_line(flash_attention)}: it takes {', '.join(FLASH_ATTENTION)}")
    if flash_attention == "off" and cache_type_v not in ("f32", "f16", "bf16"):
        raise UsageError(
            "a quantized V cache needs flash attention", remedy="leave out -fa off, or use -ctv f16"
        )
