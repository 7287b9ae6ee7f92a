"""What /set saves is what the next chat begins with, whatever the rest of the config file says."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.configured import chat, write_config

from dsmoe_local.base.config_file import ConfigFile, config_path
from dsmoe_local.chat.commands.declare import Chat
from dsmoe_local.chat.commands.settings import COMMANDS as CHAT_COMMANDS
from dsmoe_local.chat.settings import ChatSettings, change
from dsmoe_local.chat.turns import OnFull
from dsmoe_local.cli.model_options import sampling_parameters

SHARED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_set() -> st.SearchStrategy[ChatSettings]:
    """Settings that /set can make."""
    values = {
        "temperature": st.floats(0, 100),
        "top_k": st.integers(0, 1000),
        "top_p": st.floats(0, 1),
        "repeat_penalty": st.floats(0.01, 100),
        "mirostat": st.integers(0, 2),
        "mirostat_tau": st.floats(0, 100),
        "seed": st.one_of(st.just("none"), st.integers(0, 2**32 - 2)),
        "max_tokens": st.one_of(st.just("none"), st.integers(1, 10_000)),
        "stop": st.lists(st.text("a 日\"'\n\\é-", min_size=1), max_size=2).map(json.dumps),
        "on_full": st.sampled_from([each.value for each in OnFull]),
    }

    def made(chosen: dict[str, Any]) -> ChatSettings:
        settings = ChatSettings()
        for name, value in chosen.items():
            settings = change(settings, name, str(value))
        return settings

    return st.fixed_dictionaries({}, optional=values).map(made)


def settings_of(values: dict[str, Any]) -> ChatSettings:
    longest = values["max_tokens"]
    return ChatSettings(
        sampling_parameters(dict(values)),
        None if longest == -1 else longest,
        values["stop"],
        OnFull(values["on_full"]),
    )


@SHARED
@given(
    first=as_set(),
    second=as_set(),
    above=st.sampled_from(["", "temp = 0.25\ntop-k = 9\non-full = 'shift'\n", "seed = 3\n"]),
)
def test_what_set_saves_is_what_the_next_chat_begins_with(
    first: ChatSettings, second: ChatSettings, above: str, given_to_chat: dict[str, Any]
) -> None:
    """Guards /set save and presets: a value that is not read again as it was, or one that stays behind."""
    write_config(above)
    here = SimpleNamespace(
        conversation=SimpleNamespace(settings=first),
        config=ConfigFile(config_path()),
        screen=SimpleNamespace(notice=lambda text: None),
    )
    run_set = CHAT_COMMANDS["set"].run
    run_set(cast(Chat, here), "save")
    chat()
    assert settings_of(given_to_chat) == first
    here.conversation.settings = second
    run_set(cast(Chat, here), "save")
    run_set(cast(Chat, here), "save mine")
    chat()
    assert settings_of(given_to_chat) == second
    here.conversation.settings = ChatSettings()
    run_set(cast(Chat, here), "save")
    chat()
    assert settings_of(given_to_chat) == ChatSettings()
    chat("--preset", "mine")
    assert settings_of(given_to_chat) == second
    run_set(cast(Chat, here), "use mine")
    assert here.conversation.settings == second
