"""The scheduler on plain values, against a cache that is played with dictionaries: nothing native here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_local.engine.schedule.plan import Copy, Forget, Limits, Sequence, Shift, Step
from dsmoe_local.engine.schedule.scheduler import Scheduler


@dataclass
class PlayedCache:
    """llama.cpp's cache in miniature: sequences of (cell, token) pairs; a copy shares cells if unified."""

    limits: Limits
    held: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    _cells: itertools.count[int] = field(default_factory=itertools.count)

    def do(self, step: Step) -> None:
        for operation in step.operations:
            if isinstance(operation, Copy):
                assert not self.held.get(operation.target), "copied onto something"
                source = self.held[operation.source][: operation.n_tokens]
                assert len(source) == operation.n_tokens, "copied more than is there"
                unified = self.limits.unified
                self.held[operation.target] = (
                    list(source) if unified else [(next(self._cells), token) for _, token in source]
                )
            elif isinstance(operation, Forget):
                assert len(self.held.get(operation.sequence, [])) > operation.start, "forgot nothing"
                del self.held[operation.sequence][operation.start :]
            elif isinstance(operation, Shift):
                mine = self.held[operation.sequence]
                moved = {cell for cell, _ in mine[operation.start + operation.n_tokens :]}
                for other, cells in self.held.items():
                    if other != operation.sequence:
                        assert not moved & {cell for cell, _ in cells}, "shifted cells that others own"
                del mine[operation.start : operation.start + operation.n_tokens]
        for sequence, start, count, _ in step.rows:
            assert 0 <= sequence.slot < self.limits.n_slots, "decoded on an id that only holds"
            mine = self.held.setdefault(sequence.slot, [])
            assert len(mine) == start, "a gap or a double position"
            mine += [(next(self._cells), token) for token in sequence.tokens[start : start + count]]
        for slot, position in step.padding:
            assert len(self.held.get(slot, [])) == position, "padding out of place"
        self._measure()

    def hold(self, slot: int, tokens: list[int]) -> None:
        """What a file held, in free cells."""
        assert not self.held.get(slot), "restored onto something"
        self.held[slot] = [(next(self._cells), token) for token in tokens]
        self._measure()

    def _measure(self) -> None:
        if self.limits.unified:
            used = {cell for cells in self.held.values() for cell, _ in cells}
            assert len(used) <= self.limits.n_cells, "more cells than there are"
        else:
            assert all(len(cells) <= self.limits.n_cells for cells in self.held.values())

    def compare(self, scheduler: Scheduler) -> None:
        played = {sequence: [token for _, token in cells] for sequence, cells in self.held.items() if cells}
        assert played == {held: scheduler.cells.tokens(held) for held in scheduler.cells.sequences}
        if self.limits.unified:
            used = {cell for cells in self.held.values() for cell, _ in cells}
            assert scheduler.cells.n_cells == len(used)


@dataclass
class Run:
    """A request in the play: `length` tokens are generated, or the end comes sooner."""

    sequence: Sequence
    length: int
    made: int = 0
    ended: str = ""


class Play:
    """A scheduler, its played cache and requests; one `step` is one step of an engine."""

    def __init__(self, limits: Limits) -> None:
        self.scheduler = Scheduler(limits)
        self.cache = PlayedCache(limits)
        self.runs: list[Run] = []
        self.steps: list[Step] = []

    def add(self, prompt: list[int], length: int, *, stated: bool = True, **more: object) -> Run:
        most = len(prompt) + length if stated else None
        run = Run(Sequence(list(prompt), most, **more), length)  # type: ignore[arg-type]
        self.runs.append(run)
        self.scheduler.add(run.sequence)
        return run

    def step(self) -> Step:
        step = self.scheduler.plan()
        self.cache.do(step)
        self.scheduler.commit(step)
        self.steps.append(step)
        most = self.scheduler.limits.n_outputs
        assert most is None or sum(row.n_outputs for row in step.rows) <= most, "llama.cpp would abort"
        by_sequence = {id(run.sequence): run for run in self.runs}
        for sequence in step.full:
            self.end(by_sequence[id(sequence)], "full")
        for row in step.rows:
            if row.start + row.n_tokens == len(row.sequence.tokens):
                assert row.n_outputs >= 1, "a complete row without logits"
                self._generate(by_sequence[id(row.sequence)])
        self.scheduler.check()
        return step

    def _generate(self, run: Run) -> None:
        run.made += 1
        if run.made >= run.length:
            self.end(run, "length")
        elif len(run.sequence.tokens) >= self.scheduler.limits.n_context and not run.sequence.can_shift:
            self.end(run, "context")
        else:
            self.scheduler.append(run.sequence, 1000 + run.made)

    def end(self, run: Run, how: str) -> None:
        run.ended = how
        self.scheduler.finish(run.sequence)

    def add_loaded(self, tokens: list[int]) -> None:
        """A file's tokens, between requests."""
        state = self.scheduler.cache
        slot = state.prepare_slot(len(tokens))
        if slot is None:
            assert not self.scheduler.limits.unified or len(tokens) > self.scheduler.limits.n_cells
            return
        self.cache.do(Step(state.take_operations()))
        self.cache.hold(slot, tokens)
        state.add_loaded(slot, tokens)
        self.cache.compare(self.scheduler)
        self.scheduler.check()
        assert state.longest_idle(tokens)[1] == len(tokens)

    def finish_all(self, most: int = 3000) -> None:
        for _ in range(most):
            if self.scheduler.idle:
                break
            assert self.step().rows or self.steps[-1].full, "a step without progress"
        assert self.scheduler.idle, "work that never ends"
        # What was decided since the last step is done with the next.
        self.cache.do(self.scheduler.plan())
        self.cache.compare(self.scheduler)


def limits(draw: st.DrawFn) -> Limits:
    unified = draw(st.booleans())
    n_slots = draw(st.integers(1, 5))
    n_context = draw(st.integers(40, 120))
    n_cells = draw(st.integers(n_context, n_context * 3)) if unified else n_context
    return Limits(
        n_slots=n_slots,
        n_cells=n_cells,
        n_context=n_context,
        n_step_tokens=draw(st.integers(1, 40)),
        unified=unified,
        deterministic=not unified and draw(st.booleans()),
        n_ids=n_slots + draw(st.integers(0, 4)),
        n_outputs=draw(st.none() | st.integers(n_slots, n_slots + 20)),
    )


@st.composite
def plays(draw: st.DrawFn) -> tuple[Limits, list[tuple[str, int, int, int, bool]]]:
    """Limits, and what happens: ("add", which prefix, tail length, reply length, stated), cancel, step."""
    chosen = limits(draw)
    happenings = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["add", "add", "add", "cancel", "step", "step"]),
                st.integers(0, 4),
                st.integers(1, 30),
                st.integers(1, 60),
                st.booleans(),
            ),
            min_size=1,
            max_size=40,
        )
    )
    return chosen, happenings


_PREFIXES: tuple[list[int], ...] = ([], list(range(30)), [*range(20), *range(500, 530)], [7] * 25, [5] * 8)


@settings(max_examples=300)
@given(plays())
def test_random_work_ends_and_the_books_agree(
    play: tuple[Limits, list[tuple[str, int, int, int, bool]]],
) -> None:
    """Guards: leaked slots or cells, starvation, double positions, shifted shared cells, lost requests."""
    chosen, happenings = play
    stage = Play(chosen)
    for number, (kind, prefix, tail, length, stated) in enumerate(happenings):
        if kind == "add":
            prompt = [*_PREFIXES[prefix], *(10_000 + number % 3 * 100 + place for place in range(tail))]
            prompt = prompt[: chosen.n_context - 1]
            scored = {"score_from": 0, "n_reusable": 0} if tail % 7 == 0 else {}
            shifts = stated and tail % 5 == 0
            stage.add(prompt, length, stated=stated, can_shift=shifts, n_keep=tail % 3 * 10, **scored)
        elif kind == "cancel" and stage.runs:
            run = stage.runs[prefix * 7 % len(stage.runs)]
            if not run.ended:
                stage.end(run, "cancelled")
        elif kind == "step" and not stage.scheduler.idle:
            stage.step()
        elif kind == "step":
            stage.add_loaded([*_PREFIXES[prefix], *range(20_000, 20_000 + tail)])
    stage.finish_all()
    assert all(run.ended for run in stage.runs)
    for run in stage.runs:
        if run.sequence.n_most is not None and run.ended == "full":
            pytest.fail("a reply that stated its length ran out of cells")
        if run.ended == "length":
            assert run.made == run.length


def test_shared_beginning_is_read_once() -> None:
    """Guards: sixteen prompts with one system text each reading it again."""
    stage = Play(Limits(n_slots=16, n_cells=4096, n_context=1024, n_step_tokens=512))
    shared = list(range(400))
    for number in range(16):
        stage.add([*shared, 5000 + number, 6000 + number], 4)
    stage.finish_all()
    read = sum(row.n_tokens for step in stage.steps for row in step.rows)
    assert read == 402 + 15 * 2 + 16 * 3


def test_copies_of_one_prompt_differ_only_in_their_replies() -> None:
    """Guards: n replies of one prompt reading it n times."""
    stage = Play(Limits(n_slots=4, n_cells=2048, n_context=512, n_step_tokens=64))
    for _ in range(4):
        stage.add(list(range(200)), 5)
    stage.finish_all()
    read = sum(row.n_tokens for step in stage.steps for row in step.rows)
    assert read == 200 + 3 * 1 + 4 * 4


def test_a_turn_continues_where_the_last_one_ended() -> None:
    """Guards: a chat that reads its whole history again."""
    stage = Play(Limits(n_slots=1, n_cells=1024, n_context=1024, n_step_tokens=512))
    first = stage.add(list(range(100)), 10)
    stage.finish_all()
    second = stage.add([*first.sequence.tokens, 900, 901], 10)
    stage.finish_all()
    assert second.sequence.n_reused == len(first.sequence.tokens)


def test_a_shared_beginning_is_parked_and_a_conversation_is_not() -> None:
    """Guards: a system text read again after every other prompt; old chats that slow attention down."""
    stage = Play(Limits(n_slots=1, n_cells=1024, n_context=512, n_step_tokens=512))
    system = list(range(100))
    for number in range(2):
        stage.add([*system, 500 + number, 501], 10)
        stage.finish_all()
    first = stage.add(list(range(300, 400)), 10)
    stage.finish_all()
    again = stage.add([*system, 502, 503], 10)
    stage.finish_all()
    assert again.sequence.n_reused == len(system)
    second = stage.add([*first.sequence.tokens, 900, 901], 10)
    stage.finish_all()
    assert second.sequence.n_reused == 0
    assert stage.scheduler.cells.n_cells == len(system) + len(second.sequence.tokens)


def test_promised_lengths_are_kept_while_growing_ones_give_way() -> None:
    """Guards: a reply with max_tokens failing because another grew; two preempted where one was enough."""
    stage = Play(Limits(n_slots=3, n_cells=1500, n_context=1400, n_step_tokens=64))
    steady = stage.add(list(range(10)), 600)
    one = stage.add(list(range(100, 110)), 1300, stated=False)
    stage.step()
    two = stage.add(list(range(200, 210)), 1300, stated=False)
    stage.finish_all(8000)
    assert steady.ended == "length"
    assert one.made == two.made == 1300


def test_alone_without_room_says_full() -> None:
    """Guards: a lone reply preempting itself for ever."""
    stage = Play(Limits(n_slots=2, n_cells=600, n_context=600, n_step_tokens=64))
    run = stage.add(list(range(10)), 2000, stated=False)
    stage.finish_all()
    assert run.ended == "context"
    assert len(run.sequence.tokens) == 600


def test_first_come_first_served() -> None:
    """Guards: a long request waiting for ever behind short ones that fit."""
    stage = Play(Limits(n_slots=2, n_cells=300, n_context=280, n_step_tokens=64))
    stage.add(list(range(100)), 50)
    long = stage.add(list(range(1000, 1100)), 170)
    short = [stage.add([2000 + number], 5) for number in range(6)]
    stage.finish_all()
    first_row = {
        id(row.sequence): number
        for number, step in reversed(list(enumerate(stage.steps)))
        for row in step.rows
    }
    assert all(first_row[id(long.sequence)] <= first_row[id(run.sequence)] for run in short)


def test_deterministic_steps_have_one_width() -> None:
    """Guards: a decode step whose width depends on what else runs; a prefill step of two prompts."""
    stage = Play(
        Limits(n_slots=4, n_cells=512, n_context=512, n_step_tokens=32, unified=False, deterministic=True)
    )
    for number in range(6):
        stage.add([number, *range(70 + number)], 5 + number)
    stage.finish_all()
    for step in stage.steps:
        if any(row.n_tokens > 1 or row.sequence.n_cached < row.sequence.n_prompt for row in step.rows):
            assert len(step.rows) == 1
            assert step.rows[0].start % 32 == 0
        elif step.rows:
            assert len(step.rows) + len(step.padding) == 4


def test_decoding_goes_on_while_prompts_keep_coming() -> None:
    """Guards: with per-sequence caches, a long reply that starves."""
    stage = Play(Limits(n_slots=2, n_cells=256, n_context=256, n_step_tokens=64, unified=False))
    long = stage.add(list(range(10)), 100)
    for number in range(300):
        if long.ended:
            break
        stage.add([1000 + number, *range(40)], 1)
        stage.step()
    assert long.ended == "length"


def test_a_second_copy_of_a_beginning_counts() -> None:
    """Guards: admission by the cells of one holder while another's are taken, and then too many in all."""
    stage = Play(Limits(n_slots=2, n_cells=128, n_context=128, n_step_tokens=64))
    common = [5] * 15
    stage.add([*common, 1], 60)
    stage.add([*common, 2], 10)
    for _ in range(12):
        stage.step()
    stage.add([*common, 3, 4], 36)
    stage.finish_all()
    assert all(run.ended == "length" for run in stage.runs)


def test_deterministic_prompts_begin_with_prefilled_cells_only() -> None:
    """Guards: cells that were decoded one at a time in a prompt that would read them as a chunk."""
    stage = Play(
        Limits(n_slots=2, n_cells=512, n_context=512, n_step_tokens=64, unified=False, deterministic=True)
    )
    first = stage.add(list(range(60)), 100)
    for _ in range(30):
        stage.step()
    second = stage.add([*first.sequence.tokens, 900], 5)
    stage.finish_all()
    assert second.sequence.n_reused == 0


def test_a_broken_step_scores_its_prompt_again() -> None:
    """Guards: tokens that are cached but were never shown with their logits."""
    stage = Play(Limits(n_slots=1, n_cells=512, n_context=512, n_step_tokens=64))
    run = stage.add(list(range(100)), 1, score_from=0, n_reusable=0)
    step = stage.scheduler.plan()
    stage.cache.do(step)
    stage.scheduler.resync(run.sequence, 40)
    del stage.cache.held[0][40:]
    stage.finish_all()
    assert sum(row.n_outputs for step in stage.steps for row in step.rows) == 100


def test_a_shift_spares_shared_cells() -> None:
    """Guards: moving the beginning that another running sequence shares."""
    stage = Play(Limits(n_slots=2, n_cells=400, n_context=100, n_step_tokens=64))
    shared = list(range(40))
    keeps = stage.add([*shared, 900], 45)
    shifts = stage.add([*shared, *range(700, 750)], 30, stated=False, can_shift=True)
    stage.finish_all()
    assert keeps.ended == shifts.ended == "length"
    assert shifts.sequence.tokens[:40] == shared


def test_a_shift_keeps_what_it_is_told_to() -> None:
    """Guards: a system text that scrolls away; kept tokens read again; more kept than the context holds."""
    stage = Play(Limits(n_slots=1, n_cells=100, n_context=100, n_step_tokens=64))
    system = list(range(40))
    run = stage.add([*system, *range(700, 730)], 200, stated=False, can_shift=True, n_keep=40)
    stage.finish_all()
    assert run.ended == "length"
    assert run.sequence.tokens[:40] == system
    assert run.sequence.dropped == (30, 40)
    again = stage.add([*system, 900], 1)
    stage.finish_all()
    assert again.sequence.n_reused == 40
    keeps_all = stage.add(list(range(70)), 200, stated=False, can_shift=True, n_keep=100)
    stage.finish_all()
    assert keeps_all.ended == "full"


@pytest.mark.parametrize("n_outputs", [None, 7])
def test_scored_prompts_get_all_their_logits(n_outputs: int | None) -> None:
    """Guards: a perplexity over fewer tokens than asked for, or over cached ones."""
    stage = Play(Limits(n_slots=1, n_cells=512, n_context=512, n_step_tokens=50, n_outputs=n_outputs))
    stage.add(list(range(200)), 1)
    stage.finish_all()
    stage.steps.clear()
    stage.add(list(range(200)), 1, score_from=120, n_reusable=120)
    stage.finish_all()
    assert sum(row.n_outputs for step in stage.steps for row in step.rows) == 80
