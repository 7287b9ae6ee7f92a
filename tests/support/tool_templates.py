"""Chat templates with the markers of the model families, and tools and messages to render with them."""

from __future__ import annotations

import json
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from dsmoe_local.engine.tools.formats import ToolFormat, format_of
from dsmoe_local.engine.tools.parser import ToolParser
from dsmoe_local.engine.types import CallDelta, Message, Tool, ToolCall, Tools
from dsmoe_local.protocol.replies import joined_calls

_START = """{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}
{{- tool | tojson }}{{ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}{% endif %}
{%- if m.tool_calls %}"""
_END = """{%- endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

HERMES = f"""{_START}{{% for c in m.tool_calls %}}{{% set c = c.function %}}
{{{{- '\\n<tool_call>\\n{{"name": "' + c.name + '", "arguments": ' }}}}
{{{{- c.arguments if c.arguments is string else c.arguments | tojson }}}}{{{{ '}}\\n</tool_call>' }}}}
{{%- endfor %}}{_END}"""

# It appends the arguments to text, and tests for missing content, as DeepSeek's own template does.
DEEPSEEK_V3 = f"""{_START}{{% if m['content'] is none or m['content'] %}}
{{{{- '<｜tool▁calls▁begin｜>' }}}}{{% for c in m.tool_calls %}}
{{{{- '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\\n```json\\n'
   + c.function.arguments + '\\n```<｜tool▁call▁end｜>' + ('' if loop.last else '\\n') }}}}
{{%- endfor %}}{{{{ '<｜tool▁calls▁end｜>' }}}}{{% endif %}}{_END}"""

DEEPSEEK_V31 = f"""{_START}{{{{ '<｜tool▁calls▁begin｜>' }}}}{{% for c in m.tool_calls %}}
{{{{- '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' }}}}{{{{ c.function.arguments | tojson }}}}
{{{{- '<｜tool▁call▁end｜>' }}}}{{% endfor %}}{{{{ '<｜tool▁calls▁end｜>' }}}}{_END}"""

_GLM_VALUE = "{{ v if v is string else v | tojson(ensure_ascii=False) }}"
GLM = f"""{_START}{{% for c in m.tool_calls %}}
{{{{- '\\n<tool_call>' + c.function.name + '\\n' }}}}{{% for k, v in c.function.arguments.items() %}}
{{{{- '<arg_key>' }}}}{{{{ k }}}}{{{{ '</arg_key>\\n<arg_value>' }}}}{_GLM_VALUE}{{{{ '</arg_value>\\n' }}}}
{{%- endfor %}}{{{{ '</tool_call>' }}}}{{% endfor %}}{_END}"""

GLM_DENSE = f"""{_START}{{% for c in m.tool_calls %}}
{{{{- '<tool_call>' + c.function.name }}}}{{% for k, v in c.function.arguments.items() %}}
{{{{- '<arg_key>' }}}}{{{{ k }}}}{{{{ '</arg_key><arg_value>' }}}}{_GLM_VALUE}{{{{ '</arg_value>' }}}}
{{%- endfor %}}{{{{ '</tool_call>' }}}}{{% endfor %}}{_END}"""

CODER = f"""{_START}{{% for c in m.tool_calls %}}
{{{{- '\\n<tool_call>\\n<function=' + c.function.name + '>\\n' }}}}
{{%- for k, v in c.function.arguments | items %}}{{{{ '<parameter=' + k + '>\\n' }}}}
{{{{- v if v is string else v | tojson }}}}{{{{ '\\n</parameter>\\n' }}}}{{% endfor %}}
{{{{- '</function>\\n</tool_call>' }}}}{{% endfor %}}{_END}"""

NATIVE = {
    "hermes": HERMES,
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3.1": DEEPSEEK_V31,
    "glm-4.5": GLM,
    "glm-4.7": GLM_DENSE,
    "qwen3-coder": CODER,
}
"""Templates that render tools. The keys are the names of formats, except for glm-4.7, which is glm-4.5's."""

PLAIN = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""A template that does not know tools."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "the city"},
        "days": {"type": "integer"},
        "unit": {"$ref": "#/$defs/Unit"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "when": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["C", "F"]}},
}
WEATHER = Tool("get_weather", "Weather <|im_end|> in a city", json.dumps(SCHEMA))
CLOCK = Tool("get_weather_now")
TOOLS = (WEATHER, CLOCK)


def talk(*calls: tuple[str, dict[str, Any]], content: str = "") -> tuple[Message, ...]:
    """Return a conversation with a reply that makes calls, and their results."""
    made = tuple(
        ToolCall(f"call_{index}", name, json.dumps(arguments, ensure_ascii=False))
        for index, (name, arguments) in enumerate(calls)
    )
    results = [Message("tool", f"result {call.id}", tool_call_id=call.id) for call in made]
    return (Message("user", "hi"), Message("assistant", content, tool_calls=made), *results)


OFFERED = Tools(TOOLS)


def form_of(name: str) -> ToolFormat:
    """Return the format of a template in NATIVE."""
    form = format_of(NATIVE[name])
    assert form is not None
    return form


def written(name: str, *calls: tuple[str, dict[str, Any]], content: str = "") -> str:
    """Return the reply that the template renders for calls. transformers renders it."""
    messages = [
        {
            "role": "assistant",
            "content": content or None,
            "tool_calls": [
                {
                    "type": "function",
                    # DeepSeek-V3's template takes text, the others objects.
                    "function": {
                        "name": called,
                        "arguments": json.dumps(arguments, ensure_ascii=False)
                        if name == "deepseek-v3"
                        else arguments,
                    },
                }
                for called, arguments in calls
            ],
        }
    ]
    rendered: Any = render_jinja_template(conversations=[messages], chat_template=NATIVE[name])
    text: str = rendered[0][0]
    return text.partition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")


def parsed(form: ToolFormat, text: str, size: int = 1 << 30) -> tuple[str, tuple[CallDelta, ...]]:
    """Return text and calls, without ids. `size` is the number of characters that arrive at once."""
    parser = ToolParser(form, OFFERED)
    found = [parser.feed(text[start : start + size]) for start in range(0, len(text), size)]
    found.append(parser.finish())
    assert all(bool(call.id) == bool(call.name) for each in found for call in each.calls)
    calls = joined_calls(call for each in found for call in each.calls)
    return "".join(each.text for each in found), tuple(
        CallDelta(call.index, call.arguments, "", call.name) for call in calls
    )
