"""The books of the KV cache: what it holds, what is still to be done to it, and what goes first for room.

Mirrors llama.cpp's cache and touches nothing native. Who runs is `scheduler`'s concern.
"""

from __future__ import annotations

from dsmoe_local.engine.schedule.plan import Copy, Forget, Limits, Operation
from dsmoe_local.engine.schedule.radix_tree import RadixTree, common_length


class CacheBook:
    """`cells` are as they will be once `operations` are done, in their order."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.cells = RadixTree()
        self.operations: list[Operation] = []
        self._last_used: dict[int, int] = {}
        self._clock = 0

    def last_used(self, sequence: int) -> int:
        """When, by a clock that counts uses; 0: never."""
        return self._last_used.get(sequence, 0)

    def take_operations(self) -> tuple[Operation, ...]:
        """What is still to be done to the cache, without a step."""
        operations, self.operations = tuple(self.operations), []
        return operations

    def take_slot(self, slot: int, source: int | None, count: int) -> None:
        """Make a free slot hold the first `count` tokens of `source`, and nothing else."""
        kept = count if slot == source else 0
        if self.cells.length(slot) > kept:
            self._park(slot, kept, source)
            self.truncate(slot, kept)
        if source is not None and slot != source:
            self._copy(source, slot, count)

    def _park(self, slot: int, count: int, needed: int | None) -> None:
        """Keep on a spare id what several requests began with and a slot is about to lose: what lies beyond
        its first `count` tokens. Not more than that, since attention looks at parked cells too.
        """
        worth = self.cells.n_wanted(slot)
        if not self.limits.unified or worth <= count:
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
            self._copy(slot, target, worth)
            self._last_used[target] = self.last_used(slot)

    def _copy(self, source: int, target: int, count: int) -> None:
        self.operations.append(Copy(source, target, count))
        self.touch(source)
        if self.limits.unified:
            self.cells.share(source, target, count)
        else:
            self.cells.extend(target, self.cells.tokens(source)[:count])

    def make_room(self, busy: set[int], promised: int) -> None:
        """Evict what nobody runs from, least recently used first, until `promised` more cells can be had."""
        idle = sorted((held for held in self.cells.sequences if held not in busy), key=self.last_used)
        for held in idle:
            if self.cells.n_cells + promised <= self.limits.n_cells:
                return
            self.truncate(held, 0)

    def truncate(self, sequence: int, count: int, *, native_length: int | None = None) -> None:
        """Let a sequence hold only its first `count` tokens; of `native_length` that the cache has of it."""
        if (self.cells.length(sequence) if native_length is None else native_length) > count:
            self.operations.append(Forget(sequence, count))
        self.cells.truncate(sequence, count)

    def touch(self, sequence: int) -> None:
        """It is used now."""
        self._clock += 1
        self._last_used[sequence] = self._clock

    # Between requests.

    def longest_idle(self, token_ids: list[int]) -> tuple[int, int]:
        """The idle slot that holds the most of the beginning of `token_ids`, and how many tokens of it."""
        common = {
            slot: common_length(self.cells.tokens(slot), token_ids, 0, len(token_ids))
            for slot in range(self.limits.n_slots)
        }
        slot = max(common, key=lambda slot: (common[slot], -slot))
        return slot, common[slot]

    def spare_id(self) -> int | None:
        """An id that holds nothing, beyond those that decode; None if all do."""
        return max(set(range(self.limits.n_slots, self.limits.n_ids)) - {*self.cells.sequences}, default=None)

    def make_place(self, count: int, slot: int | None = None, kept: int = 0) -> int | None:
        """An idle slot that has free cells for `count` tokens, and holds nothing; or `slot`, which goes on
        holding its first `kept` of them. None if there are not as many cells.

        What was used least recently gives way. Nothing may be running.
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

    def put_in(self, slot: int, token_ids: list[int]) -> None:
        """The slot holds these tokens, too, now, as reading them would have given."""
        self.cells.extend(slot, token_ids)
        self.touch(slot)

    def forget_parked(self) -> None:
        """Drop what is on ids that only hold."""
        for held in self.cells.sequences:
            if held >= self.limits.n_slots:
                self.truncate(held, 0)

    def forget_all(self) -> None:
        """The cache is another one, and empty."""
        self.cells = RadixTree()
        self.operations.clear()
        self._last_used.clear()
