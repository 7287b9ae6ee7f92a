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
_PROCESS = 96 << 20  # Python, the tokenizer's tables, one row of logits


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
    """What buffer sizes depend on, besides the model and the context."""

    n_ubatch: int
    flash_attention: bool
    cache_type_k: str
    cache_type_v: str


def buffer_bytes(hp: Hyperparameters, options: BufferOptions, n_context: int) -> int:
    """KV cache (exact) and compute buffers (an upper bound) of one sequence, in bytes."""
    cells = -(-n_context // _STEP) * _STEP
    per_cell = sum(
        row_bytes(parse_type(word), hp.kv_size) for word in (options.cache_type_k, options.cache_type_v)
    )
    return hp.n_layers * cells * per_cell + _compute_bytes(hp, options, cells)


def _compute_bytes(hp: Hyperparameters, options: BufferOptions, cells: int) -> int:
    # Live activations of one layer in f32, and the attention mask; a test holds the bound to llama.cpp's log.
    routed = hp.n_experts_per_token * (3 * hp.expert_size + 2 * hp.hidden_size)
    widths = 8 * hp.hidden_size + 4 * hp.attention_size + 3 * max(hp.ffn_size, hp.shared_size) + routed
    scores = 6 if options.flash_attention else 6 + 8 * hp.n_heads
    n_tokens = min(options.n_ubatch, cells)
    return n_tokens * (4 * widths + scores * cells) + 4 * hp.n_vocab + (1 << 20)


def plan_memory(
    hp: Hyperparameters, options: BufferOptions, *, weights: int, available: int, requested: int | None
) -> MemoryPlan:
    """Choose the context for `weights` bytes of model and `available` bytes of memory.

    Without a request: the model's own context, or what fits beside the weights. A request is granted, with
    the weights paged if need be, unless the buffers alone exceed the memory. OutOfMemoryError when nothing
    fits.
    """
    budget = available - _PROCESS
    wanted = requested or hp.n_context
    smallest = min(SMALLEST_CONTEXT, wanted)

    def largest(room: int) -> int:
        if buffer_bytes(hp, options, wanted) <= room:
            return wanted
        low, high = 0, wanted // _STEP
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if buffer_bytes(hp, options, middle * _STEP) <= room else (low, middle - 1)
            )
        return low * _STEP

    n_context = largest(budget - weights)
    paged = n_context < (min(wanted, _COMFORTABLE_CONTEXT) if requested is None else wanted)
    if paged:
        # Buffers cannot be paged out, weights can; half is left to the weights unless a person asked for
        # more.
        n_context = largest(budget if requested else budget // 2)
    if n_context < smallest:
        needed = format_size(buffer_bytes(hp, options, smallest) + _PROCESS)
        raise OutOfMemoryError(
            f"{needed} are needed for a context of {smallest} tokens, {format_size(available)} available",
            remedy="close other programs, or use a smaller KV type: -ctk q8_0 -ctv q8_0",
        )
    return MemoryPlan(
        n_context, paged, tuple(_notes(hp, options, n_context, wanted, weights, available, paged))
    )


def _notes(
    hp: Hyperparameters,
    options: BufferOptions,
    n_context: int,
    wanted: int,
    weights: int,
    available: int,
    paged: bool,
) -> list[str]:
    notes = []
    if n_context < wanted:
        needed = format_size(buffer_bytes(hp, options, wanted))
        notes.append(
            f"context reduced from {wanted} to {n_context} tokens: {wanted} need {needed}, "
            f"{format_size(available)} of memory are available"
        )
    if paged:
        notes.append(
            f"the weights ({format_size(weights)}) exceed the available memory ({format_size(available)}): "
            "they are paged from disk, which is slow"
        )
    return notes
