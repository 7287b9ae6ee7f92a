"""Lines to requests: strict JSON, one error per mistake, every field honoured or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.batches import requests, write_lines

from dsmoe_local.base.errors import DsmoeError, FileError
from dsmoe_local.batch import lines
from dsmoe_local.batch.input_form import InputForm
from dsmoe_local.batch.sources import Source
from dsmoe_local.engine.types import Message, Request, SamplingParameters
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.fields import HONOURED, IGNORED, NEUTRAL, TOOL_FIELDS
from dsmoe_local.protocol.requests import RequestDefaults

DEFAULTS = RequestDefaults(SamplingParameters(temperature=0.5), max_tokens=7, stop=("END",))
CHAT = "/v1/chat/completions"


def request(folder: Path, line: dict[str, Any] | bytes) -> Request:
    (make,) = requests(write_lines(folder / "in.jsonl", [line]), defaults=DEFAULTS)
    return make()


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def called(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


CALL = called("f", "{}")


def chat(body: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "b"}]
    return {"custom_id": "c", "method": "POST", "url": CHAT, "body": {"messages": messages, **body}}


def completion(body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "p", **body}}


def test_short_lines_and_defaults(tmp_path: Path) -> None:
    """Guards: a field that is read but not used; a default that wins over the line."""
    path = write_lines(
        tmp_path / "in.jsonl",
        [
            {"prompt": "a"},
            {
                "custom_id": 9,
                "prompt": [1, 2],
                "max_tokens": 3,
                "stop": ["p", "q"],
                "repetition_penalty": 1.5,
            },
            {"id": "x", "messages": [{"role": "user", "content": "b"}], "temperature": 0, "stop": "S"},
        ],
    )
    first, second, third = (make() for make in requests(path, defaults=DEFAULTS))
    assert first == Request("line-1", "a", DEFAULTS.sampling, max_tokens=7, stop=("END",))
    sampling = replace(DEFAULTS.sampling, repeat_penalty=1.5)
    assert second == Request("9", (1, 2), sampling, max_tokens=3, stop=("p", "q"))
    sampling = replace(DEFAULTS.sampling, temperature=0)
    assert third == Request("x", (Message("user", "b"),), sampling, max_tokens=7, stop=("S",))


def test_an_openai_line(tmp_path: Path) -> None:
    """Guards: a field that vLLM and OpenAI honour, ignored."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    made = request(
        tmp_path,
        chat(
            {
                "model": "gpt-4o-mini",
                "messages": [
                    {"role": "developer", "content": "be brief"},
                    {
                        "role": "user",
                        "name": "u",
                        "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}],
                    },
                    {"role": "assistant", "content": "z", "tool_calls": [], "refusal": None},
                ],
                "max_completion_tokens": 5,
                "temperature": 0.25,
                "top_p": 0.5,
                "top_k": -1,
                "min_p": 0.125,
                "n": 3,
                "seed": -2,
                "stop": None,
                "logprobs": True,
                "top_logprobs": 2,
                "logit_bias": {"17": -100, "5": 1.5},
                "presence_penalty": 0.5,
                "frequency_penalty": -0.5,
                "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
                "stream": True,
                "user": "me",
                "metadata": {"a": "b"},
                "store": False,
                "tools": [],
            }
        ),
    )
    assert made.id == "c"
    assert made.prompt == (
        Message("system", "be brief"),
        Message("user", "x\ny"),
        Message("assistant", "z"),
    )
    assert (made.max_tokens, made.n, made.stop) == (5, 3, ("END",))
    assert (made.logprobs, made.top_logprobs, made.logit_bias) == (True, 2, ((17, -100), (5, 1.5)))
    assert made.json_schema is not None
    assert json.loads(made.json_schema) == schema
    assert made.sampling == SamplingParameters(
        temperature=0.25,
        top_p=0.5,
        top_k=0,
        min_p=0.125,
        seed=2**32 - 3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
    )


@pytest.mark.parametrize(
    ("line", "max_tokens", "temperature"),
    [
        ({"n_predict": 3, "temp": 0.25}, 3, 0.25),
        ({"max_completion_tokens": 3, "temperature": 1}, 3, 1),
        ({"n_predict": -1}, None, 0.5),
        ({"max_tokens": -1, "seed": -1}, None, 0.5),
        ({"max_completion_tokens": -1}, None, 0.5),
        ({"n_predict": 4, "max_tokens": 4, "temp": 1, "temperature": 1}, 4, 1),
    ],
)
def test_names_of_limits(
    tmp_path: Path, line: dict[str, Any], max_tokens: int | None, temperature: float
) -> None:
    """Guards: llama.cpp's names, which the command line takes, refused in a line; -1 taken for a number."""
    for made in (request(tmp_path, {"prompt": "a", **line}), request(tmp_path, chat(line))):
        assert (made.max_tokens, made.sampling.temperature) == (max_tokens, temperature)
        assert made.sampling.seed is None


def test_completions_say_how_many_logprobs(tmp_path: Path) -> None:
    """Guards: the number of completions read as the flag of chat."""
    made = request(tmp_path, completion({"prompt": ["only"], "logprobs": 3, "best_of": 1, "echo": False}))
    assert (made.prompt, made.logprobs, made.top_logprobs) == ("only", True, 3)


@pytest.mark.parametrize("field", ["json_schema", "guided_json"])
def test_names_of_constraints(tmp_path: Path, field: str) -> None:
    """Guards: vLLM's names of the same thing."""
    assert request(tmp_path, {"prompt": "a", field: {"type": "null"}}).json_schema == '{"type": "null"}'
    made = request(tmp_path, completion({"structured_outputs": {"grammar": 'root ::= "a"', "json": None}}))
    assert made.grammar == 'root ::= "a"'
    made = request(tmp_path, completion({"response_format": {"type": "json_object"}}))
    assert made.json_schema == '{"type": "object"}'


def test_every_field_of_openai_is_known() -> None:
    """Guards: a field of OpenAI's own request types that is called unknown."""
    from openai.types import completion_create_params as text
    from openai.types.chat import completion_create_params as conversation

    known = HONOURED.keys() | IGNORED | NEUTRAL.keys()
    for parameters in (text.CompletionCreateParamsBase, conversation.CompletionCreateParamsBase):
        assert set(parameters.__annotations__) <= known
    assert not IGNORED & (HONOURED.keys() | NEUTRAL.keys())
    assert not HONOURED.keys() & NEUTRAL.keys()


PREFILLED = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " The answer is "}]
}


@pytest.mark.parametrize(
    ("body", "continued"),
    [
        ({}, False),
        ({"add_generation_prompt": True}, False),
        ({"continue_final_message": False}, False),
        ({"continue_final_message": True}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
    ],
)
def test_last_message_goes_on_only_if_asked(tmp_path: Path, body: dict[str, Any], continued: bool) -> None:
    """Guards: a last message that is continued unasked, or loses its white space."""
    made = request(tmp_path, chat({**PREFILLED, **body}))
    assert made.continue_final_message is continued
    assert made.prompt[-1] == Message("assistant", " The answer is ")


@pytest.mark.parametrize("field", sorted(NEUTRAL.keys() - TOOL_FIELDS))
def test_what_cannot_be_had_is_refused_by_name(tmp_path: Path, field: str) -> None:
    """Guards: a field that is silently not honoured."""
    with pytest.raises(DsmoeError, match=f"^{field} is not supported"):
        request(tmp_path, chat({field: ["something"]}))
    for value in NEUTRAL[field]:
        request(tmp_path, chat({field: value}))
    request(tmp_path, chat({field: None}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *(
            (chat({**PREFILLED, **body}), message)
            for body, message in (
                ({"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
                ({"add_generation_prompt": False}, "add_generation_prompt = false is not supported"),
                (
                    {"add_generation_prompt": False, "continue_final_message": False},
                    "= false is not supported alone",
                ),
                ({"continue_final_message": "yes"}, "continue_final_message is neither true nor false"),
                ({"add_generation_prompt": "yes"}, "add_generation_prompt is neither true nor false"),
            )
        ),
        (chat({"continue_final_message": True}), "last message does not have the role assistant"),
        (completion({"continue_final_message": True}), "last message does not have the role assistant"),
        (chat({"temprature": 1}), "unknown field 'temprature'"),
        (chat({"prompt": "a"}), "takes messages, not prompt"),
        (completion({"prompt": None}), "prompt is missing"),
        (completion({"prompt": ["a", "b"]}), "list of 2 prompts"),
        (completion({}) | {"url": "/v1/embeddings"}, "/v1/embeddings"),
        (completion({}) | {"method": "GET"}, "method"),
        (completion({}) | {"body": []}, "body is not an object"),
        (completion({}) | {"temperature": 1}, "'temperature' beside body"),
        (chat({"max_tokens": 1, "max_completion_tokens": 2}), "max_tokens and max_completion_tokens differ"),
        (chat({"n_predict": -1, "max_tokens": 2}), "n_predict and max_tokens differ"),
        (chat({"n_predict": -2}), "max_tokens = -2"),
        (chat({"temp": 1, "temperature": 2}), "temp and temperature differ"),
        (completion({}) | {"url": ["/v1/completions"]}, "the url"),
        (
            chat({"messages": [{"role": "function", "content": "a"}]}),
            "is not supported\nuse system, developer, user, assistant, tool",
        ),
        (chat({"messages": [{"role": "tool", "content": "a"}]}), "role tool takes tool_call_id"),
        (
            chat({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}),
            "only messages of the role assistant may have tool_calls",
        ),
        (chat({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "'image_url'"),
        (
            chat({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}),
            "a tool call takes id and function",
        ),
        (
            chat({"messages": [{"role": "assistant", "tool_calls": [called("f", '{"a": ')]}]}),
            "the arguments of the call of f are not a JSON object",
        ),
        (
            chat({"messages": [{"role": "assistant", "tool_calls": [called("<|end|>", "{}")]}]}),
            "'<|end|>' is not a name of a tool",
        ),
        (chat({"tools": [{"type": "function"}]}), "tools[0].function is not an object"),
        (chat({"tools": {}}), "tools is not a list"),
        (chat({"tools": [{"type": "custom", "custom": {"name": "f"}}]}), "tools[0]: the type 'custom'"),
        (chat({"tools": [TOOL, TOOL]}), "two tools have the name f"),
        (
            chat({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
            "tools[0]: 'a b' is not a name",
        ),
        (
            chat({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}),
            "tools[0]: the parameters of the tool f are not a JSON schema",
        ),
        (chat({"tool_choice": "required"}), "a call is required, but there are no tools"),
        (chat({"tools": [TOOL], "tool_choice": "any"}), 'tool_choice "any" is not supported'),
        (
            chat({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
            "there is no tool 'g' to choose",
        ),
        (chat({"tools": [TOOL], "parallel_tool_calls": 1}), "parallel_tool_calls is neither true nor false"),
        (chat({"tools": [TOOL], "grammar": 'root ::= "a"'}), "grammar and tools are both set"),
        (
            chat({"tools": [TOOL], **PREFILLED, "continue_final_message": True}),
            "with tools cannot be continued",
        ),
        (chat({"functions": [{"name": "f"}]}), "functions is not supported"),
        (completion({"tools": [TOOL]}), "tools is not supported"),
        (chat({"response_format": {"type": "grammar"}}), "response_format"),
        (chat({"structured_outputs": {"regex": "a"}}), "structured_outputs.regex"),
        (chat({"logit_bias": {"hello": 1}}), "'hello' is not a token id"),
        (chat({"n": 0}), "n = 0"),
        (chat({"top_logprobs": 21}), "top_logprobs = 21"),
    ],
)
def test_bad_requests(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    """Guards: a mistake that is not reported, or reported without its field; fields that contradict each
    other, one of which wins; a model that writes the user's message.
    """
    with pytest.raises(DsmoeError) as refusal:
        request(tmp_path, line)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "not a JSON object: it does not start with {"),
        (b'{"id": "a", "prompt": "The qui', "the string that starts in column 23 is not closed"),
        (b'{"prompt": "a\tb"}', "a tab or control character in column 14: in a string, write \\t"),
        (b'{"prompt": "C:\\dir"}', "the backslash in column 15 is not an escape: write \\\\ for a backslash"),
        (b'{"prompt": "\\u12"}', "\\u in column 14 takes four hexadecimal digits"),
        (b'{"prompt": undefined}', "a value is missing in column 12"),
        (b'{"prompt": "a" "b": 1}', "a comma or a closing bracket is missing in column 16"),
        (b'{"prompt" "a"}', "a colon is missing in column 11"),
        (b"{'prompt': 'a'}", "a quoted key is missing in column 2"),
        (b'{"prompt": "a"} {"prompt": "b"}', "the object is followed by something else in column 17"),
        (b'{"a": ' * 500 + b"1" + b"}" * 500, "nested too deeply"),
        (b'{"a": ' * 90_000, "nested too deeply"),
        (b'{"a": %b}' % (b"1" * 5000), "a number has too many digits"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice"),
        (b'["prompt"]', "not a JSON object: it does not start with {"),
        (b'{"prompt": "\xe9"}', "not UTF-8 at byte 13"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "out of range"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"id": "\\ud800", "prompt": "a"}', "surrogate"),
        (b'{"id": {}, "prompt": "a"}', "the id"),
        (b'{"id": true, "prompt": "a"}', "the id"),
        (b'{"id": "a", "custom_id": "b", "prompt": "a"}', "differ"),
        (b"{}", "no prompt and no messages"),
        (b'{"prompt": "a", "messages": []}', "not both"),
        (b'{"messages": []}', "messages"),
        (b'{"prompt": 5}', "prompt is not text"),
        (b'{"prompt": [1.5]}', "whole number"),
        (b'{"prompt": []}', "prompt is an empty list"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "temperature is out of range"),
        (b'{"prompt": "a", "top_k": 1' + b"0" * 400 + b"}", "a whole number, 0 = off"),
        (b'{"messages": [{"role": "user"}]}', "role and content"),
        (b'{"messages": [{"role": "user", "content": null}]}', "content is not text"),
        (b'{"prompt": "a", "temprature": 1}', "temprature"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature is not a number"),
        (b'{"prompt": "a", "max_tokens": -2}', "max_tokens"),
        (b'{"prompt": "a", "top_k": 1.5}', "top_k is not a whole number"),
        (b'{"prompt": "a", "stop": [""]}', "stop string"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, message: str) -> None:
    """Guards: a bad line that ends the run, or is accepted; the json module's messages, which mislead."""
    good, bad = requests(write_lines(tmp_path / "in.jsonl", [b'{"prompt": "good"}', line]))
    assert good()
    with pytest.raises(DsmoeError) as refusal:
        bad()
    assert message in str(refusal.value)


def test_only_newlines_end_lines(tmp_path: Path) -> None:
    """Guards: splitlines, which breaks on U+2028, NEL and form feeds; a BOM or CR taken for text."""
    text = "a\u2028b\u2029c\x85d"
    path = tmp_path / "in.jsonl"
    content = [
        "\ufeff" + json.dumps({"prompt": text}, ensure_ascii=False),
        "",
        '{"prompt": "x"}\r',
        '{"prompt": "last"}',
    ]
    path.write_bytes("\n".join(content).encode())
    found = [(made.id, made.prompt) for made in (make() for make in requests(path))]
    assert found == [("line-1", text), ("line-3", "x"), ("line-4", "last")]


def test_overlong_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a long line that fills the memory, is read as several, or hides the next one."""
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    path = write_lines(tmp_path / "in.jsonl", [{"prompt": "a" * 250}, {"prompt": "b"}])
    long, short = requests(path)
    with pytest.raises(RequestError, match="longer"):
        long()
    assert (short().id, short().prompt) == ("line-2", "b")
    source = Source(path, InputForm())
    assert [source.read(span) for span, raw in source.spans()] == [
        b'{"prompt": "' + b"a" * 89,
        b'{"prompt": "b"}\n',
    ]
    source.close()


def test_unreadable_input(tmp_path: Path) -> None:
    """Guards: a traceback for a missing file or a folder."""
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileError):
            Source(path, InputForm())
