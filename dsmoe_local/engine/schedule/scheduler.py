"""Plans the steps: which sequences run, which tokens are decoded, which cells are shared.

- Sequences start in the order of their arrival. If one does not fit, the later ones wait too.
- A sequence with max_tokens starts when all its cells can be reserved, so it never runs out of cells. One
  without max_tokens reserves cells as it grows, and can be preempted, the newest first.
- A prompt waits while another one with the same prefix is in prefill, and then shares its cells.
- The cells of a finished sequence are kept until they are needed. The least recently used are evicted first.

It calls no native code.
"""

from __future__ import annotations

from collections import deque

from dsmoe_local.base.sequences import n_common
from dsmoe_local.engine.schedule.cache_state import CacheState
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
from dsmoe_local.engine.schedule.radix_tree import RadixTree

_WORTH_WAITING = 16  # tokens: the shortest common prefix that a prompt waits for
_WORTH_COPYING = 32  # tokens: the same for per-sequence caches, where a copy copies a whole cache


class Scheduler:
    """Waiting and running sequences, and a mirror of the cache. For each step call `plan`, then `commit`."""

    def __init__(self, limits: Limits) -> None:
        assert limits.n_slots >= 1
        assert limits.n_context <= limits.n_cells
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.cache = CacheState(limits)
        self._reads = False  # True if the last step was a prefill; only used with per-sequence caches

    @property
    def cells(self) -> RadixTree:
        """The contents of the cache."""
        return self.cache.cells

    @property
    def idle(self) -> bool:
        """True if no sequence is waiting or running."""
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its prompt must be shorter than the context."""
        assert 0 < sequence.n_prompt < self.limits.n_context
        self.waiting.append(sequence)

    def append(self, sequence: Sequence, token_id: int) -> None:
        """Append a token to a running sequence, to be decoded in the next step."""
        sequence.tokens.append(token_id)

    def finish(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence. Its cells may be reused by others."""
        if sequence.slot < 0:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        keep = sequence.n_cached
        if sequence.n_unmoved is not None:
            keep = min(keep, sequence.n_unmoved)
        if self.limits.deterministic:
            # Only whole prefill chunks are bit-identical to those that another prompt would compute.
            chunk = self.limits.n_step_tokens
            keep = min(keep, sequence.n_prompt) // chunk * chunk if sequence.score_from is None else 0
        self.cache.truncate(sequence.slot, keep)
        self.cache.touch(sequence.slot)
        sequence.slot = -1

    def plan(self) -> Step:
        """Return the next step. The caller must `finish` the sequences in `Step.full`."""
        full = self._grow()
        before = set(map(id, self.running))
        if self.waiting and len(self.running) < self.limits.n_slots:
            self._admit()
        reused = [each for each in self.running if each.n_cached and id(each) not in before]
        rows = self._rows([sequence for sequence in self.running if sequence not in full])
        padding = self._padding(rows) if self.limits.deterministic else ()
        return Step(self.cache.take_operations(), rows, padding, tuple(full), tuple(reused))

    def commit(self, step: Step) -> None:
        """Record that all rows of `step` are in the cache."""
        for sequence, start, count, _ in step.rows:
            self._hold(sequence, start, start + count)
            sequence.n_cached = start + count

    def resync(self, sequence: Sequence, n_held: int) -> None:
        """Record that a step was aborted. The cache now holds `n_held` tokens of a running sequence."""
        if not self.limits.rewindable:
            # The state is that of an unknown number of tokens.
            self.lose(sequence)
            return
        before = sequence.n_cached
        self._hold(sequence, before, n_held)
        # The logits of the step are lost. The last token must be computed again, or all if they are scored.
        sequence.n_cached = min(n_held, len(sequence.tokens) - 1 if sequence.score_from is None else before)
        self.cache.truncate(sequence.slot, sequence.n_cached, native_length=n_held)

    def _hold(self, sequence: Sequence, start: int, end: int) -> None:
        """Record that the cache holds the tokens from `start` to `end` of a sequence."""
        # Cells from decoding, or from the smaller steps of a scored prompt, differ in the last bits from
        # those of a prefill, so in the deterministic mode they must not be shared.
        in_chunks = start < sequence.n_prompt and sequence.score_from is None
        exact = not sequence.shifted and (in_chunks or not self.limits.deterministic)
        self.cells.extend(sequence.slot, sequence.tokens[start:end], exact=exact)

    def lose(self, sequence: Sequence) -> None:
        """Drop all cells of a running sequence after a failed step."""
        self.cells.truncate(sequence.slot, 0)
        self.cache.operations.append(Forget(sequence.slot, 0))
        sequence.n_cached = 0

    def restart(self, sequence: Sequence) -> None:
        """Start a running sequence again, without cells that are in the cache."""
        sequence.n_reusable, sequence.n_reused = 0, None
        self._preempt(sequence)

    def forget_idle(self) -> None:
        """Drop the cells of idle and parked sequences."""
        busy = self._busy()
        for held in self.cells.sequences:
            if held not in busy:
                self.cache.truncate(held, 0)

    def check(self) -> None:
        """Raise AssertionError if the state is inconsistent. For tests."""
        self.cells.check()
        slots = [sequence.slot for sequence in self.running]
        assert len(set(slots)) == len(slots), "two sequences in one slot"
        assert all(0 <= slot < self.limits.n_slots for slot in slots), "a slot is out of range"
        assert not set(map(id, self.waiting)) & set(map(id, self.running)), "waiting and running at once"
        assert all(sequence.slot == -1 for sequence in self.waiting), "a waiting sequence holds a slot"
        assert all(held < self._n_ids for held in self.cells.sequences), "a sequence id out of range"
        for sequence in self.running:
            held = self.cells.tokens(sequence.slot)
            assert sequence.tokens[: sequence.n_cached] == held, "the cache holds other tokens"
            assert sequence.n_cached <= len(sequence.tokens), "more tokens cached than there are"
            assert len(held) <= sequence.n_reserved <= self.limits.n_context, "more cells used than reserved"
        if self.limits.unified:
            assert self.cells.n_cells <= self.limits.n_cells, "more cells than there are"
            assert self._n_reserved() + self._n_needed() <= self.limits.n_cells, "too many cells reserved"
        else:
            assert all(self.cells.length(held) <= self.limits.n_cells for held in self.cells.sequences)

    @property
    def _n_ids(self) -> int:
        return self.limits.n_ids if self.limits.unified else self.limits.n_slots

    def _busy(self) -> set[int]:
        return {sequence.slot for sequence in self.running}

    def _n_reserved(self) -> int:
        """Reserved cells that running sequences have not used yet."""
        return sum(sequence.n_reserved - self.cells.length(sequence.slot) for sequence in self.running)

    def _n_needed(self) -> int:
        """Cells of running sequences; shared ones count once."""
        return self.cells.n_kept(self._busy(), None, 0)

    def _grow(self) -> list[Sequence]:
        """Reserve more cells for sequences that need them. Returns the sequences that cannot continue."""
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
                # Only sequences without max_tokens are preempted, the newest first.
                victim = next((other for other in reversed(self.running) if other.n_most is None), sequence)
                if len(self.running) == 1 or (victim is sequence and sequence.n_most is not None):
                    full.append(sequence)
                    break
                self._preempt(victim)
                if victim is sequence:
                    break
        return full

    def _reserve(self, sequence: Sequence, wanted: int) -> bool:
        """Reserve `wanted` cells in total for a running sequence. Returns False if there are not enough."""
        if not self.limits.unified:
            sequence.n_reserved = wanted
            return True
        more = wanted - sequence.n_reserved
        if self._n_needed() + self._n_reserved() + more > self.limits.n_cells:
            return False
        sequence.n_reserved = wanted
        self.cache.make_room(self._busy(), self._n_reserved())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Move a running sequence back to the head of the queue. Its tokens are computed again later."""
        self.running.remove(sequence)
        self.cache.truncate(sequence.slot, 0)
        sequence.slot, sequence.n_cached, sequence.n_reserved = -1, 0, 0
        self.waiting.appendleft(sequence)

    def _shift(self, sequence: Sequence) -> bool:
        """Drop half of the tokens after those that a sequence keeps or shares. Returns False if it cannot."""
        if not sequence.can_shift:
            return False
        # Shared cells cannot be shifted, so idle sequences must not share any.
        self.forget_idle()
        start = max(1, sequence.n_keep, self.cells.n_shared(sequence.slot))
        count = (sequence.n_cached - start) // 2
        if count < 1:
            return False
        rest = sequence.tokens[start + count : sequence.n_cached]
        self.cells.truncate(sequence.slot, start)
        self.cells.extend(sequence.slot, rest, exact=False)
        self.cache.operations.append(Shift(sequence.slot, start, count))
        del sequence.tokens[start : start + count]
        sequence.n_cached -= count
        sequence.n_unmoved = start if sequence.n_unmoved is None else min(start, sequence.n_unmoved)
        sequence.dropped = (count, start)
        return True

    def _admit(self) -> None:
        """Start waiting sequences in their order, as long as there are slots and cells."""
        deferred: list[Sequence] = []
        while self.waiting and len(self.running) < self.limits.n_slots:
            sequence = self.waiting[0]
            most = len(sequence.tokens) - 1
            if sequence.n_reusable is not None:
                most = min(most, sequence.n_reusable)
            count, owners = self.cells.longest(sequence.tokens, most)
            if self.limits.deterministic:
                count -= count % self.limits.n_step_tokens
            if self._waits_for_prefix(sequence, count, most):
                deferred.append(self.waiting.popleft())
                continue
            if not self._start(sequence, count, owners):
                break
            self.waiting.popleft()
        self.waiting.extendleft(reversed(deferred))

    def _waits_for_prefix(self, sequence: Sequence, count: int, most: int) -> bool:
        """Return True if a running prefill will cache a longer prefix of this prompt."""
        if not self.limits.rewindable or (not self.limits.unified and most < _WORTH_COPYING):
            return False
        for other in self.running:
            end = min(other.n_prompt, most)
            if not other.prefilling or other.n_cached >= end or end < _WORTH_WAITING:
                continue
            common = n_common(other.tokens, sequence.tokens, most=end)
            if self.limits.deterministic:
                common -= common % self.limits.n_step_tokens
            # Waiting costs nothing, since prompts are processed in their order anyway.
            if common >= _WORTH_WAITING and common > max(count, other.n_cached):
                return True
        return False

    def _start(self, sequence: Sequence, count: int, owners: frozenset[int]) -> bool:
        """Assign a slot and cells to a sequence and run it. Returns False if there are not enough cells."""
        reserved = self._wanted(sequence)
        busy = self._busy()
        slot, source, count = self._choose_slot(busy, count, owners)
        if self.limits.unified:
            kept = self.cells.n_kept(busy, source, count)
            if kept + self._n_reserved() + reserved - count > self.limits.n_cells:
                return False
        # A request that continues a whole cached sequence is the next turn of a conversation. Only one that
        # diverges from it shows that independent requests have this prefix.
        diverges = any(self.cells.length(owner) > count for owner in owners)
        self.cache.take_slot(slot, source, count)
        sequence.slot = slot
        sequence.n_cached = count
        sequence.n_reserved = reserved
        if sequence.n_reused is None:
            sequence.n_reused = count
        self.running.append(sequence)
        if count >= _WORTH_WAITING and diverges:
            self.cells.hit(slot, count)
        self.cache.touch(slot)
        if self.limits.unified:
            self.cache.make_room(self._busy(), self._n_reserved())
        return True

    def _wanted(self, sequence: Sequence) -> int:
        """Return the number of cells to reserve when a sequence starts."""
        if not self.limits.unified:
            return self.limits.n_context
        if sequence.n_most is None:
            return min(len(sequence.tokens) + GROWTH, self.limits.n_context)
        return min(sequence.n_most, self.limits.n_context)

    def _choose_slot(self, busy: set[int], count: int, owners: frozenset[int]) -> tuple[int, int | None, int]:
        """Return a free slot, the owner to copy its first tokens from (perhaps itself), and their number."""
        free = [slot for slot in range(self.limits.n_slots) if slot not in busy]
        idle_owners = owners.intersection(free)
        if not self.limits.rewindable:
            idle_owners = owners = frozenset(o for o in idle_owners if self.cells.length(o) == count)
            count = count if owners else 0
        if not self.limits.unified and count < _WORTH_COPYING and not idle_owners:
            count = 0
        empty = [slot for slot in free if not self.cells.length(slot)]
        ready = [slot for slot in idle_owners if self.cells.length(slot) == count]
        if count and ready:
            return min(ready), min(ready), count
        source = min(owners) if count else None
        if empty and (self.limits.unified or not count or not idle_owners):
            return empty[0], source, count
        # Prefer an owner, which needs no copy, then the least recently used slot.
        slot = min(free, key=lambda slot: (slot not in owners, self.cache.last_used(slot)))
        return slot, slot if count and slot in owners else source, count

    def _rows(self, able: list[Sequence]) -> tuple[StepRow, ...]:
        decoding = [sequence for sequence in able if not sequence.prefilling]
        reading = [sequence for sequence in able if sequence.prefilling]
        if self.limits.unified:
            return _decode_rows(decoding) + self._prefill_rows(reading, len(decoding))
        # llama.cpp would split rows of different lengths into several ubatches, so prefill and decoding steps
        # alternate.
        self._reads = bool(reading) and not (decoding and self._reads)
        if not self._reads:
            return _decode_rows(sorted(decoding, key=lambda sequence: sequence.slot))
        return self._prefill_rows(reading[:1] if self.limits.deterministic else reading, 0)

    def _prefill_rows(self, reading: list[Sequence], n_decoding: int) -> tuple[StepRow, ...]:
        """Return rows with tokens of the prompts in their order, but at least one token.

        `n_decoding` other tokens are in the step.
        """
        rows = []
        left = max(1, self.limits.n_step_tokens - n_decoding)
        outputs = left if self.limits.n_outputs is None else self.limits.n_outputs - n_decoding
        for sequence in reading:
            start, end = sequence.n_cached, len(sequence.tokens)
            count = min(left, end - start)
            if sequence.score_from is not None:
                # Each token from there on takes an output.
                count = min(count, max(0, sequence.score_from - start) + outputs)
            n_outputs = int(start + count == end)
            if sequence.score_from is not None:
                n_outputs = max(n_outputs, start + count - max(start, sequence.score_from))
            if count <= 0 or n_outputs > outputs:
                break
            rows.append(StepRow(sequence, start, count, n_outputs))
            left -= count
            outputs -= n_outputs
        return tuple(rows)

    def _padding(self, rows: tuple[StepRow, ...]) -> tuple[Padding, ...]:
        """Return padding for the idle slots in a step that decodes."""
        if not rows or any(row.sequence.prefilling for row in rows):
            return ()
        taken = {row.sequence.slot for row in rows}
        padding = []
        for slot in range(self.limits.n_slots):
            if slot in taken:
                continue
            if self.cells.length(slot) >= self.limits.n_cells:
                self.cache.truncate(slot, 0)
            padding.append(Padding(slot, self.cells.length(slot)))
        return tuple(padding)


def _decode_rows(decoding: list[Sequence]) -> tuple[StepRow, ...]:
    """Return a row with the latest token of each sequence."""
    return tuple(StepRow(sequence, sequence.n_cached, 1, 1) for sequence in decoding)
