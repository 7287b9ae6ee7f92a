"""Decides, before anything is loaded, how much context fits into memory and whether the weights do.

Pure arithmetic on sizes; the figures of this machine come from `machine`, native code is not asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine.errors import OutOfMemoryError
from dsmoe_local.model.ggml import parse_type, row_bytes
from dsmoe_local.model.hyperparameters import Hyperparameters

SMALLEST_CONTEXT = 512
_COMFORTABLE_CONTEXT = 2048  # what is worth having before weights are paged for more
_STEP = 256  # llama.cpp pads a context to this
_SPARED = 32  # one part in so many is left to the rest of the system
PROCESS = 96 << 20  # Python, the tokenizer's tables, one row of logits


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """`paged`: the weights exceed what is available, so they stay mapped and unpacked. `notes` say what and
    why.
    """

    n_context: int
    paged: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BufferOptions:
    """What buffer sizes depend on, besides the model and the context.

    `n_outputs` rows of logits are kept of a step. The cache is one pool if `unified`, else `n_sequences`
    equal shares.
    """

    n_ubatch: int
    flash_attention: bool
    cache_type_k: str
    cache_type_v: str
    n_sequences: int = 1
    unified: bool = True
    n_outputs: int = 1

    @property
    def n_streams(self) -> int:
        """Parts of the cache that no sequence shares with another."""
        return 1 if self.unified else self.n_sequences

    def share(self, n_context: int) -> int:
        """The cells of one part: llama.cpp pads each."""
        return -(-(n_context // self.n_streams) // _STEP) * _STEP


def buffer_bytes(hp: Hyperparameters, options: BufferOptions, n_context: int) -> int:
    """KV cache (exact) and compute buffers (an upper bound), in bytes."""
    return hp.n_layers * layer_cache_bytes(hp, options, n_context) + compute_bytes(hp, options, n_context)


def layer_cache_bytes(hp: Hyperparameters, options: BufferOptions, n_context: int) -> int:
    """One layer's part of the KV cache."""
    per_cell = sum(
        row_bytes(parse_type(word), hp.kv_size) for word in (options.cache_type_k, options.cache_type_v)
    )
    return options.n_streams * options.share(n_context) * per_cell


def compute_bytes(hp: Hyperparameters, options: BufferOptions, n_context: int) -> int:
    """An upper bound of the compute buffers; a test holds it to llama.cpp's log."""
    # Live activations of one layer in f32, the attention mask, and the logits with their copy.
    routed = hp.n_experts_per_token * (3 * hp.expert_size + 2 * hp.hidden_size)
    widths = 8 * hp.hidden_size + 4 * hp.attention_size + 3 * max(hp.ffn_size, hp.shared_size) + routed
    scores = 6 if options.flash_attention else 6 + 8 * hp.n_heads
    cells = options.share(n_context)
    n_tokens = min(options.n_ubatch, options.n_streams * cells)
    return n_tokens * (4 * widths + scores * cells) + 8 * options.n_outputs * hp.n_vocab + (1 << 20)


def plan_memory(
    hp: Hyperparameters, options: BufferOptions, *, weights: int, available: int, requested: int | None
) -> MemoryPlan:
    """Choose the context for `weights` bytes of model and `available` bytes of memory.

    Without a request: the model's own context for each sequence, or what fits beside the weights. A request
    is granted, with the weights paged if need be, unless the buffers alone exceed the memory.
    OutOfMemoryError when nothing fits.
    """
    budget = (available - PROCESS) // _SPARED * (_SPARED - 1)
    wanted = requested or hp.n_context * options.n_sequences
    step = _STEP * options.n_streams
    smallest = min(SMALLEST_CONTEXT, wanted)

    def largest(room: int) -> int:
        if buffer_bytes(hp, options, wanted) <= room:
            return wanted
        low, high = 0, wanted // step
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if buffer_bytes(hp, options, middle * step) <= room else (low, middle - 1)
            )
        return low * step

    n_context = largest(budget - weights)
    comfortable = min(wanted, _COMFORTABLE_CONTEXT * options.n_streams)
    paged = n_context < comfortable
    if requested is not None and n_context < wanted:
        # Paged weights make room for what a person asked for; not for a part of it.
        paged = paged or largest(budget) == wanted
    if paged:
        # Buffers cannot be paged out, weights can; half is left to the weights unless a person asked for
        # more.
        n_context = largest(budget if requested else budget // 2)
    if n_context < smallest:
        least = max(smallest, step)
        needed = format_size(buffer_bytes(hp, options, least) + PROCESS)
        raise OutOfMemoryError(
            f"{needed} are needed for a context of {least} tokens, {format_size(available)} available",
            remedy="close other programs, or use a smaller KV type: -ctk q8_0 -ctv q8_0",
        )
    notes = _context_notes(hp, options, n_context, wanted, available, requested is not None)
    if paged:
        notes.append(paging_note(weights, buffer_bytes(hp, options, n_context), available))
    return MemoryPlan(n_context, paged, tuple(notes))


def _context_notes(
    hp: Hyperparameters,
    options: BufferOptions,
    n_context: int,
    wanted: int,
    available: int,
    requested: bool,
) -> list[str]:
    # Unasked, sequences need not all be long at once: what one of them may use is what counts.
    if n_context >= wanted or not (requested or n_context // options.n_streams < hp.n_context):
        return []
    if not requested and options.unified:
        wanted = hp.n_context
    needed = format_size(buffer_bytes(hp, options, wanted))
    note = (
        f"context reduced from {wanted} to {n_context} tokens, the most that fit: {wanted} need {needed}, "
        f"{format_size(available)} of memory are available"
    )
    return [note]


def paging_note(weights: int, buffers: int, available: int) -> str:
    """What to tell of weights that exceed the memory beside the buffers."""
    return (
        f"the weights ({format_size(weights)}) and buffers ({format_size(buffers)}) exceed the available "
        f"memory ({format_size(available)}): the weights are paged from disk, which is slow"
    )
