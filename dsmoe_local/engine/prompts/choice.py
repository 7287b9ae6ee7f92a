"""Choose the chat template of a model, and compute upper bounds of the text that a template adds.

The first of these is used: the template that the user names (built-in, one of several in the model's file, or
a file), the default in the model's file, and for a DeepSeekMoE chat model the built-in one. Other models only
complete text, and so does any model with `NO_TEMPLATE`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.types import NO_TEMPLATE, ModelOptions
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.hyperparameters import ModelOutline

BUILT_IN = {
    "deepseek-moe": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}User: {{ message['content'] }}\n\n"
        "{% elif message['role'] == 'assistant' %}Assistant: {{ message['content'] }}{{ eos_token }}"
        "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
_KEY = "tokenizer.chat_template"
_CHAT_MODEL = re.compile(r"(?i)\b(chat|instruct|it)\b")
_MAX_TEMPLATE = 1 << 20
_TAG = re.compile(r"(\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\})", re.DOTALL)
_STATEMENT = re.compile(r"\{%[-+]?\s*(\w+)")
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
_BLOCKS = {"for": 1, "endfor": -1, "macro": 1, "endmacro": -1, "endset": -1}


def template_of(options: ModelOptions, file: GgufFile, outline: ModelOutline) -> tuple[str, str] | None:
    """Return the template of the model in `file` (see `choose_template`)."""
    return choose_template(
        options.chat_template,
        own_templates(file),
        architecture=outline.architecture,
        name=f"{outline.name} {options.path.stem}",
    )


def own_templates(file: GgufFile) -> dict[str, str]:
    """Return the templates in a model's file by name. The name of the default is ""."""
    found = {key: file.get(key) for key in file.metadata if key == _KEY or key.startswith(f"{_KEY}.")}
    return {key[len(_KEY) + 1 :]: text for key, text in found.items() if isinstance(text, str)}


def choose_template(
    requested: str | None, own: Mapping[str, str], *, architecture: str, name: str
) -> tuple[str, str] | None:
    """Return the text of the template and where it comes from, or None.

    `own` are the templates in the model's file (see `own_templates`). Raises UsageError, FileError.
    """
    if requested == NO_TEMPLATE:
        return None
    if requested is not None:
        if requested in BUILT_IN:
            return BUILT_IN[requested], f"built-in {requested}"
        if own.get(requested):
            return own[requested], f"the model's own {safe_line(requested, 40)}"
        return _read_template(Path(requested), own), safe_line(Path(requested).name, 60)
    if own.get(""):
        return own[""], "the model's own"
    if architecture == "deepseek" and _CHAT_MODEL.search(re.sub(r"[-_.]", " ", name)):
        return BUILT_IN["deepseek-moe"], "built-in deepseek-moe"
    return None


def added_bytes(text: str) -> tuple[int, int]:
    """Return upper bounds of the bytes that a template adds to a conversation, and to each message.

    All branches are counted. Text in a loop, a macro or a variable may be added for each message. A variable
    for a special token counts as one byte, since it is one token.
    """
    once = repeated = depth = 0
    for part in _TAG.split(text):
        if part.startswith("{#"):
            continue
        found = _STATEMENT.match(part)
        statement = found[1] if found else ""
        depth += 1 if statement == "set" and "=" not in part else _BLOCKS.get(statement, 0)
        if part.startswith(("{%", "{{")):
            amount = sum(len((one or other).encode()) for one, other in _QUOTED.findall(part)) + 1
        else:
            amount = len(part.encode())
        if depth > 0 or statement == "set":
            repeated += amount
        else:
            once += amount
    return once, repeated


def _read_template(path: Path, own: Mapping[str, str]) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TEMPLATE + 1)
        if len(content) > _MAX_TEMPLATE:
            raise FileError("the chat template is larger than 1 MiB", where=path, remedy="name another file")
        return content.decode("utf-8")
    except FileNotFoundError as error:
        known = ", ".join([*BUILT_IN, *filter(None, own), NO_TEMPLATE])
        raise UsageError(
            f"--chat-template {safe_line(str(path), 60)!r} is neither a file nor a built-in template",
            remedy=f"name a file, or one of: {safe_line(known, 100)}",
        ) from error
    except UnicodeDecodeError as error:
        raise FileError("the chat template is not UTF-8", where=path, remedy="convert it to UTF-8") from error
    except OSError as error:
        raise FileError(f"the chat template cannot be read: {error.strerror}", where=path) from error
