"""Chooses how many requests to decode at once, and whether they share one pool of cells. Loads nothing.

More at once is faster until the cache no longer fits. Per-sequence KV caches decode faster than a
shared pool, in which every sequence attends over all cells; but each of them must hold the longest request.
`benchmarks/engine.py` measures both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsmoe_local.engine.load.machine import available_memory
from dsmoe_local.engine.load.memory import BufferOptions, buffer_bytes, plan_memory
from dsmoe_local.engine.prompts.choice import added_bytes, template_of
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import Hyperparameters

MOST_PARALLEL = 32  # twice as many gain nothing on processors, see docs/performance.md
DETERMINISTIC_PARALLEL = 8
_STEP = 256  # cells; llama.cpp pads a sequence's cache to a multiple of this
_OVERHEAD = 64  # tokens that nobody counts: BOS, the date in a template


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be answered: `n_sequences` replies. With its prompt the longest takes at most `n_longest`
    tokens (None: as long as the context allows), all of them about `n_total`, equal beginnings counted once.

    `n_messages`: of the longest conversation; what a template adds to it is not counted. 0: there is none.
    """

    n_sequences: int
    n_longest: int | None
    n_total: int
    n_messages: int = 0


@dataclass(frozen=True, slots=True)
class Parallel:
    """How to decode: `n_parallel` at once over `n_context` cells in all."""

    n_parallel: int
    unified: bool
    n_context: int


def choose_parallel(options: ModelOptions, workload: Workload, n_parallel: int | None = None) -> ModelOptions:
    """`options` with n_parallel, unified and n_context chosen for this machine; what they state is kept.

    `n_parallel`: a person's own choice. Reads the model's header: raises what `Engine.load` would of it.
    """
    file, hp = read_model(options.path)
    room = _room(options, hp, weights=sum(tensor.n_bytes for tensor in file.tensors.values()))
    stated = options.n_context is not None
    longest = _longest(workload, template_of(options, file, hp))
    if options.deterministic:
        # The width is part of what a reply depends on: it must not follow what is left to do, or the memory.
        width = n_parallel or DETERMINISTIC_PARALLEL
        share = max(_STEP, room // width // _STEP * _STEP)
        cells = min(_cells_each(None if stated else longest, hp.n_context), share)
        return replace(options, n_parallel=width, unified=False, n_context=width * cells)
    workload = replace(workload, n_longest=longest)
    least, most = n_parallel or 1, n_parallel or min(MOST_PARALLEL, max(1, workload.n_sequences))
    chosen = arrange(workload, least=least, most=most, room=room, n_trained=hp.n_context, stated=stated)
    return replace(options, n_parallel=chosen.n_parallel, unified=chosen.unified, n_context=chosen.n_context)


def arrange(
    workload: Workload, *, least: int, most: int, room: int, n_trained: int, stated: bool = False
) -> Parallel:
    """Choose between per-sequence caches and a pool, for `least` to `most` sequences.

    `room`: tokens of cache. `stated`: the user asked for that room, so as much as the model can use is used.
    """
    each = _cells_each(workload.n_longest, n_trained)
    n_separate = min(most, room // each)
    mean = max(1, -(-workload.n_total // max(1, workload.n_sequences)))
    n_pooled = max(least, min(most, room // mean))
    if n_separate >= least and n_separate * 4 >= n_pooled * 3:
        if stated:
            each = max(each, min(_cells_each(None, n_trained), room // n_separate // _STEP * _STEP))
        return Parallel(n_separate, n_separate == 1, n_separate * each)
    # What all need together, twice over for those that are longer than most; never less than one needs.
    cells = room if stated else max(each, min(room, 2 * n_pooled * mean))
    return Parallel(n_pooled, True, min(room, -(-cells // _STEP) * _STEP))


def _longest(workload: Workload, template: tuple[str, str] | None) -> int | None:
    """The most tokens that a request takes, with all that is put around its texts."""
    if workload.n_longest is None:
        return None
    once, each = added_bytes(template[0]) if template and workload.n_messages else (0, 0)
    return workload.n_longest + _OVERHEAD + once + each * workload.n_messages


def _cells_each(n_longest: int | None, n_trained: int) -> int:
    """The cells that the longest request needs; None: all that the model can use."""
    longest = n_trained if n_longest is None else min(n_trained, n_longest)
    return -(-longest // _STEP) * _STEP


def _room(options: ModelOptions, hp: Hyperparameters, *, weights: int) -> int:
    """Tokens of cache that fit: half of what is left beside the weights, or what was asked for."""
    if options.n_context is not None:
        return options.n_context
    buffers = BufferOptions(
        n_ubatch=min(options.n_ubatch, options.n_batch),
        flash_attention=options.flash_attention != "off",
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
        n_sequences=MOST_PARALLEL,
        n_outputs=MOST_PARALLEL,
    )
    available = available_memory()
    fits = plan_memory(hp, buffers, weights=weights, available=available, requested=None).n_context
    least = min(fits, hp.n_context)
    half = max(0, available - weights) // 2
    while fits > least and buffer_bytes(hp, buffers, fits) > half:
        fits = max(least, fits // 2)
    return fits
