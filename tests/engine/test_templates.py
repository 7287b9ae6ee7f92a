"""Chat templates: which is used, that they can do no harm, and that contents stay contents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.engine.errors import TemplateError
from dsmoe_local.engine.prompts.choice import BUILT_IN, added_bytes, choose_template
from dsmoe_local.engine.prompts.segments import Segment
from dsmoe_local.engine.prompts.template import ChatTemplate
from dsmoe_local.engine.types import NO_TEMPLATE, Message

TALK = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Yo"),
    Message("user", "Why?"),
)


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, "test", bos="<s>", eos="</s>")


def joined(segments: list[Segment] | None) -> str:
    assert segments is not None
    return "".join(segment.text for segment in segments)


def test_deepseek_moe_format() -> None:
    """Guards: the format of the DeepSeekMoE 16B chat model, from its model card."""
    rendered = template(BUILT_IN["deepseek-moe"]).render(TALK)
    assert rendered == "<s>Be brief.\n\nUser: Hi\n\nAssistant: Yo</s>User: Why?\n\nAssistant:"


def test_order_of_templates(tmp_path: Path) -> None:
    """Guards: the file's own template winning over what the user names, or a base model getting one."""
    file = tmp_path / "mine.jinja"
    file.write_text("mine")
    kinds = {"architecture": "deepseek", "name": "deepseek-moe-16b-chat"}
    own = {"": "own", "tool_use": "tools"}
    assert choose_template(str(file), own, **kinds) == ("mine", "mine.jinja")
    assert choose_template("deepseek-moe", own, **kinds) == (
        BUILT_IN["deepseek-moe"],
        "built-in deepseek-moe",
    )
    assert choose_template(None, own, **kinds) == ("own", "the model's own")
    assert choose_template("tool_use", own, **kinds) == ("tools", "the model's own tool_use")
    assert choose_template(None, {}, **kinds) == (BUILT_IN["deepseek-moe"], "built-in deepseek-moe")
    assert choose_template(None, {}, architecture="deepseek", name="deepseek-moe-16b-base") is None
    assert choose_template(None, {}, architecture="llama", name="llama-chat") is None
    assert choose_template(NO_TEMPLATE, own, **kinds) is None
    with pytest.raises(UsageError, match="nor a built-in") as caught:
        choose_template("deepseek-mo", own, **kinds)
    assert "chatml, tool_use" in str(caught.value)
    file.write_bytes(b"\xff")
    with pytest.raises(FileError, match="UTF-8"):
        choose_template(str(file), own, **kinds)


@pytest.mark.parametrize("name", BUILT_IN)
def test_segments_join_to_the_rendered_text(name: str) -> None:
    """Guards: placeholders that change what a template gives."""
    chat = template(BUILT_IN[name])
    segments = chat.segments(TALK)
    assert joined(segments) == chat.render(TALK)
    assert segments is not None
    contents = {segment.message: segment.text for segment in segments if segment.message is not None}
    assert contents == {index: message.content for index, message in enumerate(TALK)}


TRIMMING = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"


def test_template_that_trims() -> None:
    """Guards: whitespace kept that the template takes away, or taken away that it keeps."""
    spaced = (Message("user", "\n  a b \n"),)
    assert template(TRIMMING).segments(spaced) == [Segment("["), Segment("a b", 0), Segment("]")]
    keeping = template("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert keeping.segments(spaced) == [Segment("["), Segment("\n  a b \n", 0), Segment("]")]


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content.split('h')[-1] }}",
        "{{ messages[0].content | length }}",
        "{% if 'think' in messages[0].content %}thought{% else %}{{ messages[0].content }}{% endif %}",
        "{{ messages[0].content | tojson }}",
    ],
)
def test_template_that_changes_contents_is_not_split(text: str) -> None:
    """Guards: placeholders where the template wanted the real content."""
    assert template(text).segments((Message("user", 'I "think" this'),)) is None


@pytest.mark.parametrize("content", ["", "  ", "\n"])
def test_empty_contents(content: str) -> None:
    """Guards: `if message.content` going the wrong way for a placeholder."""
    text = "{% for m in messages %}{% if m.content %}[{{ m.content }}]{% else %}-{% endif %}{% endfor %}"
    assert joined(template(text).segments((Message("user", content),))) == (
        f"[{content}]" if content else "-"
    )


def test_hub_helpers() -> None:
    """Guards: helpers that templates on the hub rely on, and the hub's JSON without HTML escapes."""
    text = (
        "{{ strftime_now('%Y') | length }} {{ {'a': '<é>'} | tojson }} {{ [1, 2] | tojson(indent=1) }} "
        "{% generation %}g{% endgeneration %}"
        "{% for x in range(9) %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}"
        " {{ bos_token + eos_token }}"
    )
    expected = f"4 {json.dumps({'a': '<é>'}, ensure_ascii=False)} {json.dumps([1, 2], indent=1)} g01 <s></s>"
    assert template(text).render(TALK) == expected


def test_template_refuses() -> None:
    """Guards: raise_exception shown as a traceback, or its text reaching the terminal raw."""
    with pytest.raises(TemplateError, match="no \N{SYMBOL FOR ESCAPE}roles"):
        template("{{ raise_exception('no \x1broles') }}").render(TALK)
    with pytest.raises(TemplateError, match="line 2"):
        template("\n{% if %}")


@pytest.mark.parametrize(
    "text", ["{{ 'a'|dictsort }}", "{{ 1|xmlattr }}", "{% for i in [1] %}" * 25 + "{% endfor %}" * 25]
)
def test_whatever_a_template_raises_is_a_template_error(text: str) -> None:
    """Guards: filters' AttributeError, the compiler's SyntaxError as an internal error of ours."""
    with pytest.raises(TemplateError, match="fails"):
        template(text).render(TALK)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ ('%c' * 3).__mod__ }}{{ ''.format.__globals__ }}",
    ],
)
def test_sandbox_holds(attack: str) -> None:
    """Guards: code in a model file reaching Python."""
    try:
        output = template(attack).render(TALK)
    except TemplateError:
        return
    assert "class" not in output
    assert "function" not in output or "built-in" in output


def test_ordinary_large_conversation_is_no_bomb() -> None:
    """Guards: caps that refuse honest work."""
    long = (Message("user", "word " * 200_000), Message("assistant", "b"), Message("user", "c" * 100_000))
    for text in BUILT_IN.values():
        assert len(joined(template(text).segments(long))) > 1_100_000
    joining = template("{{ messages | map(attribute='content') | join('\n') | trim }}")
    assert len(joining.render(long)) > 1_100_000


@pytest.mark.parametrize(
    "text",
    [
        *BUILT_IN.values(),
        "{% set intro = 'Be kind. ' %}{% for m in messages %}{{ intro }}{{ m.content }}{% endfor %}",
        "{%- for m in messages -%}{# no text #}[{{ '<' + m['role'] + '>' }}{{ m.content }}]{%- endfor %}tail"
        * 2,
        "{% macro turn(m) %}<{{ m.role }}> é{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
        "{% set x %}Be kind. {% endset %}{% for m in messages %}{{ x }}{{ m.content }}{% endfor %}",
        "a preamble " * 50 + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("n_messages", [1, 2, 9])
def test_what_a_template_adds_is_bounded(text: str, n_messages: int) -> None:
    """Guards: requests that do not fit, because of what their template puts around them."""
    talk = tuple(Message(("user", "assistant")[at % 2], "") for at in range(n_messages))
    roles = sum(len(message.role) for message in talk)
    once, each = added_bytes(text)
    # A special token is one token, whatever its name.
    rendered = ChatTemplate(text, "test", bos="^", eos="$").render(talk)
    assert len(rendered.encode()) <= once + each * n_messages + 2 * roles
    assert once + each * n_messages <= 2 * n_messages * len(text.encode())
