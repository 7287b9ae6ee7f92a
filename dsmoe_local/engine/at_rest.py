"""What is done to a session between requests: its KV cache to files and back, its observers exchanged.

Owned by the engine's thread. Whether anything runs is `core`'s to know.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from dsmoe_local.base.paths import cache_folder
from dsmoe_local.engine import native
from dsmoe_local.engine.cache_file import open_cache, room_in, write_cache
from dsmoe_local.engine.observe.registry import n_outputs
from dsmoe_local.engine.schedule.cache_book import CacheBook
from dsmoe_local.engine.schedule.cell_tree import common_length
from dsmoe_local.engine.session import Session
from dsmoe_local.engine.types import ObserverOptions


def save_cache(session: Session, book: CacheBook, path: Path, token_ids: list[int]) -> int:
    """See TextEngine; the file is not synced. Whole sequences are written, also what they hold behind those
    tokens.
    """
    slot, count = book.longest_idle(token_ids)
    if not count or not session.limits.unified:
        return 0
    try:
        held = book.cells.tokens(slot)
        written = write_cache(path, session.info.cache_identity, held, session.context, slot)
        return count if written else 0
    except OSError:
        return 0


def load_cache(
    session: Session, book: CacheBook, settle: Callable[[], None], path: Path, token_ids: list[int]
) -> int:
    """See TextEngine. `settle` does to the cache what the book has noted."""
    with open_cache(path, session.info.cache_identity) as stored:
        if stored is None:
            return 0
        common = common_length(stored.token_ids, token_ids, 0, len(token_ids))
        held = book.longest_idle(token_ids)[1]
        if common <= held:
            return held if common else 0
        slot = book.make_place(len(stored.token_ids))
        if slot is None:
            return held
        settle()
        read = session.context.read_state(stored.state, slot)
        if not read or session.context.n_cached(slot) != len(stored.token_ids):
            session.context.forget(slot, 0)
            return book.longest_idle(token_ids)[1]
        book.put_in(slot, stored.token_ids)
        book.truncate(slot, common)
        settle()
        return common


def exchange_observers(
    session: Session, book: CacheBook, settle: Callable[[], None], options: Sequence[ObserverOptions]
) -> None:
    """See TextEngine. If not even the old context can be made again, a closed one is left."""
    old = session.observers
    successor = old.successor(options)
    before = session.context.options
    after = replace(
        before,
        n_outputs=n_outputs(options, before.n_ubatch, before.n_sequences),
        eval_callback=successor.eval_callback,
    )
    book.forget_parked()
    settle()
    # A new context beside the old one would be a second KV cache.
    with _carried(session.context) as state:
        session.context.close()
        try:
            session.context = native.Context(session.model, after)
            session.observers = successor
        except BaseException:
            successor.retire()
            session.context = native.Context(session.model, before)
            raise
        finally:
            if session.context.handle and not (state and session.context.read_state(state)):
                book.forget_all()
    old.retire()


@contextmanager
def _carried(context: native.Context) -> Iterator[memoryview | None]:
    """What the cache holds, in a file without a name: the system may page it out. None if there is no room,
    or where it is in parts that cannot be taken one by one.
    """
    with ExitStack() as opened:
        room = None
        if context.options.unified:
            with suppress(OSError):
                folder = cache_folder()
                folder.mkdir(parents=True, exist_ok=True)
                file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
                room = opened.enter_context(room_in(file, context.state_size()))
        yield room if room is not None and context.write_state(room) else None
