"""Decides what each step computes: who runs, what is read and shared. Knows only numbers.

Rules. First come, first served: what does not fit makes those behind it wait. A sequence is admitted when its
prompt and its max_tokens fit beside the promises already made, so it never runs out of cells later; only
sequences without max_tokens grow, and only they can be preempted, the newest first. A prompt whose beginning
another one is just reading waits for it, and then shares those cells. What a finished sequence leaves stays
until the room is needed, least recently used first out.
"""

from __future__ import annotations

from collections import deque

from dsmoe_local.engine.schedule.cache_book import CacheBook
from dsmoe_local.engine.schedule.plan import (
    GROWTH,
    Forget,
    Limits,
    Padding,
    Sequence,
    Shift,
    Step,
    StepRow,
)
from dsmoe_local.engine.schedule.radix_tree import RadixTree, common_length
from dsmoe_local.engine.schedule.rows import decode_rows, prefill_rows

_WORTH_WAITING = 16  # a shorter common beginning is read again rather than waited for
_WORTH_COPYING = 32  # with a cache for each sequence, a copy moves a sequence's whole cache


class Scheduler:
    """The sequences that wait and run, and a mirror of the cache. Call `plan`, do it, then `commit`."""

    def __init__(self, limits: Limits) -> None:
        assert limits.n_slots >= 1
        assert limits.n_context <= limits.n_cells
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.book = CacheBook(limits)
        self._reads = False  # with a cache for each sequence: whether the last step read prompts

    @property
    def cells(self) -> RadixTree:
        """What the cache holds."""
        return self.book.cells

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, whose prompt must be shorter than the context."""
        assert 0 < sequence.n_prompt < self.limits.n_context
        self.waiting.append(sequence)

    def append(self, sequence: Sequence, token_id: int) -> None:
        """The next token of a running sequence, to be decoded."""
        sequence.tokens.append(token_id)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, in whatever state; what the cache holds of it may be reused."""
        if sequence.slot < 0:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        keep = sequence.n_cached
        if sequence.n_unmoved is not None:
            keep = min(keep, sequence.n_unmoved)
        if self.limits.deterministic:
            # Only whole prefill chunks are what another prompt would compute, bit by bit.
            chunk = self.limits.n_step_tokens
            keep = min(keep, sequence.n_prompt) // chunk * chunk
        self.book.truncate(sequence.slot, keep)
        self.book.touch(sequence.slot)
        sequence.slot = -1

    def plan(self) -> Step:
        """The next step. Every row's sequence is running; the caller must finish the sequences in `full`."""
        full = self._grow()
        if self.waiting and len(self.running) < self.limits.n_slots:
            self._admit()
        rows = self._rows([sequence for sequence in self.running if sequence not in full])
        padding = self._padding(rows) if self.limits.deterministic else ()
        return Step(self.book.take_operations(), rows, padding, tuple(full))

    def commit(self, step: Step) -> None:
        """Every row of `step` is in the cache."""
        for sequence, start, count, _ in step.rows:
            self._hold(sequence, start, start + count)
            sequence.n_cached = start + count

    def resync(self, sequence: Sequence, n_held: int) -> None:
        """The step was broken off: the cache holds `n_held` tokens of a running sequence."""
        before = sequence.n_cached
        self._hold(sequence, before, n_held)
        # Logits are lost with the step: the last token is computed again, of a scored prompt all of them.
        sequence.n_cached = min(n_held, len(sequence.tokens) - 1 if sequence.score_from is None else before)
        self.book.truncate(sequence.slot, sequence.n_cached, native_length=n_held)

    def _hold(self, sequence: Sequence, start: int, end: int) -> None:
        """Note that the cache holds a sequence's tokens from `start` to `end` now."""
        # Another prompt may only begin with cells that reading it would give: bit by bit, if deterministic.
        decoded = self.limits.deterministic and start >= sequence.n_prompt
        self.cells.extend(
            sequence.slot, sequence.tokens[start:end], exact=not sequence.shifted and not decoded
        )

    def lose(self, sequence: Sequence) -> None:
        """The cache may hold anything of a running sequence: none of it is trusted."""
        self.cells.truncate(sequence.slot, 0)
        self.book.operations.append(Forget(sequence.slot, 0))
        sequence.n_cached = 0

    def forget_idle(self) -> None:
        """Drop what idle and parked sequences hold."""
        busy = {sequence.slot for sequence in self.running}
        for held in self.cells.sequences:
            if held not in busy:
                self.book.truncate(held, 0)

    def check(self) -> None:
        """AssertionError unless the books agree with themselves; for tests and idle time."""
        self.cells.check()
        slots = [sequence.slot for sequence in self.running]
        assert len(set(slots)) == len(slots), "two sequences in one slot"
        assert all(0 <= slot < self.limits.n_slots for slot in slots), "a slot out of range"
        assert not set(map(id, self.waiting)) & set(map(id, self.running)), "waiting and running at once"
        assert all(sequence.slot == -1 for sequence in self.waiting), "a waiting sequence holds a slot"
        assert all(held < self._n_ids for held in self.cells.sequences), "a sequence id out of range"
        for sequence in self.running:
            held = self.cells.tokens(sequence.slot)
            assert sequence.tokens[: sequence.n_cached] == held, "the cache is not what the sequence says"
            assert sequence.n_cached <= len(sequence.tokens), "more cached than there is"
            assert len(held) <= sequence.n_reserved <= self.limits.n_context, "more held than reserved"
        if self.limits.unified:
            assert self.cells.n_cells <= self.limits.n_cells, "more cells than there are"
            assert self._n_promised() + self._n_needed() <= self.limits.n_cells, "more promised than there is"
        else:
            assert all(self.cells.length(held) <= self.limits.n_cells for held in self.cells.sequences)

    @property
    def _n_ids(self) -> int:
        return self.limits.n_ids if self.limits.unified else self.limits.n_slots

    def _busy(self) -> set[int]:
        return {sequence.slot for sequence in self.running}

    def _n_promised(self) -> int:
        """Cells that running sequences may still take."""
        return sum(sequence.n_reserved - self.cells.length(sequence.slot) for sequence in self.running)

    def _n_needed(self) -> int:
        """Cells that running sequences hold, shared ones once."""
        return self.cells.n_kept(self._busy(), None, 0)

    def _grow(self) -> list[Sequence]:
        """Reserve room for the next token of those that outgrow theirs; returns those that cannot go on."""
        full: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.slot < 0 or len(sequence.tokens) <= sequence.n_reserved:
                continue
            if len(sequence.tokens) > self.limits.n_context:
                if not self._shift(sequence):
                    full.append(sequence)
                continue
            wanted = min(sequence.n_reserved + GROWTH, self.limits.n_context)
            while not self._reserve(sequence, wanted):
                # Those that promised their length keep it; of the others the newest gives way.
                victim = next((other for other in reversed(self.running) if other.n_most is None), sequence)
                if len(self.running) == 1 or (victim is sequence and sequence.n_most is not None):
                    full.append(sequence)
                    break
                self._preempt(victim)
                if victim is sequence:
                    break
        return full

    def _reserve(self, sequence: Sequence, wanted: int) -> bool:
        """Promise a running sequence `wanted` cells in all, if they can be had."""
        if not self.limits.unified:
            sequence.n_reserved = wanted
            return True
        more = wanted - sequence.n_reserved
        if self._n_needed() + self._n_promised() + more > self.limits.n_cells:
            return False
        sequence.n_reserved = wanted
        self.book.make_room(self._busy(), self._n_promised())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a growing sequence back to the head of the queue; it reads its own text again later."""
        self.running.remove(sequence)
        self.book.truncate(sequence.slot, 0)
        sequence.slot, sequence.n_cached, sequence.n_reserved = -1, 0, 0
        self.waiting.appendleft(sequence)

    def _shift(self, sequence: Sequence) -> bool:
        """Make room in a full sequence by dropping half of what lies behind what it keeps and shares."""
        if not sequence.can_shift:
            return False
        # Copies that nobody runs from are no reason to give up.
        self.forget_idle()
        start = max(1, sequence.n_keep, self.cells.n_shared(sequence.slot))
        count = (sequence.n_cached - start) // 2
        if count < 1:
            return False
        rest = sequence.tokens[start + count : sequence.n_cached]
        self.cells.truncate(sequence.slot, start)
        self.cells.extend(sequence.slot, rest, exact=False)
        self.book.operations.append(Shift(sequence.slot, start, count))
        del sequence.tokens[start : start + count]
        sequence.n_cached -= count
        sequence.n_unmoved = start if sequence.n_unmoved is None else min(start, sequence.n_unmoved)
        sequence.dropped = (count, start)
        return True

    def _admit(self) -> None:
        """Start waiting sequences, in their order, while slots and cells last."""
        deferred: list[Sequence] = []
        while self.waiting and len(self.running) < self.limits.n_slots:
            sequence = self.waiting[0]
            most = len(sequence.tokens) - 1
            if sequence.n_reusable is not None:
                most = min(most, sequence.n_reusable)
            count, owners = self.cells.longest(sequence.tokens, most)
            if self.limits.deterministic:
                count -= count % self.limits.n_step_tokens
            if self._is_being_read(sequence, count, most):
                deferred.append(self.waiting.popleft())
                continue
            if not self._start(sequence, count, owners):
                break
            self.waiting.popleft()
        self.waiting.extendleft(reversed(deferred))

    def _is_being_read(self, sequence: Sequence, count: int, most: int) -> bool:
        """Whether a running prompt is about to cache more of this one's beginning."""
        if not self.limits.unified and most < _WORTH_COPYING:
            return False
        for other in self.running:
            end = min(other.n_prompt, most)
            if not other.prefilling or other.n_cached >= end or end < _WORTH_WAITING:
                continue
            common = common_length(other.tokens, sequence.tokens, 0, end)
            if self.limits.deterministic:
                common -= common % self.limits.n_step_tokens
            # Waiting costs nothing: prompts are read in their order, so this one would not be read sooner.
            if common >= _WORTH_WAITING and common > max(count, other.n_cached):
                return True
        return False

    def _start(self, sequence: Sequence, count: int, owners: frozenset[int]) -> bool:
        """Give a sequence a slot and its cells; False if there are not enough."""
        reserved = self._wanted(sequence)
        busy = self._busy()
        slot, source, count = self._choose_slot(busy, count, owners)
        if self.limits.unified:
            kept = self.cells.n_kept(busy, source, count)
            if kept + self._n_promised() + reserved - count > self.limits.n_cells:
                return False
        # One that goes on where another ended is its next turn, and no second use of its beginning.
        diverges = any(self.cells.length(owner) > count for owner in owners)
        self.book.take_slot(slot, source, count)
        sequence.slot = slot
        sequence.n_cached = count
        sequence.n_reserved = reserved
        if sequence.n_reused is None:
            sequence.n_reused = count
        self.running.append(sequence)
        if count >= _WORTH_WAITING and diverges:
            self.cells.hit(slot, count)
        self.book.touch(slot)
        if self.limits.unified:
            self.book.make_room(self._busy(), self._n_promised())
        return True

    def _wanted(self, sequence: Sequence) -> int:
        """The cells that a sequence is promised at its start."""
        if not self.limits.unified:
            return self.limits.n_context
        if sequence.n_most is None:
            return min(len(sequence.tokens) + GROWTH, self.limits.n_context)
        return min(sequence.n_most, self.limits.n_context)

    def _choose_slot(self, busy: set[int], count: int, owners: frozenset[int]) -> tuple[int, int | None, int]:
        """A free slot, which of `owners` it gets its first tokens from (perhaps itself), and how many."""
        free = [slot for slot in range(self.limits.n_slots) if slot not in busy]
        idle_owners = owners.intersection(free)
        if not self.limits.unified and count < _WORTH_COPYING and not idle_owners:
            count = 0
        empty = [slot for slot in free if not self.cells.length(slot)]
        ready = [slot for slot in idle_owners if self.cells.length(slot) == count]
        if count and ready:
            return min(ready), min(ready), count
        source = min(owners) if count else None
        if empty and (self.limits.unified or not count or not idle_owners):
            return empty[0], source, count
        # Going on where one left off needs no copy; otherwise the least recently used gives way.
        slot = min(free, key=lambda slot: (slot not in owners, self.book.last_used(slot)))
        return slot, slot if count and slot in owners else source, count

    def _rows(self, able: list[Sequence]) -> tuple[StepRow, ...]:
        decoding = [sequence for sequence in able if not sequence.prefilling]
        reading = [sequence for sequence in able if sequence.prefilling]
        if self.limits.unified:
            return decode_rows(decoding) + prefill_rows(reading, self.limits.n_step_tokens - len(decoding))
        # Rows of different lengths would be computed as several batches: prompts and replies take turns.
        self._reads = bool(reading) and not (decoding and self._reads)
        if not self._reads:
            return decode_rows(sorted(decoding, key=lambda sequence: sequence.slot))
        return prefill_rows(reading[:1] if self.limits.deterministic else reading, self.limits.n_step_tokens)

    def _padding(self, rows: tuple[StepRow, ...]) -> tuple[Padding, ...]:
        """Padding for the idle slots of a step that decodes."""
        if not rows or any(row.sequence.prefilling for row in rows):
            return ()
        taken = {row.sequence.slot for row in rows}
        padding = []
        for slot in range(self.limits.n_slots):
            if slot in taken:
                continue
            if self.cells.length(slot) >= self.limits.n_cells:
                self.book.truncate(slot, 0)
            padding.append(Padding(slot, self.cells.length(slot)))
        return tuple(padding)
