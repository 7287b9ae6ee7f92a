"""Conversations of reasoning models as prompts: what the template keeps, and which token ids stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from support.byte_vocabulary import ByteVocabulary
from support.reasoning_templates import ALL, KEEPS, QWEN, R1

from dsmoe_local.engine.prompts.encoder import PromptEncoder
from dsmoe_local.engine.prompts.template import ChatTemplate
from dsmoe_local.engine.types import Message

SPECIAL = (b"<|start|>", b"<|end|>")
VOCABULARY = ByteVocabulary(control=True, special=SPECIAL)


@pytest.fixture(scope="module")
def encoders() -> Iterator[dict[str, PromptEncoder]]:
    made = {
        name: PromptEncoder(VOCABULARY, ChatTemplate(text, "test"), 1 << 20) for name, text in ALL.items()
    }
    yield made
    for encoder in made.values():
        encoder.close()


def rendered(name: str, messages: Sequence[Message], **variables: object) -> str:
    """Return the conversation as jinja2 alone renders it."""
    values = [
        {"role": each.role, "content": each.content}
        | ({"reasoning_content": each.reasoning_content} if each.reasoning_content else {})
        for each in messages
    ]
    # Template texts are trusted here, and the output is no HTML.
    template = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False).from_string(ALL[name])
    return template.render(messages=values, add_generation_prompt=True, **variables)


def reply(written: str, *, opened: bool = False) -> Message:
    """Return a reply with the ids of what the model wrote. With `opened` the prompt opened the reasoning."""
    ids = tuple(VOCABULARY.tokenize(written.encode(), special=True))
    thought, closed, said = written.partition("</think>")
    if not (closed or opened or written.startswith("<think>")):
        return Message("assistant", written, ids)
    return Message("assistant", said.strip(), ids, thought.removeprefix("<think>").strip())


TEXTS = st.text("ab \n<|end|>中", max_size=12)
REPLIES = st.builds(
    lambda said, thought, exact: Message(
        "assistant",
        said,
        tuple(VOCABULARY.tokenize(f"<think>{thought}</think>{said}".encode(), special=True)) if exact else (),
        thought.strip(),
    ),
    TEXTS,
    TEXTS,
    st.booleans(),
)


@pytest.mark.parametrize("name", ["qwen", "r1", "keeps"])
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    said=st.lists(st.tuples(TEXTS, REPLIES), max_size=3),
    last=TEXTS,
    thinks=st.sampled_from([None, True, False]),
)
def test_the_text_is_what_the_template_renders(
    name: str,
    said: list[tuple[str, Message]],
    last: str,
    thinks: bool | None,
    encoders: dict[str, PromptEncoder],
) -> None:
    """Guards: token ids of a reply put where the template has other text."""
    messages = [each for text, reply in said for each in (Message("user", text), reply)]
    messages.append(Message("user", last))
    variables = {} if thinks is None else {"enable_thinking": thinks}
    ids = encoders[name].encode(tuple(messages), variables)
    assert VOCABULARY.text(ids) == rendered(name, messages, **variables)


@pytest.mark.parametrize(
    ("name", "opened", "written", "stays"),
    [
        ("qwen", False, "<think>\nhm\n</think>\n\nyes", "assistant\nyes<|end|>"),
        ("qwen", False, "<think>\nhm\n</think>\n\n yes \n", "assistant\nyes<|end|>"),
        ("r1", True, "hm\n</think>\n\nyes", "<|start|>yes<|end|>"),
        ("keeps", True, "hm</think>yes", "assistant\n<think>hm</think>yes<|end|>"),
        ("keeps", True, "hm\n</think>\n\nyes", "assistant\n<think>hm</think>yes<|end|>"),
        ("brackets", False, "yes", "assistant yes<|end|>"),
    ],
)
def test_earlier_reasoning_is_as_the_template_wants(
    name: str, opened: bool, written: str, stays: str, encoders: dict[str, PromptEncoder]
) -> None:
    """Guards: reasoning of earlier turns that fills the context, or is missing where a model expects it."""
    messages = (Message("user", "why"), reply(written, opened=opened), Message("user", "and"))
    text = VOCABULARY.text(encoders[name].encode(messages))
    assert stays in text
    assert text == rendered(name, messages)


class OwnTokens(ByteVocabulary):
    """Letters have a second token each, which tokenizing does not find."""

    def __init__(self) -> None:
        super().__init__(control=True, special=SPECIAL, more=[bytes([each]) for each in b"abcdefghij"])

    def own(self, written: str) -> tuple[int, ...]:
        """Return ids of a text with the second tokens."""
        ids = self.tokenize(written.encode(), special=True)
        return tuple(256 + each - ord("a") if ord("a") <= each <= ord("j") else each for each in ids)


@pytest.mark.parametrize(
    ("text", "written", "kept"),
    [
        (QWEN, "<think>\nabc\n</think>\n\nbad", "bad"),
        (R1, "abc\n</think>\n\nbad", "bad"),
        (KEEPS, "abc</think>bad", "abc</think>bad"),
        # The template writes other whitespace than the model.
        (KEEPS, "abc\n</think>\n\nbad", "bad"),
    ],
)
def test_ids_stay_where_the_text_does(text: str, written: str, kept: str) -> None:
    """Guards: an earlier reply tokenized anew, so that its KV cache does not match."""
    vocabulary = OwnTokens()
    encoder = PromptEncoder(vocabulary, ChatTemplate(text, "test"), 1 << 20)
    try:
        question, more = Message("user", "zz"), Message("user", "zz")
        answer = Message("assistant", "bad", vocabulary.own(written), "abc")
        before = encoder.encode((question,))
        after = encoder.encode((question, answer, more))
        whole = (*before, *vocabulary.own(written))
        ids = "".join(map(chr, vocabulary.own(kept)))
        assert ids in "".join(map(chr, after))
        # The next prompt has the whole reply, or begins anew where the reasoning was.
        assert (after[: len(whole)] == whole) == (kept == written)
    finally:
        encoder.close()


@pytest.mark.parametrize(
    ("name", "message", "end"),
    [
        ("qwen", reply("<think>\nhm"), "assistant\n<think>\nhm"),
        ("qwen", Message("assistant", "", (), "hm"), "assistant\n<think>\nhm"),
        ("qwen", Message("assistant", "yes", (), "hm"), "assistant\n<think>\nhm\n</think>\n\nyes"),
        ("qwen", Message("assistant", "yes"), "assistant\nyes"),
        ("r1", Message("assistant", "", (), "hm"), "<|start|><think>\nhm"),
        ("r1", Message("assistant", "yes", (), "hm"), "<|start|><think>\nhm\n</think>\n\nyes"),
        ("r1", Message("assistant", "yes"), "<|start|><think>\n\n</think>\n\nyes"),
        ("r1", reply("hm\n</think>\nye", opened=True), "<|start|><think>\nhm\n</think>\nye"),
    ],
)
def test_a_reply_is_continued_with_its_reasoning(
    name: str, message: Message, end: str, encoders: dict[str, PromptEncoder]
) -> None:
    """Guards: a reply continued without what the model thought, or thinking that is never closed."""
    ids = encoders[name].encode((Message("user", "why"), message), continue_final_message=True)
    assert VOCABULARY.text(ids).endswith(end)


@pytest.mark.parametrize("name", ALL)
def test_markers_in_answers_are_text(name: str, encoders: dict[str, PromptEncoder]) -> None:
    """Guards: an answer about the tags cut at them by the template, or refused."""
    said = "close it with </think>, open it with <think>"
    messages = (Message("user", "how?"), Message("assistant", said), Message("user", "thanks"))
    text = VOCABULARY.text(encoders[name].encode(messages))
    assert said in text


def test_a_template_without_markers_gets_no_reasoning() -> None:
    """Guards: ids with markers in the prompt of another template."""
    plain = "{% for m in messages %}{{ m.content }};{% endfor %}"
    encoder = PromptEncoder(VOCABULARY, ChatTemplate(plain, "test"), 1 << 20)
    try:
        messages = (Message("user", "why"), reply("<think>\nhm\n</think>\n\nyes"), Message("user", "and"))
        assert VOCABULARY.text(encoder.encode(messages)) == "why;yes;and;"
    finally:
        encoder.close()


def test_other_markers(encoders: dict[str, PromptEncoder]) -> None:
    """Guards: markers other than <think> overlooked."""
    form = encoders["brackets"].reasoning
    assert form is not None
    assert form.markers == ("[THINK]", "[/THINK]")
