"""Conversations to ids: as if every beginning were rendered anew, at a fraction of the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support import prompt_oracle
from support.chat_templates import ALL, HUB
from support.prompt_oracle import BOS, EOS, ChunkVocabulary, RefusalError

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.prompts.encoder import PromptEncoder
from dsmoe_local.engine.prompts.sandbox import SandboxedTemplate
from dsmoe_local.engine.prompts.segments import Conversation, Segments
from dsmoe_local.engine.prompts.template import ChatTemplate, Variables
from dsmoe_local.engine.reasoning import Markers, markers_in
from dsmoe_local.engine.types import Message


class LocalTemplate:
    """A ChatTemplate in this process."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sandboxed = SandboxedTemplate(text, "test")

    def close(self) -> None:
        """Nothing to close."""

    @property
    def markers(self) -> Markers | None:
        """See ChatTemplate."""
        return self.sandboxed.markers

    def segments(self, messages: Sequence[Message], variables: Variables | None) -> Segments | None:
        """See ChatTemplate."""
        return self._conversation(messages, variables).segments()

    def render(self, messages: Sequence[Message], variables: Variables | None) -> str:
        """See ChatTemplate."""
        return self._conversation(messages, variables).render()

    def stretches(
        self,
        messages: Sequence[Message],
        replies: Sequence[int],
        variables: Variables | None,
        *,
        open_end: bool,
        stopped: Callable[[], bool],
    ) -> list[Segments | None]:
        """See ChatTemplate."""
        return list(self._conversation(messages, variables).stretches(replies, open_end=open_end))

    def _conversation(self, messages: Sequence[Message], variables: Variables | None) -> Conversation:
        self.sandboxed.begin_conversation({**(variables or {}), "bos_token": BOS, "eos_token": EOS})
        return Conversation(self.sandboxed, messages)


def local(text: str) -> tuple[PromptEncoder, ChunkVocabulary]:
    vocabulary = ChunkVocabulary()
    return PromptEncoder(vocabulary, cast(ChatTemplate, LocalTemplate(text)), 1 << 20), vocabulary


_ENCODERS: dict[str, PromptEncoder] = {}


def check(text: str, messages: Sequence[Message], *, continued: bool) -> bool:
    """Whether there are ids; fails unless they, or the reason why there are none, are the oracle's."""
    if text not in _ENCODERS:
        _ENCODERS[text] = local(text)[0]
    found = _outcome(lambda: _ENCODERS[text].encode(tuple(messages), continue_final_message=continued))
    expected = _outcome(lambda: prompt_oracle.encode(text, messages, continued=continued))
    if isinstance(found, str) and isinstance(expected, str):
        assert expected[:30] in found
        return False
    assert found == expected
    return True


def _outcome(encode: Callable[[], Sequence[int]]) -> list[int] | str:
    try:
        return list(encode())
    except (EngineError, RefusalError) as error:
        return str(error)


CONTENTS = st.one_of(
    st.sampled_from(
        ["", " ", "\n\n", "hi", " a b ", "\tx\n", f"a {EOS} b", BOS, "<|im_end|>\n", "\ud83d", "a\ud83dc",
         "0", "中", "<think>hm</think> yes", "reason</think>", "{{ x }}", "\u2028", "x" * 40, "\r\n y"]
    ),
    st.text(max_size=12),
)  # fmt: skip
ROLES = st.sampled_from(["user", "assistant", "user", "assistant", "system", "tool", "ipython"])
MESSAGES = st.builds(
    Message, ROLES, CONTENTS, st.one_of(st.just(()), st.tuples(st.integers(5000, 5009), st.integers(0, 9)))
)
ALTERNATING = st.lists(st.tuples(CONTENTS, st.booleans()), min_size=1, max_size=9).map(
    lambda said: [
        Message(("user", "assistant")[at % 2], text, (7000 + at, 7) if at % 2 and exact else ())
        for at, (text, exact) in enumerate(said)
    ]
)
TALKS = st.one_of(
    ALTERNATING,
    st.tuples(CONTENTS, ALTERNATING).map(lambda said: [Message("system", said[0]), *said[1]]),
    st.lists(MESSAGES, min_size=1, max_size=8),
)


# Those of reasoning models are tested in test_reasoning_prompts.
@pytest.mark.parametrize("name", [name for name, text in ALL.items() if markers_in(text) is None])
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(talk=TALKS, continued=st.booleans())
def test_ids_are_those_of_the_slow_way(name: str, talk: list[Message], continued: bool) -> None:
    """Guards: a rendering that goes on where another one ended, and differs from one that began anew."""
    check(ALL[name], talk, continued=continued and talk[-1].role == "assistant")


def work(text: str, n_turns: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """What a conversation of so many turns takes: looks of the template at a message, texts and bytes to
    tokenize.
    """
    looks = 0

    def look(self: ImmutableSandboxedEnvironment, obj: object, name: str) -> object:
        nonlocal looks
        looks += isinstance(obj, dict)
        return ImmutableSandboxedEnvironment.getitem(self, obj, name)

    encoder, vocabulary = local(text)
    talk = tuple(
        Message(("user", "assistant")[at % 2], f"message {at}", (7000 + at,) * (at % 2))
        for at in range(n_turns)
    )
    environment = type(cast(LocalTemplate, encoder.template).sandboxed._environment)
    with monkeypatch.context() as patched:
        for name in ("getattr", "getitem"):
            patched.setattr(environment, name, look)
        encoder.encode(talk)
    return looks, vocabulary.n_calls, vocabulary.n_bytes


@pytest.mark.parametrize("name", [name for name in HUB if name not in ("deepseek-r1", "mistral3", "qwen3")])
def test_the_work_grows_as_the_conversation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a conversation that is rendered from its beginning for each of its replies."""
    once, twice = (work(HUB[name], n_turns, monkeypatch) for n_turns in (100, 200))
    for small, large in zip(once, twice, strict=True):
        assert 0 < large <= 2.2 * small
    # Each message, with and without its content, and twice: when it is the newest, and when it is not.
    looks, n_calls, _ = once
    assert looks <= 100 * 4 * 8
    # Each content, and each text of the template once.
    assert n_calls <= 50 + 10


@pytest.mark.parametrize("name", ["deepseek-r1", "mistral3", "qwen3"])
def test_templates_that_look_at_the_whole_are_rendered_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: more than one rendering, with and without contents, for each reply; texts tokenized again."""
    looks, n_calls, n_bytes = work(HUB[name], 40, monkeypatch)
    assert looks <= 22 * 2 * 40 * 8
    # The ids of these replies do not have their text, so a reasoning model's are tokenized as text.
    assert n_calls <= 20 + 10 + (20 if markers_in(HUB[name]) else 0)
    assert n_bytes < 40 * 100


def test_a_conversation_that_goes_on_is_not_tokenized_again() -> None:
    """Guards: every message of a chat tokenized again for each message that follows."""
    encoder, vocabulary = local(HUB["chatml"])
    talk: list[Message] = []
    for at in range(20):
        talk.append(Message("user", f"message {at}"))
        before = vocabulary.n_calls
        ids = encoder.encode(tuple(talk))
        assert encoder.encode(tuple(talk)) == ids
        # The new content, and what the template puts around it the first two times.
        assert vocabulary.n_calls - before <= (1 if at >= 2 else 5)
        talk.append(Message("assistant", f"reply {at}", (7000 + at,)))


def test_stopping_ends_the_work() -> None:
    """Guards: a cancelled long prompt that is tokenized to its end."""
    encoder, vocabulary = local(HUB["chatml"])
    talk = tuple(Message("user", f"message {at}") for at in range(100))
    with pytest.raises(InterruptedRunError):
        encoder.encode(talk, stopped=lambda: vocabulary.n_calls >= 3)
    assert vocabulary.n_calls == 3


@pytest.mark.soak
@pytest.mark.parametrize("name", ALL)
@settings(max_examples=1500, suppress_health_check=list(HealthCheck))
@given(talk=TALKS, continued=st.booleans())
def test_soak_ids_are_those_of_the_slow_way(name: str, talk: list[Message], continued: bool) -> None:
    """As above, for longer."""
    check(ALL[name], talk, continued=continued and talk[-1].role == "assistant")
