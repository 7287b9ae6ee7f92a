"""Plans the memory before a model is loaded: the context length, and whether to page the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine.errors import OutOfMemoryError

SMALLEST_CONTEXT = 512
_COMFORTABLE_CONTEXT = 2048  # below this the weights are paged from disk to make room for a longer context
_STEP = 256  # llama.cpp pads the context of a sequence to a multiple of this
_SPARED = 32  # one part in 32 is left to the rest of the system
PROCESS_BYTES = 96 << 20  # Python, the tokenizer's tables, one row of logits


@dataclass(frozen=True, slots=True)
class ContextRequest:
    """The requested context: `n_context` tokens in total, or None for `n_trained` tokens per sequence.

    The sequences share one KV cache if `unified`. Otherwise each has an equal part of it.
    """

    n_context: int | None
    n_trained: int
    n_sequences: int = 1
    unified: bool = True

    @property
    def n_wanted(self) -> int:
        """Tokens of the whole cache, if memory allows it."""
        return self.n_context or self.n_trained * self.n_sequences

    @property
    def n_parts(self) -> int:
        """Parts of the cache that are padded separately."""
        return 1 if self.unified else self.n_sequences


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The context that fits. If `paged`, the weights exceed the memory and are paged from disk.

    `notes` are for the user.
    """

    n_context: int
    paged: bool
    notes: tuple[str, ...]


def plan_memory(
    request: ContextRequest, buffer_size: Callable[[int], int], *, weights: int, available: int
) -> MemoryPlan:
    """Choose the context for `weights` bytes of model and `available` bytes of memory.

    `buffer_size` returns the bytes of KV cache and buffers for a context length. If no length is requested,
    the longest context that fits beside the weights is chosen. If a requested length does not fit beside the
    weights but fits without them, the weights are paged. Raises OutOfMemoryError if no context fits.
    """
    budget = (available - PROCESS_BYTES) // _SPARED * (_SPARED - 1)
    wanted, is_requested = request.n_wanted, request.n_context is not None
    step = _STEP * request.n_parts

    def largest(budget: int) -> int:
        return _largest_context(buffer_size, budget, wanted, step)

    n_context = largest(budget - weights)
    paged = n_context < min(wanted, _COMFORTABLE_CONTEXT * request.n_parts)
    if is_requested and n_context < wanted:
        paged = paged or largest(budget) == wanted
    if paged:
        # Buffers cannot be paged. Half of the memory is left to the weights unless the user asked for more.
        n_context = largest(budget if is_requested else budget // 2)
    smallest = min(SMALLEST_CONTEXT, wanted)
    if n_context < smallest:
        least = max(smallest, step)
        needed = format_size(buffer_size(least) + PROCESS_BYTES)
        raise OutOfMemoryError(
            f"a context of {least} tokens needs {needed} of memory, {format_size(available)} are available",
            remedy="close other programs, or use a smaller KV type: -ctk q8_0 -ctv q8_0",
        )
    notes = _context_notes(request, buffer_size, n_context, available)
    if paged:
        notes.append(paging_note(weights, buffer_size(n_context), available))
    return MemoryPlan(n_context, paged, tuple(notes))


def _largest_context(buffer_size: Callable[[int], int], budget: int, wanted: int, step: int) -> int:
    """Return `wanted` if it fits into `budget` bytes, else the largest multiple of `step` that does, or 0.

    Each call of `buffer_size` takes milliseconds. Sizes are nearly linear, so interpolation needs few calls.
    """
    if budget <= 0:
        return 0
    high_size = buffer_size(wanted)
    if high_size <= budget:
        return wanted
    low_size = buffer_size(step)
    if low_size > budget:
        return 0
    low, high = 1, -(-wanted // step)  # in steps: `low` fits, `high` does not
    attempt = 0
    while high - low > 1:
        attempt += 1
        guess = low + (high - low) * (budget - low_size) // max(1, high_size - low_size)
        # Bisect every third time, in case the sizes are not linear.
        guess = (low + high) // 2 if attempt % 3 == 0 else min(max(guess, low + 1), high - 1)
        size = buffer_size(guess * step)
        if size <= budget:
            low, low_size = guess, size
        else:
            high, high_size = guess, size
    return low * step


def _context_notes(
    request: ContextRequest, buffer_size: Callable[[int], int], n_context: int, available: int
) -> list[str]:
    wanted = request.n_wanted
    if request.n_context is None:
        # By default the user expects a full context for one sequence, not for all at once.
        if n_context // request.n_parts >= request.n_trained:
            return []
        wanted = request.n_trained if request.unified else wanted
    if n_context >= wanted:
        return []
    needed, memory = format_size(buffer_size(wanted)), format_size(available)
    note = (
        f"context reduced from {wanted} to {n_context} tokens, the most that fit: {wanted} need {needed}, "
        f"{memory} of memory are available"
    )
    return [note]


def paging_note(weights: int, buffers: int, available: int) -> str:
    """Return the note that `weights` and `buffers`, in bytes, exceed the `available` memory."""
    return (
        f"the weights ({format_size(weights)}) and buffers ({format_size(buffers)}) exceed the available "
        f"memory ({format_size(available)}): the weights are paged from disk, which is slow"
    )
