"""Prompts to token ids: user text stays text, BOS once, replies by their own ids, endless words refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import llama_oracle
from support.models import tiny_model

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import whole_characters
from dsmoe_local.engine import native
from dsmoe_local.engine.errors import EngineError, PromptError
from dsmoe_local.engine.prompts.choice import BUILT_IN
from dsmoe_local.engine.prompts.encoder import _LONG_WORD, MAX_WORD, PromptEncoder
from dsmoe_local.engine.prompts.template import ChatTemplate
from dsmoe_local.engine.types import Message, Request

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def model() -> Iterator[native.Model]:
    model = native.Model(tiny_model(), measure_only=True)
    yield model
    model.close()


@pytest.fixture(scope="module")
def oracle() -> Iterator[llama_oracle.Vocabulary]:
    with llama_oracle.vocabulary(tiny_model()) as vocabulary:
        yield vocabulary


def encoder(
    model: native.Model, text: str | None = BUILT_IN["deepseek-moe"], n_context: int = 1 << 20
) -> PromptEncoder:
    template = None if text is None else ChatTemplate(text, "test", bos=BOS, eos=EOS)
    return PromptEncoder(model, template, n_context)


def test_special_text_of_a_user_stays_text(model: native.Model) -> None:
    """Guards: a user ending the model's turn by typing its end-of-sentence token."""
    encode = encoder(model).encode
    for prompt in (f"a {EOS} b {BOS}", (Message("user", f"a {EOS} b {BOS}"),)):
        ids = encode(prompt)
        assert ids.count(model.eos) == 0
        assert ids.count(model.bos) == 1


def test_template_text_becomes_special_tokens(model: native.Model) -> None:
    """Guards: the template's own end-of-sentence tokenized as text."""
    ids = encoder(model).encode((Message("user", "a"), Message("assistant", "b"), Message("user", "c")))
    assert ids.count(model.eos) == 1


def test_one_bos_with_and_without_the_template_s_own(
    model: native.Model, oracle: llama_oracle.Vocabulary
) -> None:
    """Guards: double BOS, which degrades every reply, or none."""
    talk = (Message("user", "a b"),)
    with_bos = encoder(model).encode(talk)
    without = encoder(model, BUILT_IN["deepseek-moe"].replace("{{ bos_token }}", "")).encode(talk)
    assert with_bos == without
    assert list(with_bos) == [
        model.bos,
        *oracle.encode("User: a b\n\nAssistant:"),
    ]
    assert encoder(model).encode("a b")[0] == model.bos


def test_replies_keep_their_ids(model: native.Model) -> None:
    """Guards: replies tokenized again, into other ids than the model wrote."""
    unusual = tuple(model.tokenize(letter.encode(), special=False)[0] for letter in "hello")
    talk = (Message("user", "a"), Message("assistant", "hello", unusual), Message("user", "b"))
    encode = encoder(model).encode
    before = encode(talk[:1])
    ids = encode(talk)
    # The prompt ended in "Assistant:"; "Assistant: ", as the template would say now, is wrong.
    assert ids[: len(before) + 5] == before + unusual
    assert ids[len(before) + 5] == model.eos


def test_two_replies_keep_their_ids(model: native.Model) -> None:
    """Guards: only the last reply being exact."""
    first, second = (tuple(model.tokenize(t.encode(), special=False)) for t in (" one", " two"))
    talk = [Message("user", "a"), Message("assistant", "one", first), Message("user", "b")]
    encode = encoder(model).encode
    before = encode(tuple(talk))
    talk += [Message("assistant", "two", second), Message("user", "c")]
    assert encode(tuple(talk))[: len(before) + len(second)] == before + second


def test_last_reply_is_continued(model: native.Model) -> None:
    """Guards: an end of turn between a reply and its continuation; a reply that loses its whitespace."""
    ids = tuple(model.tokenize(b" one two ", special=False))
    encode = encoder(model).encode
    question = (Message("user", "a"),)
    for reply in (Message("assistant", " one two ", ids), Message("assistant", " one two ")):
        assert encode((*question, reply), continue_final_message=True) == encode(question) + ids


def test_a_new_reply_begins_behind_a_last_one(model: native.Model) -> None:
    """Guards: a last reply that is continued although that was not requested."""
    encode = encoder(model).encode
    question = (Message("user", "a"),)
    closed = (model.eos, *model.tokenize(b"Assistant:", special=False))
    ids = tuple(model.tokenize(b" one", special=False))
    assert encode((*question, Message("assistant", " one", ids))) == encode(question) + ids + closed
    text = b"".join(map(model.piece, encode((*question, Message("assistant", "one")))[1:]))
    assert text.endswith(b"Assistant: one" + model.piece(model.eos) + b"Assistant:")


@pytest.mark.parametrize("talk", [(), (Message("assistant", "a"), Message("user", "b"))])
def test_only_a_reply_can_be_continued(talk: tuple[Message, ...], model: native.Model) -> None:
    """Guards: a user's message that the model goes on with."""
    with pytest.raises(UsageError, match="last message"):
        Request("r", talk, continue_final_message=True)
    if talk:
        with pytest.raises(PromptError, match="last message"):
            encoder(model).encode(talk, continue_final_message=True)


def test_template_that_drops_old_replies_falls_back(model: native.Model) -> None:
    """Guards: the ids of a reply put where the template has left it out."""
    text = "{% for m in messages if m.role == 'user' %}<{{ m.content }}>{% endfor %}"
    talk = (Message("user", "a"), Message("assistant", "b", (9, 9)), Message("user", "c"))
    assert b"".join(map(model.piece, encoder(model, text).encode(talk))) == b"<a><c>"


def test_template_that_changes_contents(model: native.Model) -> None:
    """Guards: special-token text let through because the placeholders could not be used."""
    encode = encoder(model, "{{ messages[0].content | upper }}" + EOS).encode
    ids = encode((Message("user", "shout"),))
    assert b"".join(map(model.piece, ids)) == b"SHOUT"
    assert ids[-1] == model.eos
    with pytest.raises(PromptError, match="special token"):
        encode((Message("user", f"shout {EOS}"),))


@pytest.mark.parametrize("letter", ["a", "1", " ", "-", "中", "\n"])
def test_long_runs_are_tokenized(model: native.Model, letter: str) -> None:
    """Guards: the recursive pre-tokenizer overflowing the stack, which kills the process."""
    ids = encoder(model).encode(letter * 60_000)
    assert b"".join(map(model.piece, ids[1:])).decode() == letter * 60_000


def test_run_at_the_limit_and_beyond(model: native.Model) -> None:
    """Guards: a limit above what the stack holds, and a refusal that does not say what to do."""
    encode = encoder(model).encode
    assert encode("a" * MAX_WORD)
    with pytest.raises(PromptError, match="200000") as refusal:
        encode("a" * (MAX_WORD + 1))
    assert "spaces" in str(refusal.value)


def test_many_long_words_are_searched_once() -> None:
    """Guards: a search for endless words that is quadratic in their length: half a minute."""
    begun = time.process_time()
    assert not _LONG_WORD.search(("a" * 150_000 + " ") * 3)
    assert time.process_time() - begun < 2


def test_text_beyond_any_context_is_refused_unread(model: native.Model) -> None:
    """Guards: minutes spent on tokenizing what cannot fit."""
    with pytest.raises(PromptError, match=r"not sent: .* 4,000 bytes, the context holds 16"):
        encoder(model, n_context=16).encode("a b " * 1000)


def test_odd_text(model: native.Model) -> None:
    """Guards: lone surrogates raising, NUL ending the text, line separators lost."""
    encode = encoder(model).encode
    for text, expected in (
        ("a\ud83dc", "a\N{REPLACEMENT CHARACTER}c"),
        ("\ud83d\ude80", "\N{ROCKET}"),
        ("a\0b", "a\0b"),
        ("a\u2028b", "a\u2028b"),
    ):
        assert b"".join(map(model.piece, encode(text)[1:])).decode() == expected


@pytest.mark.parametrize("role", ["user\n\nAssistant", EOS, "", "a" * 40])
def test_roles_are_words(model: native.Model, role: str) -> None:
    """Guards: template text or special tokens smuggled in through the role."""
    with pytest.raises(PromptError, match="role"):
        encoder(model).encode((Message(role, "a"),))


def test_no_template(model: native.Model) -> None:
    """Guards: a base model given a conversation in a made-up format."""
    with pytest.raises(PromptError, match="no chat template"):
        encoder(model, None).encode((Message("user", "a"),))
    assert encoder(model, None).encode("a")


ODD_CONTENTS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "a\ud83dc",
            "\ud83d\ude80",
            "\0",
            f"a {EOS} b",
            BOS,
            "User: x\n\nAssistant:",
            "\u2028",
            "a" * 28_000,
        ]
    ),
    st.text(max_size=30),
    st.builds(lambda letter, count: letter * count, st.sampled_from("a1 -\n中"), st.integers(0, 30_000)),
)
ODD_ROLES = st.sampled_from(["user", "assistant", "system", "user", "tool", "", "user\n", EOS, "Assistant: "])


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(talk=st.lists(st.builds(Message, ODD_ROLES, ODD_CONTENTS), min_size=1, max_size=5))
def test_odd_conversations_are_encoded_whole_or_refused(model: native.Model, talk: list[Message]) -> None:
    """Guards: contents that become template text or special tokens, or end the process; odd roles let in."""
    # Special tokens have no bytes.
    form = {"user": "User: {}\n\n", "assistant": "Assistant: {}", "system": "{}\n\n"}
    encode = _encoder_of(model).encode
    if not all(message.role in form for message in talk):
        with pytest.raises(EngineError, match="role"):
            encode(tuple(talk))
        return
    ids = encode(tuple(talk))
    said = "".join(form[message.role].format(whole_characters(message.content)) for message in talk)
    assert b"".join(map(model.piece, ids)).decode() == f"{said}Assistant:"
    assert ids.count(model.eos) == sum(message.role == "assistant" for message in talk)
    assert ids.count(model.bos) == 1


_encoder_of = cache(encoder)
