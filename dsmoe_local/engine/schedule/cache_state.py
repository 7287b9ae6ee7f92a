"""A mirror of the KV cache: pending operations, parked prefixes and eviction. Calls no native code.

A parked prefix is one that several requests shared. It is kept on a sequence id that is not a slot.
"""

from __future__ import annotations

from dsmoe_local.base.sequences import n_common
from dsmoe_local.engine.schedule.plan import Copy, Forget, Limits, Operation
from dsmoe_local.engine.schedule.radix_tree import RadixTree


class CacheState:
    """The cells of all sequences as they will be after the pending `operations`."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.cells = RadixTree()
        self.operations: list[Operation] = []
        self._last_used: dict[int, int] = {}
        self._clock = 0

    def last_used(self, sequence: int) -> int:
        """Return the time of the last use of a sequence, counted in uses; 0 if it was never used."""
        return self._last_used.get(sequence, 0)

    def take_operations(self) -> tuple[Operation, ...]:
        """Return the pending operations and clear them."""
        operations, self.operations = tuple(self.operations), []
        return operations

    def take_slot(self, slot: int, source: int | None, count: int) -> None:
        """Set the tokens of a free slot to the first `count` tokens of `source` (None: no tokens)."""
        kept = count if slot == source else 0
        if self.cells.length(slot) > kept:
            self._park(slot, kept, source)
            self.truncate(slot, kept)
        if source is not None and slot != source:
            self._copy(source, slot, count)

    def _park(self, slot: int, count: int, needed: int | None) -> None:
        """Park the shared prefix of a slot that will be cut to `count` tokens, if the prefix is longer.

        `needed` is a sequence that must not be evicted. Only the shared part is parked, since attention reads
        parked cells too.
        """
        n_wanted = self.cells.n_wanted(slot)
        if not self.limits.unified or n_wanted <= count:
            return
        parked = [held for held in self.cells.sequences if held >= self.limits.n_slots]
        spare = set(range(self.limits.n_slots, self.limits.n_ids)) - set(parked)
        dispensable = [held for held in parked if held != needed]
        if dispensable and not spare:
            oldest = min(dispensable, key=self.last_used)
            self.truncate(oldest, 0)
            spare.add(oldest)
        if spare:
            target = min(spare)
            self._copy(slot, target, n_wanted)
            self._last_used[target] = self.last_used(slot)

    def _copy(self, source: int, target: int, count: int) -> None:
        self.operations.append(Copy(source, target, count))
        self.touch(source)
        if self.limits.unified:
            self.cells.share(source, target, count)
        else:
            self.cells.extend(target, self.cells.tokens(source)[:count])

    def make_room(self, busy: set[int], n_reserved: int) -> None:
        """Evict idle sequences, the least recently used first, until `n_reserved` cells are free."""
        idle = sorted((held for held in self.cells.sequences if held not in busy), key=self.last_used)
        for held in idle:
            if self.cells.n_cells + n_reserved <= self.limits.n_cells:
                return
            self.truncate(held, 0)

    def truncate(self, sequence: int, count: int, *, native_length: int | None = None) -> None:
        """Cut a sequence to its first `count` tokens. `native_length`: its length in llama.cpp's cache."""
        if (self.cells.length(sequence) if native_length is None else native_length) > count:
            self.operations.append(Forget(sequence, count))
        self.cells.truncate(sequence, count)

    def touch(self, sequence: int) -> None:
        """Record a use of a sequence."""
        self._clock += 1
        self._last_used[sequence] = self._clock

    # Only while no request is running.

    def longest_idle(self, token_ids: list[int]) -> tuple[int, int]:
        """Return the slot that holds the longest prefix of `token_ids`, and the length of that prefix."""
        common = {slot: n_common(self.cells.tokens(slot), token_ids) for slot in range(self.limits.n_slots)}
        slot = max(common, key=lambda slot: (common[slot], -slot))
        return slot, common[slot]

    def spare_id(self) -> int | None:
        """Return the id of an empty sequence that is not a slot, or None."""
        return max(set(range(self.limits.n_slots, self.limits.n_ids)) - {*self.cells.sequences}, default=None)

    def prepare_slot(self, count: int, slot: int | None = None, kept: int = 0) -> int | None:
        """Return an empty slot with free cells for `count` tokens, or `slot`, cut to its first `kept` tokens.

        Evicts the least recently used sequences. Returns None if there are not enough cells.
        """
        if not self.limits.unified or count > self.limits.n_cells:
            return None
        busy = set() if slot is None else {slot}
        if slot is not None:
            self.truncate(slot, kept)
        self.make_room(busy, count - kept)
        if slot is None:
            slot = min(
                range(self.limits.n_slots),
                key=lambda slot: (self.cells.length(slot) > 0, self.last_used(slot)),
            )
            self.truncate(slot, 0)
        return slot

    def add_loaded(self, slot: int, token_ids: list[int]) -> None:
        """Record that tokens were loaded into a slot. Their cells are those that a prefill would compute."""
        self.cells.extend(slot, token_ids)
        self.touch(slot)

    def forget_parked(self) -> None:
        """Drop parked sequences."""
        for held in self.cells.sequences:
            if held >= self.limits.n_slots:
                self.truncate(held, 0)

    def forget_all(self) -> None:
        """Record that the cache was replaced by an empty one."""
        self.cells = RadixTree()
        self.operations.clear()
        self._last_used.clear()
