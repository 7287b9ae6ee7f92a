"""`--id-field` and `--keep`: ids from a field, and fields that are copied to the records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai.types import BatchError
from support.batches import answer, batch, by_id, run_batch, write_lines
from support.fake_engine import FakeEngine

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, UsageError
from dsmoe_local.batch.input_form import InputForm, parse_template


def chat(**line: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hi"}], **line.pop("body", {})}
    return {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body, **line}


@pytest.mark.parametrize("form", ["openai", "simple"])
def test_fields_of_json_lines(tmp_path: Path, form: str) -> None:
    """Guards: a record known by its line's number alone; a field called unknown, though it was asked for; one
    that takes the place of the record's own.
    """
    lines: list[bytes | dict[str, Any]] = [
        {"sku": "a", "prompt": "x", "label": {"deep": [1.5, None]}, "text": "mine", "error": "mine"},
        {"sku": 7, "prompt": "y", "seed": 3, "id": "old"},
        {"sku": "bad", "label": "z"},
        {"label": "no id", "prompt": "x"},
        b"{broken",
    ]
    names = InputForm(id_field="sku", keep=("label", "text", "error", "seed", "id"))
    engine = FakeEngine()
    found = by_id(answer(engine, batch(tmp_path, *lines, input=names, form=form)))
    kept = {name: record["kept"] for name, record in found.items()}
    nothing = dict.fromkeys(names.keep)
    assert kept == {
        "a": nothing | {"label": {"deep": [1.5, None]}, "text": "mine", "error": "mine"},
        "7": nothing | {"seed": 3, "id": "old"},
        "bad": nothing | {"label": "z"},
        "line-4": nothing | {"label": "no id"},
        "line-5": nothing,
    }
    assert {request.id: request.sampling.seed for request in engine.requests} == {"a": None, "7": 3}
    assert {name for name, record in found.items() if record["error"]} == {"bad", "line-4", "line-5"}
    assert "the id field 'sku' is missing" in found["line-4"]["error"]["message"]
    if form == "simple":
        assert found["a"]["text"] == "x"
    else:
        BatchError.model_validate(found["line-4"]["error"], strict=True)


def test_fields_of_openai_lines(tmp_path: Path) -> None:
    """Guards: a field within the body, where OpenAI's metadata is, or beside it, which is not found or is
    refused.
    """
    lines = [
        chat(custom_id="a", label=1, body={"metadata": {"k": "v"}}),
        chat(custom_id="b", body={"label": 2}),
        chat(custom_id="c", body={"other": 2}),
    ]
    options = batch(tmp_path, *lines, form="openai", input=InputForm(keep=("label", "metadata")))
    found = by_id(answer(FakeEngine(), options))
    assert found["a"]["kept"] == {"label": 1, "metadata": {"k": "v"}}
    assert found["b"]["kept"] == {"label": 2, "metadata": None}
    assert found["b"]["error"] is None
    assert "unknown field 'other'" in found["c"]["error"]["message"]


def test_columns(tmp_path: Path) -> None:
    """Guards: a table whose ids are line numbers; a misspelt column found on every row, or never."""
    table = write_lines(tmp_path / "in.csv", ["key,label,text", 'k1,"a, b",x', "k2,,y", ",c,z"])
    form = InputForm(template=parse_template("{text}!"), id_field="key", keep=("label", "key"))
    options = batch(tmp_path, sources=[table], input=form)
    found = by_id(answer(FakeEngine(), options))
    assert {name: record["kept"] for name, record in found.items()} == {
        "k1": {"label": "a, b", "key": "k1"},
        "k2": {"label": "", "key": "k2"},
        "line-4": {"label": "c", "key": ""},
    }
    assert found["k1"]["text"] == "x!"
    assert "'key' is missing" in found["line-4"]["error"]["message"]
    for change in ({"id_field": "kye"}, {"keep": ("kye",)}):
        with pytest.raises(FormatError, match="no column 'kye'"):
            run_batch(FakeEngine(), replace(options, input=replace(form, **change), restart=True))
    write_lines(table, ["key,label,text", '1,"a, b",x', '2,"a, b",x'])
    with pytest.raises(FormatError, match="the id 'a, b' occurs twice"):
        run_batch(FakeEngine(), replace(options, input=replace(form, id_field="label"), restart=True))


def test_a_misspelt_field(tmp_path: Path) -> None:
    """Guards: hours of work whose records have only null."""
    options = batch(tmp_path, {"prompt": "a", "label": 1}, input=InputForm(keep=("label", "labl")))
    with pytest.raises(FormatError, match="no line has the field 'labl'"):
        run_batch(FakeEngine(), options)
    with pytest.raises(FormatError, match="the id field 'sku' is missing"):
        run_batch(FakeEngine(), replace(options, input=InputForm(id_field="sku")))
    assert answer(FakeEngine(), batch(tmp_path, input=InputForm(keep=("label",)))) == []


def test_text_has_no_fields() -> None:
    """Guards: an option that silently does nothing."""
    for names, flag in ({"keep": ("a",)}, "--keep"), ({"id_field": "a"}, "--id-field"):
        with pytest.raises(UsageError, match=flag):
            InputForm(text=True, **names)


def test_a_run_goes_on_with_the_same_fields(tmp_path: Path) -> None:
    """Guards: records of one output that carry different fields; a kept value that changes and stays old."""
    options = batch(tmp_path, {"prompt": "a", "label": 1}, input=InputForm(keep=("label",)))
    answer(FakeEngine(), options)
    engine = FakeEngine()
    assert len(answer(engine, options)) == 1
    assert engine.requests == []
    changes: list[tuple[InputForm, str]] = [
        (InputForm(keep=("label", "prompt")), "keep: ['label'] then, ['label', 'prompt'] now"),
        (InputForm(keep=("label",), id_field="label"), "id_field: not set then, label now"),
    ]
    for form, told in changes:
        with pytest.raises(FileError) as refusal:
            run_batch(FakeEngine(), replace(options, input=form))
        assert told in str(refusal.value)
    batch(tmp_path, {"prompt": "a", "label": 2})
    with pytest.raises(DsmoeError, match="a line has changed"):
        run_batch(FakeEngine(), options)


def test_numbers_that_json_cannot_hold(tmp_path: Path) -> None:
    """Guards: 1e999, which Python reads as infinity, ending the batch when its record is written."""
    lines = [b'{"prompt": "a", "label": 1e999}', b'{"prompt": "b", "label": 1e300}']
    found = by_id(answer(FakeEngine(), batch(tmp_path, *lines, input=InputForm(keep=("label",)))))
    assert "the number 1e999 is out of range" in found["line-1"]["error"]["message"]
    assert found["line-2"]["kept"] == {"label": 1e300}
