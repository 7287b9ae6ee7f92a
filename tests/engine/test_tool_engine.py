"""Tool calls of models that run: required calls, and markers that are control tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support import vocabularies
from support.checkpoints import TINY, write_checkpoint
from support.models import smollm2
from support.tool_templates import CLOCK, DEEPSEEK_V31, HERMES
from tokenizers import AddedToken, Tokenizer

from dsmoe_convert.convert import convert_folder
from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import (
    CallDelta,
    FinishReason,
    Message,
    ModelOptions,
    Request,
    SamplingParameters,
    TokenEvent,
    Tool,
    Tools,
)
from dsmoe_local.protocol.replies import joined_calls

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
SHORT = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}},
    "required": ["n"],
    "additionalProperties": False,
}
COUNT = Tool("f", parameters=json.dumps(SHORT))
WEATHER = Tool("get_weather", "Return the weather in a city", json.dumps(SCHEMA))
QUESTION = Message("user", "What is the weather in Paris?")


def engine_of(folder: Path, template: str) -> Engine:
    """Load a random model whose markers of calls are control tokens."""
    tokenizer = Tokenizer.from_str(vocabularies.trained("qwen2").to_str())
    special = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
    special += [
        f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
    ]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    hp = replace(TINY, n_vocab=vocabularies.n_rows(tokenizer))
    checkpoint = write_checkpoint(folder / "checkpoint", hp)
    vocabularies.write_files(checkpoint, tokenizer, {"chat_template": template})
    model = convert_folder(checkpoint, folder / "model.gguf").path
    return Engine.load(ModelOptions(model, n_context=1024, n_threads=1))


@pytest.fixture(scope="module", params=[HERMES, DEEPSEEK_V31])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with engine_of(tmp_path_factory.mktemp("model"), request.param) as loaded:
        yield loaded


def ask(engine: Engine, tools: Tools, **more: Any) -> tuple[str, tuple[CallDelta, ...], list[TokenEvent]]:
    """Return text, calls and the events."""
    values: dict[str, Any] = {"sampling": SamplingParameters(seed=1), "max_tokens": 500, **more}
    events = list(engine.submit(Request("r", (QUESTION,), tools=tools, **values)))
    calls = joined_calls(call for event in events for call in event.calls)
    return "".join(event.text for event in events), calls, events


def test_required_calls(engine: Engine) -> None:
    """Guards: a marker that is a control token forbidden by the grammar, or lost by the parser."""
    text, calls, events = ask(engine, Tools((COUNT,), required=True, parallel=False))
    assert text == ""
    (call,) = calls
    assert (call.name, call.index) == ("f", 0)
    assert call.id.startswith("call_")
    jsonschema.validate(json.loads(call.arguments), SHORT)
    assert events[-1].finish_reason is FinishReason.STOP


def test_stop_strings_end_the_text_of_a_reply(engine: Engine) -> None:
    """Guards: a stop string that is ignored in a reply with tools."""
    greedy = {"sampling": SamplingParameters(temperature=0), "max_tokens": 20}
    text = ask(engine, Tools((COUNT,)), **greedy)[0]
    stopped = ask(engine, Tools((COUNT,)), **greedy, stop=(text[3],))[0]
    assert stopped == text.partition(text[3])[0]


def test_calls_of_a_real_model(tmp_path: Path) -> None:
    """Guards: a model whose template does not know tools: they are described, and its calls are parsed."""
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    options = ModelOptions(smollm2(), n_context=1024, n_threads=2, chat_template=str(template))
    with Engine.load(options) as engine:
        offered = Tools((WEATHER, CLOCK), only="get_weather")
        text, (call,), events = ask(engine, offered, sampling=SamplingParameters(temperature=0))
        assert text == ""
        assert json.loads(call.arguments)["city"] == "Paris"
        assert len([event for event in events if event.calls]) > 2
        with pytest.raises(UsageError, match="cannot be enforced"):
            ask(engine, Tools((Tool("f", parameters='{"not": {}}', strict=True),)))
