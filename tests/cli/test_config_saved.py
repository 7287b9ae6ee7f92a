"""What /set saves is what the next chat begins with, whatever the rest of the config file says."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.configured import chat, write_config

from dsmoe_local.base.config_file import ConfigFile, config_path
from dsmoe_local.base.errors import UsageError
from dsmoe_local.chat.commands.declare import Chat
from dsmoe_local.chat.commands.settings import COMMANDS as CHAT_COMMANDS
from dsmoe_local.chat.settings import ChatSettings, OnFull, change, presets_of
from dsmoe_local.cli.reply_options import reply_settings

SHARED = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_set() -> st.SearchStrategy[dict[str, str]]:
    """What /set is given: texts by name."""
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
    return st.fixed_dictionaries({}, optional={name: each.map(str) for name, each in values.items()})


def made(begun: ChatSettings, chosen: dict[str, str]) -> ChatSettings:
    for name, text in chosen.items():
        begun = change(begun, name, text)
    return begun


@SHARED
@given(
    first=as_set(),
    second=as_set(),
    above=st.sampled_from(["", "temp = 0.25\ntop-k = 9\non-full = 'shift'\n", "seed = 3\nmax_tokens = 7\n"]),
    flags=st.sampled_from([(), ("-n", "30", "-s", "1"), ("--temp", "0")]),
)
def test_what_set_saves_is_what_the_next_chat_begins_with(
    first: dict[str, str],
    second: dict[str, str],
    above: str,
    flags: tuple[str, ...],
    given_to_chat: dict[str, Any],
) -> None:
    """Guards /set save and presets: a value that is not read again as it was, one that stays behind, a flag
    of one run that is kept.
    """
    write_config(above)

    def begun(*arguments: str) -> ChatSettings:
        chat(*arguments)
        return reply_settings(dict(given_to_chat))

    here = SimpleNamespace(
        conversation=SimpleNamespace(
            settings=made(begun(*flags), first), engine=SimpleNamespace(info=SimpleNamespace(server=""))
        ),
        config=ConfigFile(config_path()),
        screen=SimpleNamespace(notice=lambda text: None),
        save=lambda: None,
    )

    def run_set(words: str) -> None:
        CHAT_COMMANDS["set"].run(cast(Chat, here), words)

    wanted = made(begun(), first)
    with nullcontext() if first else pytest.raises(UsageError, match="nothing was set"):
        run_set("save")
    assert begun() == wanted
    wanted = made(wanted, second)
    here.conversation.settings = made(begun(*flags), second)
    with nullcontext() if second else pytest.raises(UsageError, match="nothing was set"):
        run_set("save")
    assert begun() == wanted
    with suppress(UsageError):  # All that was set may be the defaults.
        run_set("save mine")
    run_set("reset")
    run_set("save")
    assert begun() == ChatSettings()
    if "mine" in presets_of(here.config.values()):
        # What the preset does not have is the default, since that is what it was saved over.
        assert begun("--preset", "mine") == made(ChatSettings(), second)
        run_set("use mine")
        assert here.conversation.settings == made(ChatSettings(), second)
