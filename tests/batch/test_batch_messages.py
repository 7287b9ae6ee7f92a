"""Messages: inputs of a wrong kind, failures, the summary."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.batches import answer, batch, by_id, records, run_batch
from support.fake_engine import FakeEngine

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError
from dsmoe_local.base.progress import Event, Note
from dsmoe_local.batch.input_form import InputForm, parse_template
from dsmoe_local.batch.summary import BatchSummary, failures_in_words
from dsmoe_local.engine.errors import PromptError

PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"


@pytest.mark.parametrize(
    ("content", "form", "told"),
    [
        (PDF * 40, InputForm(), "a PDF"),
        (PDF, InputForm(text=True), "a PDF"),
        (b"\x1f\x8b\x08\0\0\0\0\0", InputForm(text=True), "a gzip file"),
        (b'{"prompt": "a"}\n\0\0\0\n', InputForm(), "a binary file"),
        ('{"prompt": "a"}\n'.encode("utf-16"), InputForm(), "UTF-16"),
        (b"one\ntwo\nthree\n", InputForm(), "no line of the input can be read: not a JSON object"),
        ("naïve\nrésumé\n".encode("latin-1"), InputForm(text=True), "not UTF-8 at byte 3"),
        (b'{"a": 1}\n{"a": 2}\n', InputForm(template=parse_template("{b}")), "field 'b' is missing"),
        (b"[" * 100_000, InputForm(), "no line of the input can be read"),
    ],
)
def test_an_input_of_a_wrong_kind(tmp_path: Path, content: bytes, form: InputForm, told: str) -> None:
    """Guards: an error record for each line of a PDF."""
    options = batch(tmp_path, input=form)
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(FormatError) as refusal:
        run_batch(FakeEngine(), options)
    assert told in str(refusal.value)
    assert not options.out.exists()


def test_a_bad_line_among_good_ones_is_no_wrong_kind(tmp_path: Path) -> None:
    """Guards: a whole input refused for one line."""
    found = by_id(answer(FakeEngine(), batch(tmp_path, *["bad"] * 5, {"prompt": "a"}, b'{"prompt": "\xff"}')))
    assert len(found) == 7
    assert [name for name, record in found.items() if not record["error"]] == ["line-6"]


def test_a_folder_or_nothing_as_input(tmp_path: Path) -> None:
    """Guards: advice that does not help, such as to pipe a folder in."""
    options = batch(tmp_path)
    with pytest.raises(FileError, match="the input does not exist"):
        run_batch(FakeEngine(), replace(options, sources=[tmp_path / "missing"]))
    with pytest.raises(FileError, match="the input is a folder") as refusal:
        run_batch(FakeEngine(), replace(options, sources=[tmp_path]))
    assert refusal.value.remedy == f"name a file, such as {tmp_path / 'in.jsonl'}"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="name a file with one request per line"):
        run_batch(FakeEngine(), replace(options, sources=[tmp_path / "empty"]))


def test_why_lines_failed(tmp_path: Path) -> None:
    """Guards: a number of failures without a reason; the reasons of earlier runs forgotten."""
    lines: list[str | bytes | dict[str, Any]] = [
        "bad",
        {"prompt": "x" * 99},
        {"prompt": "a", "temprature": 1},
    ]
    lines += [b'{"prompt": "\xff"}', {"prompt": "y"}]
    engine = FakeEngine(n_context=50)
    expected = {"not_json": 1, "context_length_error": 1, "invalid_request": 1, "not_utf8": 1}
    summary = run_batch(engine, batch(tmp_path, *lines))
    assert summary.failures == expected
    assert summary.in_words().startswith("5 records, 4 lines failed (1 ")
    for part in ("1 not JSON", "1 with a prompt that is longer than the context", "1 not UTF-8"):
        assert part in summary.in_words()
    again = run_batch(engine, batch(tmp_path, *lines, "worse"))
    assert again.failures == expected | {"not_json": 2}
    assert again.in_words().startswith("6 records, 5 of them from earlier runs, 5 lines failed (2 not JSON, ")
    assert again.as_json()["failures"] == again.failures
    assert again.as_json()["n_failed"] == 5


def test_a_corrected_line_has_not_failed(tmp_path: Path) -> None:
    """Guards: an exit status of 1 for ever, because of a line that is no longer in the input."""
    good = {"id": "b", "prompt": "y"}
    run_batch(FakeEngine(), batch(tmp_path, '{"id": "a", "prompt": "x",}', good, "bad"))
    summary = run_batch(FakeEngine(), batch(tmp_path, {"id": "a", "prompt": "x"}, good, "bad"))
    assert (summary.n_records, summary.failures) == (4, {"not_json": 1})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prompt": "a", "max_token": 5}, "unknown field 'max_token'; did you mean max_tokens?"),
        ({"prompt": "a", "xyzzy": 5}, "unknown field 'xyzzy'"),
        ({"promt": "a"}, "the line has no prompt and no messages; did you mean prompt?"),
        ({"message": []}, "the line has no prompt and no messages; did you mean messages?"),
        ({"text": "a"}, "the line has no prompt and no messages"),
    ],
)
def test_misspelled_fields(tmp_path: Path, line: dict[str, Any], told: str) -> None:
    """Guards: a misspelling that the user has to find without help."""
    found = answer(FakeEngine(), batch(tmp_path, {"prompt": "b"}, line))
    assert by_id(found)["line-2"]["error"]["message"] == f"line 2: {told}"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, in which files cannot be made")
def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    """Guards: a message that names the lock file, which the user does not know, and gives no advice."""
    with pytest.raises(FileError, match="the output cannot be written") as refusal:
        run_batch(FakeEngine(), batch(tmp_path, {"prompt": "a"}, out=Path("/proc/x.jsonl")))
    assert str(refusal.value).endswith("\n/proc/x.jsonl\nname an output in a folder that you may write to")


def test_numbers_and_nouns() -> None:
    """Guards: "1 records"; a list of reasons that fills the screen."""
    assert BatchSummary(n_records=1).in_words().startswith("1 record; 0.0 s: 0 tokens read")
    assert BatchSummary(n_records=2000, n_prompt_tokens=1).in_words().startswith("2,000 records; ")
    assert failures_in_words(Counter(odd_error=1)) == "1 line failed (1 odd error)"
    many = Counter({f"kind_{number}": 9 - number for number in range(6)})
    assert failures_in_words(many).endswith("6 kind 3, and others)")


def test_a_bad_line_is_told_once(tmp_path: Path) -> None:
    """Guards: "1 records"; a count of the wrong lines."""
    options = batch(tmp_path, {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"})
    answer(FakeEngine(), options)
    notes: list[Event] = []
    answer(FakeEngine(), batch(tmp_path, {"id": "a", "prompt": "x"}), notes.append)
    told = [note.text for note in notes if isinstance(note, Note)]
    assert told == ["2 records from earlier runs", "1 record for lines that are no longer in the input"]
    stop = threading.Event()
    stop.set()
    with pytest.raises(DsmoeError, match="interrupted"):
        run_batch(FakeEngine(), replace(options, restart=True), stop=stop)


def test_an_error_of_the_engine_is_an_error_of_its_line(tmp_path: Path) -> None:
    """Guards: a record without the engine's message."""

    def reply(text: str) -> str:
        raise PromptError("odd", where="here", remedy="leave it")

    options = batch(tmp_path, {"prompt": "a"})
    answer(FakeEngine(reply), options)
    assert records(options.out)[0]["error"]["message"] == "line 1: odd; here; leave it"
