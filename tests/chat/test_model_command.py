"""/model: another model continues the conversation; one that cannot be loaded leaves the old one in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.models import tiny_model
from support.talking import TalkingScreen, chat_with
from support.tiny_gguf import DENSE, MOE, NARROW, write_tiny

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.paths import data_folder
from dsmoe_local.chat.chat import Chat
from dsmoe_local.chat.commands.completion import choices
from dsmoe_local.chat.commands.table import COMMANDS
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.engine.errors import EngineCrashError
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.discovery import recent_models


class NamedEngine(FakeEngine):
    """A fake engine that has the name, the vocabulary and the experts of the file that it loads."""

    def reload(
        self,
        options: ModelOptions,
        listen: progress.Listener = progress.ignore,
        stop: threading.Event | None = None,
    ) -> None:
        super().reload(options, listen, stop)
        name = options.path.stem
        n_experts = 0 if name == "dense" else 64
        self.info = replace(
            self.info, name=name, path=options.path, vocabulary=f"of {name}", n_routed_experts=n_experts
        )


@pytest.fixture
def models() -> Path:
    """The models folder: alpha, beta, dense, and a file that is no model."""
    folder = data_folder() / "models"
    folder.mkdir(parents=True)
    write_tiny(folder / "alpha.gguf", NARROW)
    write_tiny(folder / "beta.gguf", MOE)
    write_tiny(folder / "dense.gguf", DENSE)
    (folder / "broken.gguf").write_bytes(b"GGUF")
    return folder


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[SessionStore]:
    store = SessionStore.open(tmp_path / "sessions")
    yield store
    store.close()


def named_chat(sessions: SessionStore | None = None) -> tuple[Chat, TalkingScreen, NamedEngine]:
    engine = NamedEngine(lambda prompt: prompt.rsplit(": ", 1)[-1])
    chat, screen = chat_with(engine, sessions)
    return chat, screen, engine


def take(chat: Chat, *texts: str) -> None:
    for text in texts:
        chat.take(text)
    chat.close()


def test_the_conversation_goes_on(models: Path) -> None:
    """Guards: token ids of the old model given to the new one; a conversation that begins again."""
    chat, screen, engine = named_chat()
    take(chat, "one", "/undo", "/redo", "/model beta", "two")
    assert engine.options.path == models / "beta.gguf"
    assert screen.replies == ["one", "two"]
    first, reply, *_ = chat.conversation.turns
    assert (first.content, reply.content) == ("one", "one")
    assert reply.token_ids == ()
    assert chat.conversation.turns[-1].token_ids
    text = bytes(each - 1 for each in engine.requests[-1].prompt if isinstance(each, int)).decode()
    assert text == "user: one\nassistant: one\nuser: two\n"
    assert "beta · " in screen.said
    assert "the replies so far are from fake; beta continues" in screen.said
    assert recent_models() == [models / "beta.gguf"]


def test_a_complete_reply_of_another_model(models: Path) -> None:
    """Guards: text of another model that is added to a complete reply, unless the vocabularies are equal."""
    chat, screen, _ = named_chat()
    take(chat, "one", "/model beta", "/continue")
    assert screen.errors[-1].what == "the reply is complete"
    assert screen.replies == ["one"]


def test_ids_of_the_same_vocabulary_stay(models: Path) -> None:
    """Guards: a reply that is tokenized again although the other model is only another type."""
    chat, _, engine = named_chat()
    engine.info = replace(engine.info, vocabulary="of beta")
    take(chat, "one", "/model beta")
    assert chat.conversation.turns[-1].token_ids


def test_back_to_the_first_model(models: Path, sessions: SessionStore) -> None:
    """Guards: ids of earlier replies lost, although the session has them; a session of the wrong model."""
    chat, screen, _ = named_chat(sessions)
    chat.take("/model alpha")
    chat.take("one")
    ids = chat.conversation.turns[-1].token_ids
    chat.take("/model beta")
    assert chat.conversation.turns[-1].token_ids == ()
    chat.take("two")
    chat.take("/model alpha")
    take(chat, "three")
    assert [turn.content for turn in chat.conversation.turns[::2]] == ["one", "two", "three"]
    assert chat.conversation.turns[1].token_ids == ids
    assert chat.conversation.turns[3].token_ids == ()
    assert screen.notices.count("the replies so far are from alpha; beta continues") == 1
    (summary,) = sessions.summaries()
    assert (summary.model, summary.model_path) == ("alpha", str(models / "alpha.gguf"))
    assert summary.n_turns == 6


def test_a_session_that_was_deleted_meanwhile(models: Path, sessions: SessionStore) -> None:
    """Guards: a conversation that is empty after /model, since its rows are gone."""
    chat, screen, _ = named_chat(sessions)
    chat.take("one")
    assert chat.session is not None
    sessions.delete(chat.session)
    take(chat, "/model beta", "two")
    assert [turn.content for turn in chat.conversation.turns[::2]] == ["one", "two"]
    assert "deleted by another program" in screen.said
    assert sessions.summaries()[0].n_turns == 4


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (EngineCrashError("the engine's process was killed by SIGKILL"), "killed by SIGKILL"),
        (InterruptedRunError("interrupted"), "[stopped]"),
    ],
)
def test_a_model_that_cannot_be_loaded(failure: Exception, said: str, models: Path) -> None:
    """Guards: a chat without a model after a load that failed; no word on the reason."""
    chat, screen, engine = named_chat()
    engine.failures.append(failure)
    take(chat, "one", "/model beta", "two")
    assert said in screen.said
    assert "fake stays in use; the next message loads it again" in screen.said
    assert screen.replies == ["one", "two"]
    assert chat.conversation.turns[1].token_ids
    assert recent_models() == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("broken", "it ends in the middle"),
        ("gamma", "no model is called 'gamma'"),
        ("alpah", "did you mean alpha?"),
        ("owner/name", "dsmoe pull owner/name"),
        ("/", "a folder is not a model"),
    ],
)
def test_a_model_that_is_refused(word: str, said: str, models: Path) -> None:
    """Guards: a model in use that is unloaded for a word that names none, or a file that is damaged."""
    chat, screen, engine = named_chat()
    take(chat, f"/model {word}", "one")
    assert said in screen.said
    assert engine.reloads == []
    assert screen.replies == ["one"]


def test_options_of_the_command_line(models: Path) -> None:
    """Guards: another model with a context, a template or experts that were meant for the first."""
    chat, screen, engine = named_chat()
    chat.options = ModelOptions(
        Path("x.gguf"), n_context=200, n_threads=3, chat_template="chatml", n_experts_per_token=1
    )
    take(chat, "/model beta")
    assert engine.options == ModelOptions(models / "beta.gguf", n_context=MOE.n_context, n_threads=3)
    assert "the context has 128 tokens: the model was trained for no more" in screen.said
    assert "--chat-template and --active-experts are not used" in screen.said


def test_observed_experts(models: Path) -> None:
    """Guards: an observer of experts that a dense model does not have; one that is forgotten."""
    chat, screen, engine = named_chat()
    take(chat, "/experts on", "/model beta")
    assert chat.experts.on
    assert [option.name for option in engine.observers[-1]] == ["routing"]
    take(chat, "/model dense")
    assert not chat.experts.on
    assert "experts are no longer observed: the model is dense" in screen.said


def test_the_list_and_completion(models: Path) -> None:
    """Guards: names that nobody knows; no mark at the model in use."""
    chat, screen, _ = named_chat()
    take(chat, "/model alpha", "/model", "/model alpha")
    rows = {row[0]: row[1:] for row in screen.tables[-1]}
    assert rows.keys() == {"*alpha", " beta", " dense", " broken"}
    assert rows["*alpha"][0] == "BF16"
    assert "GGUF" in rows[" broken"][2] or "file" in rows[" broken"][2]
    assert "alpha is in use already" in screen.said
    offered = [choice.text for choice in choices("/model be", COMMANDS, chat)]
    assert "beta" in offered


def test_the_template_of_the_new_model() -> None:
    """Guards: a conversation in the form of the old model's template, in a real engine."""
    first, second = (
        tiny_model(
            "{% for m in messages %}" + mark + "{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}" + mark + "{% endif %}"
        )
        for mark in ("<", ">")
    )
    with EngineClient.load(ModelOptions(first, n_context=256)) as engine:
        chat, screen = chat_with(engine)
        take(chat, "/set seed 1", "/set max_tokens 2", "a", f"/model {second}", "b")
        text = "".join(engine.decode(chat.conversation.context_ids()[1:]))  # without BOS
        assert not screen.errors
        assert engine.options.path == second
    assert text.startswith(">a>")
    assert ">b" in text
    assert "<" not in text.replace(chat.conversation.turns[1].content, "")
