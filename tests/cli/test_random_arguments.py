"""Any words behind `dsmoe`: an answer or an error of at most three lines, and never anything else."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from support.random_arguments import Run, one, prepare

STATUSES = (0, 1, 2)
SHORT, LONG = 250, 20_000


def faults_of(run: Run) -> list[str]:
    """What is wrong with how a run ended."""
    faults = []
    if not isinstance(run.status, int) or run.status not in STATUSES:
        faults.append(f"status {run.status!r}")
    if "internal error" in run.said or "Traceback" in run.said:
        faults.append("a bug shown as an error")
    if len(run.complaint.splitlines()) > 3 or any(not line for line in run.complaint.splitlines()):
        faults.append("a complaint of more than three lines, or with an empty one")
    if run.status == 2 and "error: " not in run.said and "Usage: " not in run.said:
        faults.append("a refusal without a word")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", run.said):
        faults.append("control characters")
    return faults


def faulty(seeds: range, folder: Path, patch: pytest.MonkeyPatch) -> dict[int, object]:
    """The seeds that show a fault, with what it is."""
    template = folder / "template"
    template.mkdir()
    patch.chdir(folder)
    prepare(template, patch)
    found: dict[int, object] = {}
    statuses: Counter[object] = Counter()
    for seed in seeds:
        run = one(seed, template, folder / "here", patch)
        statuses[run.status] += 1
        if faults := faults_of(run):
            found[seed] = (faults, run)
    # Many of the lines do something, and many are wrong.
    assert min(statuses[status] for status in STATUSES) > len(seeds) // 50
    return found


def test_any_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a traceback, a message that has to be cut, a status that means nothing."""
    assert faulty(range(SHORT), tmp_path, monkeypatch) == {}


@pytest.mark.soak
def test_many_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the same, of as many lines as a night allows."""
    assert faulty(range(SHORT, SHORT + LONG), tmp_path, monkeypatch) == {}
