"""The formats in which models write tool calls, and which of them a chat template uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The texts around the parts of calls. Spaces in them stand for any whitespace, or none. A line break
    exists only next to a value. It stands for itself or nothing.

    A section is `begin`, one or more calls, `finish`. A call is `before_name`, its name, `after_name`, the
    arguments, `end`. The arguments are a JSON object if `key` is empty. Otherwise each is `key`, its name,
    `value`, its value, `after_value`: strings as they are, other values as JSON.

    `signs` are texts that all templates with this format contain. If `single`, a section has one call.
    """

    name: str
    signs: tuple[str, ...]
    begin: str
    before_name: str
    after_name: str
    end: str
    finish: str
    single: bool = False
    key: str = ""
    value: str = ""
    after_value: str = ""

    @property
    def texts(self) -> Iterator[str]:
        """All markers: the texts without whitespace in them."""
        for text in (self.begin, self.before_name, self.after_name, self.end, self.finish):
            yield from text.split()
        for text in (self.key, self.value, self.after_value):
            yield from text.split()


HERMES = ToolFormat(
    "hermes",
    signs=("<tool_call>",),
    begin="<tool_call>",
    before_name=' { "name" : "',
    after_name='" , "arguments" : ',
    end=" } ",
    finish="</tool_call>",
    single=True,
)
BARE = replace(HERMES, name="json", begin="", end=" }", finish="")
"""A JSON object that is the whole reply. Models write it if they forget the markers around it."""
_FORMATS = (
    ToolFormat(
        "deepseek-v3",
        signs=("<｜tool▁calls▁begin｜>", "```json"),
        begin="<｜tool▁calls▁begin｜>",
        before_name=" <｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        after_name=" ```json ",
        end=" ```<｜tool▁call▁end｜> ",
        finish="<｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        "deepseek-v3.1",
        signs=("<｜tool▁calls▁begin｜>",),
        begin="<｜tool▁calls▁begin｜>",
        before_name=" <｜tool▁call▁begin｜>",
        after_name="<｜tool▁sep｜>",
        end="<｜tool▁call▁end｜> ",
        finish="<｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        "glm-4.5",
        signs=("<tool_call>", "<arg_key>"),
        begin="<tool_call>",
        before_name=" ",
        after_name=" ",
        end=" ",
        finish="</tool_call>",
        single=True,
        key=" <arg_key>",
        value="</arg_key> <arg_value>",
        after_value="</arg_value>",
    ),
    ToolFormat(
        "qwen3-coder",
        signs=("<tool_call>", "<function="),
        begin="<tool_call>",
        before_name=" <function=",
        after_name="> ",
        end=" </function> ",
        finish="</tool_call>",
        single=True,
        key=" <parameter=",
        value=">\n",
        after_value="\n</parameter>",
    ),
    HERMES,
)


def format_of(template: str) -> ToolFormat | None:
    """Return the format of calls in a chat template; None if it does not render tools in a known format."""
    if "tools" not in template:
        return None
    return next((form for form in _FORMATS if all(sign in template for sign in form.signs)), None)
