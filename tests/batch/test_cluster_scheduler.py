"""Which worker gets which lines: every task is answered once, whatever happens to workers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_local.batch.cluster.scheduler import Scheduler


def whole(task: int, n_most: int) -> int:
    return n_most


def scheduler(n_tasks: int, **workers: int) -> Scheduler:
    made = Scheduler(n_tasks, whole)
    for name, capacity in workers.items():
        made.join(name, capacity)
    return made


def take(made: Scheduler, worker: str, now: float = 0.0) -> list[int]:
    return made.take(worker, now, 10**9)


def test_neighbours_stay_together() -> None:
    """Guards: lines with a common prefix that are dealt out to all workers, each of which then reads it."""
    made = scheduler(1000, a=4, b=4)
    given_to: dict[str, list[int]] = {"a": take(made, "a"), "b": take(made, "b")}
    assert given_to == {"a": [0, 1, 2, 3], "b": [64, 65, 66, 67]}
    for task in (0, 1):
        assert made.answer("a", task, 1.0)
    assert take(made, "a") == [4, 5]


def test_groups_end_where_prefixes_do() -> None:
    """Guards: a group that takes the first lines of the next prefix along."""
    asked: list[tuple[int, int]] = []

    def group(task: int, n_most: int) -> int:
        asked.append((task, n_most))
        return 10

    made = Scheduler(1000, group)
    made.join("a", 8)
    made.join("b", 8)
    take(made, "a")
    assert take(made, "b")[0] == 10
    assert asked == [(0, 64), (10, 64)]


def test_the_end_is_shared() -> None:
    """Guards: the last lines wait for one worker while others have nothing to do."""
    made = scheduler(10, a=8, b=8)
    assert take(made, "a") == [0, 1, 2, 3, 4]
    assert sorted(take(made, "b")) == [5, 6, 7, 8, 9]
    assert made.n_waiting == 0


def test_a_worker_without_work_takes_over() -> None:
    """Guards: a slow worker keeps a group to itself at the end."""
    made = scheduler(128, slow=2, fast=2)
    take(made, "slow")
    answered = 0
    while tasks := take(made, "fast"):
        for task in tasks:
            answered += made.answer("fast", task, 1.0)
    assert made.n_waiting == 0
    assert answered == 126


def test_late_tasks_are_copied_once() -> None:
    """Guards: a batch that waits for a worker that is ten times slower; a record that is written twice."""
    made = scheduler(4, slow=2, a=2, b=2)
    assert take(made, "slow") == [0, 1]
    assert take(made, "a") == [2, 3]
    for task in (2, 3):
        assert made.answer("a", task, 1.0)
    assert take(made, "a", 1.5) == []
    assert take(made, "a", 2.5) == [0, 1]
    assert take(made, "b", 9.0) == []
    assert made.answer("a", 0, 3.0)
    assert not made.answer("slow", 0, 4.0)
    assert made.answer("slow", 1, 4.0)
    assert made.n_unanswered == 0
    assert made.lose("a") == []
    assert made.n_waiting == 0


def test_late_tasks_are_copied_at_the_limit() -> None:
    """Guards: --ordered with one slow line: all other workers wait for it, and answer nothing more."""
    made = Scheduler(100, whole, ordered=True)
    join(made, slow="a", fast="b")
    assert made.take("slow", 0.0, 4) == [0, 1]
    assert made.take("fast", 0.0, 4) == [2, 3]
    assert [made.answer("fast", task, 1.0) for task in (2, 3)] == [True, True]
    assert made.take("fast", 1.5, 4) == []
    assert made.n_waiting == 96
    assert made.take("fast", 9.0, 4) == [0, 1]


def test_only_the_culprit_of_a_crash_fails() -> None:
    """Guards: lines that fail because another line crashed the engine; a line that is retried for ever."""
    made = scheduler(3, a=3)
    assert take(made, "a") == [0, 1, 2]
    assert made.crash("a") == []
    failed = []
    for _ in range(3):
        made.join("a", 3)
        while (tasks := take(made, "a")) and tasks != [1]:
            assert len(tasks) == 1
            assert take(made, "a") == [], "something else runs beside a suspect"
            assert made.answer("a", tasks[0], 1.0)
        if tasks == [1]:
            failed += made.crash("a")
            made.fail(1)
            continue
        break
    assert failed == [1]
    assert made.n_unanswered == 0


def test_a_task_that_takes_its_workers_along_fails() -> None:
    """Guards: a line that kills one worker's process after the other; lines beside it that fail with it."""
    made = Scheduler(2, whole)
    failed: list[int] = []
    n_lost = 0
    while made.n_unanswered:
        worker = f"w{n_lost}"
        made.join(worker, 2)
        while tasks := take(made, worker):
            if 0 in tasks:
                n_lost += 1
                for task in made.lose(worker):
                    failed.append(task)
                    made.fail(task)
                break
            for task in tasks:
                made.answer(worker, task, 1.0)
    assert failed == [0]
    assert n_lost == 4


def join(made: Scheduler, **nodes: str) -> None:
    """Add workers of 2 tasks, by the names of their nodes."""
    for worker, node in nodes.items():
        made.join(worker, 2, node)


@pytest.mark.parametrize(("how", "node"), [("crash", "a"), ("crash", "b"), ("lose", "b")])
def test_a_broken_worker_fails_no_tasks(how: str, node: str) -> None:
    """Guards: one worker that always ends, and turns tasks that others can answer into failures; one that
    is started for ever. Its worker has another name after a loss.
    """
    made = Scheduler(200, whole)
    join(made, good="a", bad=node)
    name, n_ends, held, now = "bad", 0, take(made, "good"), 0.0
    while made.n_unanswered:
        now += 1.0
        if not made.is_bad(name, node):
            assert n_ends < 20
            n_ends += 1
            assert getattr(made, how)(name) == []
            name = name if how == "crash" else f"bad{n_ends}"
        else:
            made.lose(name)
        if held and now % 3 == 0:
            made.answer("good", held.pop(0), now)
        held += made.take("good", now, 200)
        if not made.is_bad(name, node):
            made.join(name, 2, node)
            take(made, name, now)


def test_a_suspect_fails_after_two_nodes() -> None:
    """Guards: a second trial on the node of the first, though another node has workers; a good node that
    is given up because of bad tasks.
    """
    made = Scheduler(1, whole)
    join(made, a1="a", a2="a", b1="b")
    assert take(made, "a1") == [0]
    assert made.crash("a1") == []
    assert take(made, "a2") == [0]
    assert made.crash("a2") == []
    join(made, a1="a", a2="a")
    assert (take(made, "a1"), take(made, "a2")) == ([], [])
    assert take(made, "b1") == [0]
    assert made.crash("b1") == [0]
    made.fail(0)
    assert made.n_unanswered == 0
    assert not any(made.is_bad(worker, worker[0]) for worker in ("a1", "a2", "b1"))


def test_a_suspect_whose_other_place_is_gone() -> None:
    """Guards: a suspect that waits for ever for a node that is not there any more."""
    made = Scheduler(1, whole)
    join(made, a="a", b="b")
    take(made, "a")
    made.crash("a")
    join(made, a="a")
    assert take(made, "a") == [0]
    made.crash("a")
    join(made, a="a")
    assert take(made, "a") == []
    made.lose("b")
    assert take(made, "a") == [0]
    assert made.crash("a") == [0]


@pytest.mark.parametrize("ordered", [False, True])
def test_only_tasks_before_the_limit(ordered: bool) -> None:
    """Guards: records that pile up in memory while the first line is slow."""
    made = Scheduler(100, whole, ordered=ordered)
    made.join("a", 8)
    assert made.take("a", 0.0, 5) == [0, 1, 2, 3, 4]
    assert made.take("a", 0.0, 5) == []
    assert made.take("a", 0.0, 7) == [5, 6]


_STEPS = st.lists(
    st.tuples(st.sampled_from(["join", "take", "answer", "lose", "crash"]), st.integers(0, 5)),
    max_size=150,
)


@given(_STEPS, st.integers(0, 60), st.integers(1, 6), st.booleans())
def test_every_task_once(steps: list[tuple[str, int]], n_tasks: int, capacity: int, ordered: bool) -> None:
    """Guards: a task that is lost, or answered or failed twice, in any sequence of events."""
    made = Scheduler(n_tasks, lambda task, n_most: (n_most + 1) // 2, ordered=ordered)
    held: dict[str, list[int]] = {}
    ended = Counter[int]()
    now = 0.0

    def fail(tasks: list[int]) -> None:
        for task in tasks:
            ended[task] += 1
            made.fail(task)

    def answer(worker: str) -> None:
        if held[worker]:
            task = held[worker].pop(0)
            ended[task] += made.answer(worker, task, now)

    for what, number in steps:
        now += 1.0
        worker = f"w{number}"
        if what == "join" and worker not in held:
            made.join(worker, capacity, f"node {number % 2}")
            held[worker] = []
        elif worker not in held:
            continue
        elif what == "take":
            held[worker] += made.take(worker, now, n_tasks)
            assert len(held[worker]) <= capacity
        elif what == "answer":
            answer(worker)
        elif what in ("lose", "crash"):
            fail(getattr(made, what)(worker))
            del held[worker]
    for worker in {f"w{number}" for number in range(6)} - set(held):
        made.lose(worker)  # after a crash
    if not held:
        made.join("last", capacity)
        held["last"] = []
    while made.n_unanswered:
        now += 1.0
        before = made.n_unanswered, sum(map(len, held.values()))
        for worker in held:
            held[worker] += made.take(worker, now, n_tasks)
            while held[worker]:
                answer(worker)
        assert (made.n_unanswered, sum(map(len, held.values()))) != before, "nothing happens any more"
    assert ended == Counter(range(n_tasks))
