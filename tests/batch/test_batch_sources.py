"""Plain text, CSV and templates: places of lines, fields, and errors by line."""

from __future__ import annotations

import csv
import io
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.batches import requests, write_lines

from dsmoe_local.base.errors import DsmoeError, FormatError, UsageError
from dsmoe_local.batch.input_form import InputForm, parse_template
from dsmoe_local.batch.sources import Source
from dsmoe_local.engine.types import Message


def test_text_lines(tmp_path: Path) -> None:
    """Guards: JSON or braces in a text line interpreted; a CR kept."""
    path = write_lines(tmp_path / "in.txt", ['{"prompt": 1}', "", "a {b}\r", "c\u2028d", b"\xff"])
    *good, bad = requests(path, InputForm(text=True))
    assert [(made.id, made.prompt) for made in (make() for make in good)] == [
        ("line-1", '{"prompt": 1}'),
        ("line-3", "a {b}"),
        ("line-4", "c\u2028d"),
    ]
    with pytest.raises(DsmoeError, match="UTF-8"):
        bad()
    (only,) = requests(write_lines(path, ["hi"]), InputForm(text=True, chat=True))
    assert only().prompt == (Message("user", "hi"),)


def test_a_template_over_json(tmp_path: Path) -> None:
    """Guards: a value that is printed as Python; a missing field left empty; data taken for settings."""
    template = InputForm(template=parse_template("{{x}} {a.b}: {n}{l}"))
    path = write_lines(
        tmp_path / "in.jsonl",
        [{"id": "i", "a.b": "é{n}", "n": 1.5, "l": [True], "temperature": "warm"}, {"id": 5, "l": None}],
    )
    source = Source(path, template)
    assert [source.line(span.number, raw).id for span, raw in source.spans()] == ["i", "5"]
    source.close()
    good, bad = requests(path, template)
    assert (good().id, good().prompt) == ("i", "{x} é{n}: 1.5[true]")
    with pytest.raises(DsmoeError, match=r"field 'a\.b' is missing"):
        bad()


@pytest.mark.parametrize("text", ["plain", "{", "{}", "{a:b}", "{a!r}", "{0:}{b!s}"])
def test_bad_templates(text: str) -> None:
    """Guards: a template that does not mean what it seems to."""
    with pytest.raises(UsageError, match="template"):
        parse_template(text)


def test_csv(tmp_path: Path) -> None:
    """Guards: rows split inside quotes; a wrong row that shifts the others; columns taken for settings."""
    path = tmp_path / "in.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text,n\r\nx,"one, ""two""\nthree",7\r\n\r\ny,short\nz,last,8\nw,a"b"\xff,9\n"open,x'
    )
    found = requests(path, InputForm(template=parse_template("{text}|{n}")))
    made = [found[0](), found[2]()]
    assert [(each.id, each.prompt) for each in made] == [("x", 'one, "two"\nthree|7'), ("z", "last|8")]
    for make, message in zip((found[1], found[3], found[4]), ("2 cells", "UTF-8", "not CSV"), strict=True):
        with pytest.raises(DsmoeError, match=message):
            make()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('x,"open', "a quote is not closed, so that the rows after it belong to its cell"),
        ('x,"a"b', "text after the closing quote of a cell"),
        ("x,a\rb", "a carriage return outside of quotes"),
        ("x", "the row has 1 cell, the header 2"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path: Path, row: str, told: str) -> None:
    """Guards: the csv module's messages."""
    path = write_lines(tmp_path / "in.csv", ["id,text", "a,b", row])
    _, make = requests(path, InputForm(template=parse_template("{text}")))
    with pytest.raises(DsmoeError) as refusal:
        make()
    assert told in str(refusal.value)


def test_csv_columns(tmp_path: Path) -> None:
    """Guards: an error for each line instead of one for a misspelt column."""
    path = write_lines(tmp_path / "in.tsv", ["a\tb", "1\t2"])
    with pytest.raises(FormatError, match="no column 'c'"):
        Source(path, InputForm(template=parse_template("{c}")))
    with pytest.raises(UsageError, match="template"):
        Source(path, InputForm())
    with pytest.raises(FormatError, match="twice"):
        Source(write_lines(path, ["a\ta"]), InputForm(template=parse_template("{a}")))


_CELL = st.text(st.sampled_from('ab",\n\r é\u2028'), max_size=6)


@given(st.lists(st.tuples(_CELL, _CELL), min_size=1, max_size=8))
def test_csv_rows_are_found_again(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    """Guards: wrong offsets after quoted line breaks. The csv module's own writer is the oracle."""
    path = tmp_path_factory.mktemp("csv") / "in.csv"
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    path.write_bytes(text.getvalue().encode())
    source = Source(path, InputForm(template=parse_template("{a}{b}")))
    spans = [span for span, _ in source.spans()]
    random.Random(0).shuffle(spans)
    found = {span.number: source.line(span.number, source.read(span)) for span in spans}
    source.close()
    prompts = [found[number].values.get("prompt") for number in sorted(found)]
    assert prompts == [first + second for first, second in rows]


def test_templates_cannot_reach_attributes() -> None:
    """Guards: str.format, with which a template could look into objects."""
    template = parse_template("{a.__class__}")
    assert template.fields == ("a.__class__",)
    with pytest.raises(DsmoeError, match="missing"):
        template.fill({"a": "x"})


def test_a_quote_that_is_not_closed_takes_little_memory(tmp_path: Path) -> None:
    """Guards: an object for each line after the quote, which took gigabytes for a table of 80 MB."""
    path = tmp_path / "in.csv"
    path.write_bytes(b'a\n"' + b"x\n" * 200_000)
    source = Source(path, InputForm(template=parse_template("{a}")))
    tracemalloc.start()
    try:
        ((span, raw),) = source.spans()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        source.close()
    assert span.number == 2
    assert span.length == len(raw) == 400_001
    # The csv module uses four bytes per character and doubles its buffer.
    assert most < 30 * len(raw)
