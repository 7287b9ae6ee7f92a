"""Chooses how many requests to decode at once, and whether they share one KV cache. Loads nothing.

More requests at once are faster, as long as the cache fits. Per-sequence KV caches decode faster than a
shared one, in which every sequence attends to all cells, but each of them must hold the longest request.
`benchmarks/engine.py` measures both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsmoe_local.engine.load.machine import available_memory
from dsmoe_local.engine.prompts.choice import added_bytes, template_of
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.cost import kv_bytes_per_token
from dsmoe_local.model.gguf_model import loaded_tensors, read_any_model
from dsmoe_local.model.hyperparameters import ModelOutline

MAX_PARALLEL = 32  # more are not faster on a CPU, see docs/performance.md
DETERMINISTIC_PARALLEL = 4
"""The most for which `kernels.check_deterministic` holds with every model."""
_STEP = 256  # cells; llama.cpp pads a sequence's cache to a multiple of this
_OVERHEAD = 64  # tokens that are not counted, such as BOS or the date in a template


@dataclass(frozen=True, slots=True)
class Workload:
    """`n_sequences` replies to generate.

    `n_longest` is an upper bound of the tokens of one prompt and reply (None: as long as the context allows).
    `n_total` is an estimate of the tokens of all of them, with common prefixes counted once. Neither includes
    the text that a chat template adds. `n_messages` is the number of messages in the longest conversation.
    """

    n_sequences: int
    n_longest: int | None
    n_total: int
    n_messages: int = 0


@dataclass(frozen=True, slots=True)
class Parallel:
    """Decode `n_parallel` requests at once, with `n_context` tokens of KV cache in total."""

    n_parallel: int
    unified: bool
    n_context: int


def choose_parallel(
    options: ModelOptions, workload: Workload, n_parallel: int | None = None, *, n_engines: int = 1
) -> ModelOptions:
    """Return `options` with n_parallel, unified and n_context chosen for this machine and workload.

    `n_parallel`, and the context length in `options`, are kept if they are given. `n_engines` engines share
    the memory of this machine. Reads the model's header, and raises the same errors about it as
    `Engine.load`.
    """
    file, outline = read_any_model(options.path)
    weights = sum(tensor.n_bytes for tensor in loaded_tensors(file, outline))
    available = _cache_tokens(options, outline, weights, n_engines)
    stated = options.n_context is not None
    longest = _longest(workload, template_of(options, file, outline))
    if options.deterministic:
        # Replies depend on n_parallel, so it must not depend on the remaining work or the free memory.
        width = n_parallel or DETERMINISTIC_PARALLEL
        share = max(_STEP, available // width // _STEP * _STEP)
        cells = min(_cells_each(None if stated else longest, outline.n_context), share)
        return replace(options, n_parallel=width, unified=False, n_context=width * cells)
    workload = replace(workload, n_longest=longest)
    least, most = n_parallel or 1, n_parallel or min(MAX_PARALLEL, max(1, workload.n_sequences))
    chosen = arrange(
        workload, least=least, most=most, available=available, n_trained=outline.n_context, stated=stated
    )
    return replace(options, n_parallel=chosen.n_parallel, unified=chosen.unified, n_context=chosen.n_context)


def arrange(
    workload: Workload, *, least: int, most: int, available: int, n_trained: int, stated: bool = False
) -> Parallel:
    """Choose between per-sequence caches and a shared one, for `least` to `most` sequences.

    `available` is the largest number of tokens of KV cache. If `stated`, the user requested that number, so
    the cache is made as large, up to a full context for each sequence. Per-sequence caches are chosen if at
    least three quarters as many sequences fit as with a shared one.
    """
    each = _cells_each(workload.n_longest, n_trained)
    n_separate = min(most, available // each)
    mean = max(1, -(-workload.n_total // max(1, workload.n_sequences)))
    n_shared = max(least, min(most, available // mean))
    if n_separate >= least and n_separate * 4 >= n_shared * 3:
        if stated:
            each = max(each, min(_cells_each(None, n_trained), available // n_separate // _STEP * _STEP))
        return Parallel(n_separate, n_separate == 1, n_separate * each)
    # Twice what all sequences need on average, since some are longer, and at least what the longest needs.
    cells = available if stated else max(each, min(available, 2 * n_shared * mean))
    return Parallel(n_shared, True, min(available, -(-cells // _STEP) * _STEP))


def _longest(workload: Workload, template: tuple[str, str] | None) -> int | None:
    """Return the largest number of tokens of a request, including the text that the template adds."""
    if workload.n_longest is None:
        return None
    once, each = added_bytes(template[0]) if template and workload.n_messages else (0, 0)
    return workload.n_longest + _OVERHEAD + once + each * workload.n_messages


def _cells_each(n_longest: int | None, n_trained: int) -> int:
    """Return the cells for the longest request. `n_longest` None: as many as the model was trained for."""
    longest = n_trained if n_longest is None else min(n_trained, n_longest)
    return -(-longest // _STEP) * _STEP


def _cache_tokens(options: ModelOptions, outline: ModelOutline, weights: int, n_engines: int) -> int:
    """Return how many tokens of KV cache to use.

    It is the requested context, or half of what fits beside the weights in an engine's share of the memory,
    but at least one full context. The engine reduces it if it does not fit.
    """
    if options.n_context is not None:
        return options.n_context
    per_token = kv_bytes_per_token(outline, options.cache_type_k, options.cache_type_v)
    # Recurrent models have no KV cache.
    half = max(0, available_memory() // n_engines - weights) // 2 // max(1, per_token)
    return max(outline.n_context, min(half, MAX_PARALLEL * outline.n_context))
