"""Operations while no request is running: save and load the KV cache, replace observers.

`core` calls them in the engine's thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from dsmoe_local.base.paths import cache_folder
from dsmoe_local.base.sequences import n_common
from dsmoe_local.engine import native
from dsmoe_local.engine.cache_file import mapped_file, open_cache, write_cache
from dsmoe_local.engine.load.loaded_model import LoadedModel
from dsmoe_local.engine.observe.registry import n_outputs
from dsmoe_local.engine.schedule.cache_state import CacheState
from dsmoe_local.engine.types import ObserverOptions


def save_cache(loaded: LoadedModel, cache: CacheState, path: Path, token_ids: list[int], start: int) -> int:
    """See TextEngine. The file is not synced."""
    slot, end = cache.longest_idle(token_ids)
    spare = cache.spare_id()
    if end <= start or spare is None or not loaded.limits.unified:
        return 0
    try:
        with _set_aside(loaded.context, slot, spare, cache.cells.length(slot)):
            loaded.context.forget(slot, 0, start)
            loaded.context.forget(slot, end)
            try:
                identity = loaded.info.cache_identity
                written = write_cache(path, identity, token_ids[:end], start, loaded.context, slot)
            finally:
                loaded.context.forget(slot, 0)
        return end if written else 0
    except OSError:
        return 0


def load_cache(
    loaded: LoadedModel,
    cache: CacheState,
    apply_operations: Callable[[], None],
    path: Path,
    token_ids: list[int],
) -> int:
    """See TextEngine. `apply_operations` applies the pending operations of `cache` to llama.cpp's."""
    with open_cache(path, loaded.info.cache_identity) as stored:
        if stored is None:
            return 0
        common = n_common(stored.token_ids, token_ids)
        slot, held = cache.longest_idle(token_ids)
        if common <= held or held < stored.start:
            return held if common else 0
        place = cache.prepare_slot(len(stored.token_ids), slot if stored.start else None, stored.start)
        spare = cache.spare_id()
        if place is None or spare is None:
            return cache.longest_idle(token_ids)[1]
        apply_operations()
        context = loaded.context
        with _set_aside(context, place, spare, stored.start):
            context.forget(place, 0)
            read = context.read_state(stored.state, place)
            if not read or context.n_cached(place) != len(stored.token_ids):
                context.forget(place, 0)
                read = False
        if read:
            cache.add_loaded(place, stored.token_ids[stored.start :])
            cache.truncate(place, common)
            apply_operations()
        return cache.longest_idle(token_ids)[1]


@contextmanager
def _set_aside(context: native.Context, slot: int, spare: int, count: int) -> Iterator[None]:
    """Move the first `count` cells of a slot to a spare sequence id, and back when the block ends.

    Only the sequence ids of cells change; no data is copied.
    """
    context.copy(slot, spare, count)
    try:
        yield
    finally:
        context.copy(spare, slot, count)
        context.forget(spare, 0)


def exchange_observers(
    loaded: LoadedModel,
    cache: CacheState,
    apply_operations: Callable[[], None],
    options: Sequence[ObserverOptions],
) -> None:
    """See TextEngine. If no new context can be created, `loaded.context` is left closed."""
    old = loaded.observers
    successor = old.successor(options)
    before = loaded.context.options
    after = replace(
        before,
        n_outputs=n_outputs(
            options, before.n_ubatch, before.n_sequences, scores_prompts=loaded.scores_prompts
        ),
        eval_callback=successor.eval_callback,
    )
    cache.forget_parked()
    apply_operations()
    # The old context is closed first, since two would need the memory of two KV caches.
    with _saved(loaded.context) as state:
        loaded.context.close()
        try:
            loaded.context = native.Context(loaded.model, after)
            loaded.observers = successor
        except BaseException:
            successor.retire()
            loaded.context = native.Context(loaded.model, before)
            raise
        finally:
            if loaded.context.handle and not (state and loaded.context.read_state(state)):
                cache.forget_all()
    old.retire()


@contextmanager
def _saved(context: native.Context) -> Iterator[memoryview | None]:
    """Save the cache to an unnamed file and yield its mapping. Unlike memory, it can be written to disk.

    Yields None if the disk is full, or the cache is not unified or not plain.
    """
    with ExitStack() as opened:
        mapped = None
        if context.options.unified and context.model.has_plain_cache:
            with suppress(OSError):
                folder = cache_folder()
                folder.mkdir(parents=True, exist_ok=True)
                file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
                mapped = opened.enter_context(mapped_file(file, context.state_size()))
        yield mapped if mapped is not None and context.write_state(mapped) else None
