"""Long work: its lines of progress where no bar can be drawn, and ignored signals."""

from __future__ import annotations

import signal
import threading
from io import StringIO

import pytest
from rich.console import Console

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Event, Finished, Listener, Note, Started
from dsmoe_local.cli import progress
from dsmoe_local.cli.progress import ProgressView, run_with_progress

READING = (Started("reading", 2048, unit="tokens"), *(Advanced(512),) * 4, Finished("reading"))
WRITING = (Started("writing", 10_000_000, done=2_000_000), *(Advanced(2_000_000, "blk.1"),) * 4)


def told(*rows: tuple[str, int]) -> list[str]:
    return [f"reading: {count} of 2,048 tokens, {percent}%" for count, percent in rows]


@pytest.mark.parametrize(
    ("seconds", "events", "lines"),
    [
        pytest.param(1, READING, [], id="soon over"),
        pytest.param(31, READING, told(("512", 25), ("1,024", 50), ("1,536", 75), ("2,048", 100)), id="slow"),
        pytest.param(16, READING, told(("1,024", 50), ("2,048", 100)), id="every other"),
        pytest.param(
            16, WRITING, ["writing: 6 MB of 10 MB, 60%", "writing: 10 MB of 10 MB, 100%"], id="resumed"
        ),
        pytest.param(1, READING * 8, told(("1,024", 50)), id="the clock is of all stages"),
        pytest.param(31, (Started("empty", 0), Advanced(0)), ["empty: 0 B of 0 B"], id="nothing to do"),
        pytest.param(31, (Advanced(1), Finished("x"), Advanced(1)), [], id="outside stages"),
        pytest.param(31, (Note("a\nb"),), ["note: a b"], id="note"),
        pytest.param(
            31,
            (Started("[red]\x1b[2J", 4, unit="tokens"), Advanced(1)),
            ["[red]\N{SYMBOL FOR ESCAPE}[2J: 1 of 4 tokens, 25%"],
            id="foreign text",
        ),
    ],
)
def test_lines_where_no_bar_can_be_drawn(seconds: float, events: tuple[Event, ...], lines: list[str]) -> None:
    """Guards: a log that is silent for an hour, or that has a line for every step."""
    moments = iter(range(10_000))
    out = StringIO()
    view = ProgressView(
        Console(file=out, markup=False, highlight=False, width=200), lambda: seconds * next(moments)
    )
    for event in events:
        view.listen(event)
    view.close()
    assert out.getvalue().splitlines() == lines


def test_a_double_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a double Ctrl-C that hides how to continue; one that cannot end work that hangs."""

    def work(listen: Listener, stop: threading.Event) -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        raise InterruptedRunError("interrupted", remedy="run the same command again")

    monkeypatch.setattr(progress, "_SAME_SECONDS", 1000.0)
    with pytest.raises(InterruptedRunError, match="run the same command again"):
        run_with_progress(work)
    monkeypatch.setattr(progress, "_SAME_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run_with_progress(work)


def test_ignored_signals_do_not_stop_work() -> None:
    """Guards: a background job of a script that Ctrl-C for the script stops."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_with_progress(lambda listen, stop: signal.raise_signal(signal.SIGINT), stop)
        assert not stop.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
