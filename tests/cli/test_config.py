"""Flags, variables, presets and the config file: who is heard, and what is said about a wrong value."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmoe_local.base.config_file import ConfigFile, config_path
from dsmoe_local.base.errors import FormatError, UsageError
from dsmoe_local.chat.commands.declare import Chat
from dsmoe_local.chat.commands.settings import COMMANDS as CHAT_COMMANDS
from dsmoe_local.chat.settings import SETTINGS, ChatSettings, change
from dsmoe_local.chat.turns import OnFull
from dsmoe_local.cli.configuration import configurable, keys_of, variable
from dsmoe_local.cli.main import COMMANDS, group, load_command, run
from dsmoe_local.cli.model_options import find_model, load_engine, sampling_parameters
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ALL_LAYERS, ModelOptions

SHARED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_config(text: str) -> None:
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(text, encoding="utf-8")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("DSMOE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def given_to_chat(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `dsmoe chat` is called with, in place of the call."""
    values: dict[str, Any] = {}

    def keep(**options: Any) -> None:
        values.clear()
        values.update(options)

    monkeypatch.setattr(load_command("chat"), "callback", keep)
    return values


def chat(*arguments: str) -> None:
    load_command("chat").main(list(arguments), "dsmoe-chat", standalone_mode=False)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dsmoe", *arguments])
        assert run(group, "dsmoe") in (1, 2)
    return capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_variable_and_a_key(name: str) -> None:
    """Guards: an option that only the command line can give; two options that share a key."""
    command = load_command(name)
    keys = [key for option in configurable(command) for key in keys_of(option)]
    assert len(set(keys)) == len(keys)
    alone = {"help", "version", "debug", "show_path"}
    options = [each for each in command.params if isinstance(each, click.Option) and each.name not in alone]
    for option in options:
        flags = [flag for flag in option.opts if flag.startswith("--")]
        assert flags, f"{option.opts} has no long flag"
        assert f"DSMOE_{flags[0][2:].upper().replace('-', '_')}" in list(option.envvar or ())


def test_the_settings_keys_are_the_chats_flags() -> None:
    """Guards /set save: keys that chat would not read again, or would read as another setting."""
    names = {key: option.name for option in configurable(load_command("chat")) for key in keys_of(option)}
    assert {setting.key: name for name, setting in SETTINGS.items()}.items() <= names.items()


LAYERS = ("flag", "variable", "preset", "section", "top")
OPTIONS: Mapping[str, tuple[str, str, Any]] = {
    # key: (parameter, a value's words for each layer, how it arrives)
    "temp": ("temperature", "0.{}", float),
    "top-k": ("top_k", "{}", int),
    "repeat-last-n": ("repeat_last_n", "1{}", int),
}


@SHARED
@given(
    layers=st.fixed_dictionaries({key: st.sets(st.sampled_from(LAYERS)) for key in OPTIONS}),
    preset=st.sampled_from(["--preset p", "variable", "section", "none"]),
)
def test_who_is_heard(layers: dict[str, set[str]], preset: str, given_to_chat: dict[str, Any]) -> None:
    """Guards the order flag, variable, preset, section, top level, built-in, for any set of them."""
    tables: dict[str, list[str]] = {"preset": [], "section": [], "top": []}
    arguments = ["--preset", "p"] if preset == "--preset p" else []
    with pytest.MonkeyPatch.context() as patch:
        if preset == "variable":
            patch.setenv("DSMOE_PRESET", "p")
        if preset == "section":
            tables["section"].append('preset = "p"')
        for key, (_, words, _) in OPTIONS.items():
            for number, layer in enumerate(LAYERS, 1):
                value = words.format(number)
                if layer not in layers[key]:
                    continue
                if layer == "flag":
                    arguments += [f"--{key}", value]
                elif layer == "variable":
                    patch.setenv(variable(key), value)
                else:
                    tables[layer].append(f"{key} = {value}")
        write_config(
            "\n".join([*tables["top"], "[chat]", *tables["section"], "[presets.p]", *tables["preset"]])
        )
        chat(*arguments)
    for key, (parameter, words, kind) in OPTIONS.items():
        heard = [each for each in LAYERS if each in layers[key] and (each != "preset" or preset != "none")]
        expected = kind(words.format(LAYERS.index(heard[0]) + 1)) if heard else None
        assert given_to_chat[parameter] == expected


def test_texts_flags_and_lists(given_to_chat: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a stop text cut at its spaces, a flag that cannot be unset, ~ that no shell expands."""
    write_config(
        'reverse-prompt = ["a b", "c"]\nstats = true\nlog-file = "~/llama.log"\nsystem = "be short"\n'
        "[batch]\nstats = 1\n"
    )
    chat()
    assert given_to_chat["stop"] == ("a b", "c")
    assert given_to_chat["stats"] is True
    assert given_to_chat["system"] == "be short"
    assert given_to_chat["log_file"] == Path.home() / "llama.log"
    monkeypatch.setenv("DSMOE_REVERSE_PROMPT", "x y\nz")
    monkeypatch.setenv("DSMOE_STATS", "0")
    chat()
    assert given_to_chat["stop"] == ("x y", "z")
    assert given_to_chat["stats"] is False
    chat("-r", "q", "--stats")
    assert given_to_chat["stop"] == ("q",)
    assert given_to_chat["stats"] is True


@pytest.mark.parametrize(
    ("config", "variables", "where"),
    [
        ("temp = 'warm'", {}, "config.toml: temp"),
        ("[chat]\ntop-k = 1.5", {}, "config.toml: [chat] top-k"),
        ("[chat]\ntop-k = true", {}, "config.toml: [chat] top-k"),
        ("stats = 'yes'", {}, "config.toml: stats"),
        ("ctx-size = [1]", {}, "config.toml: ctx-size"),
        ("", {"DSMOE_TOP_K": "many"}, "from DSMOE_TOP_K"),
        ("", {"DSMOE_N_GPU_LAYERS": "some"}, "from DSMOE_N_GPU_LAYERS"),
        ("", {"DSMOE_TEMP": "500"}, "from DSMOE_TEMP"),
        ("[presets.x]\ntop-p = 3", {"DSMOE_PRESET": "x"}, "[presets.x] top-p"),
        ("preset = 'y'", {}, "config.toml: preset"),
        ("model = 'nobody'", {}, "config.toml: model"),
        ("temp = 1\ntop-k == 3", {}, "line 2"),
    ],
)
def test_a_wrong_value_says_where_it_stands(
    config: str,
    variables: dict[str, str],
    where: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards: a complaint about a flag that nobody typed."""
    write_config(config)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # batch reads the model first.
    model = config_path().with_name("m.gguf")
    model.touch()
    arguments = [] if "model" in config else ["-m", str(model)]
    error = complaint(capsys, "batch", "in.jsonl", "-o", "out.jsonl", *arguments)
    if "[chat]" in config or "stats" in config:
        error = complaint(capsys, "chat", *arguments, "-p", "x")
    assert where in error
    assert "internal" not in error
    assert len(error.splitlines()) <= 3


def test_a_flags_own_mistake_stays_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a wrong flag blamed on the file that has the option, too."""
    write_config("top-k = 3\n")
    error = complaint(capsys, "chat", "--top-k", "many")
    assert "config" not in error
    assert "--help" in error


def test_unknown_keys_are_told_with_the_nearest(
    given_to_chat: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a typing mistake that is passed over; a key of another command taken for one."""
    write_config(
        "tempp = 1\nmax-errors = 3\nmodels-folder = 'x'\n[chatt]\na = 1\n[chat]\ntop_k = 3\n"
        "[batch]\nnonsense = 1\n[presets.p]\nctx-size = 1\ntemp = 1\n"
    )
    chat()
    notes = capsys.readouterr().err.splitlines()
    assert [note.partition("config.toml: ")[2] for note in notes] == [
        "'tempp' is no option; did you mean temp?",
        "'chatt' is no option; did you mean chat?",
        "'top_k' in [chat] is no option; did you mean top-k?",
        "'ctx-size' in [presets.p] is no option",
    ]
    # The file as a whole is config's concern.
    load_command("config").main([], standalone_mode=False)
    assert "'nonsense' in [batch]" in capsys.readouterr().err


def test_help_and_completion_need_no_valid_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: no help for those who have to repair their file."""
    write_config("this is no TOML")
    monkeypatch.setattr(sys, "argv", ["dsmoe", "chat", "--help"])
    assert run(group, "dsmoe") == 0
    assert "--temp" in capsys.readouterr().out
    for words in ("dsmoe chat --to", "dsmoe chat -m ", "dsmoe chat --preset "):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        monkeypatch.setenv("_DSMOE_COMPLETE", "bash_complete")
        monkeypatch.setattr(sys, "argv", ["dsmoe"])
        with pytest.raises(SystemExit):
            run(group, "dsmoe")
        captured = capsys.readouterr()
        assert not captured.err
        assert ("--top-k" in captured.out) == words.endswith("--to")
    with pytest.raises(FormatError, match="line 1"):
        chat()


def test_an_argument_outweighs_the_configured_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: "two models are named" for one that was named, once the config file has a default."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    write_config(f"model = '{tmp_path / 'b.gguf'}'\n")
    found: list[Path] = []
    monkeypatch.setattr(
        load_command("chat"),
        "callback",
        lambda words, named_model, **_: found.append(find_model(*words, named_model)),
    )
    chat(str(tmp_path / "a.gguf"))
    chat()
    assert [path.name for path in found] == ["a.gguf", "b.gguf"]
    with pytest.raises(UsageError, match="two models"):
        chat(str(tmp_path / "a.gguf"), "-m", str(tmp_path / "b.gguf"))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    load_command("config").main([*arguments, "--json"], standalone_mode=False)
    return {each["key"]: each for each in json.loads(capsys.readouterr().out)["options"]}


def test_config_shows_what_chat_gets(
    given_to_chat: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a table that says something else than what happens."""
    write_config(
        "temp = 0.5\nctx-size = 100\n[chat]\ntop-k = 3\nreverse-prompt = 'x'\npreset = 'p'\n"
        "[presets.p]\ntop-k = 7\nmin-p = 0.5\n"
    )
    monkeypatch.setenv("DSMOE_SEED", "11")
    monkeypatch.setenv("DSMOE_NO_HISTORY", "1")
    monkeypatch.setenv("DSMOE_BATCH_SIZE", "many")
    table = shown(capsys)
    assert {key: each["source"] for key, each in table.items() if each["source"] != "built-in"} == {
        "temp": "config",
        "ctx-size": "config",
        "reverse-prompt": "config",
        "preset": "config",
        "top-k": "preset",
        "min-p": "preset",
        "seed": "variable",
        "no-history": "variable",
        "batch-size": "variable",
    }
    assert table["top-k"]["where"] == f"{config_path()}: [presets.p] top-k"
    assert table["seed"]["where"] == "DSMOE_SEED"
    assert "not a valid integer" in table["batch-size"]["error"]
    monkeypatch.delenv("DSMOE_BATCH_SIZE")
    chat()
    for option in configurable(load_command("chat")):
        if option.expose_value:
            value = given_to_chat[str(option.name)]
            plain = list(value) if isinstance(value, tuple) else value
            assert shown(capsys)[keys_of(option)[0]]["value"] == plain


def test_config_as_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what people see: built-in values, places, escape sequences from the file."""
    write_config('system = "\\u001b[31mred"\n[presets."\\u009b1m"]\ntemp = 1\n')
    monkeypatch.setenv("DSMOE_TEMP", "0.25")
    load_command("config").main(["chat"], standalone_mode=False)
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["temp", "0.25", "DSMOE_TEMP"] in lines
    assert ["top-k", "40", "built-in"] in lines
    assert ["stats", "off", "built-in"] in lines
    assert "config file: system" in text
    assert "\x1b" not in text
    assert "\x9b" not in text
    load_command("config").main(["--path"], standalone_mode=False)
    assert capsys.readouterr().out == f"{config_path()}\n"
    with pytest.raises(UsageError, match="no command"):
        load_command("config").main(["chatt"], standalone_mode=False)


def test_config_does_not_show_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an access token on the screen, or in a report of a bug."""
    monkeypatch.setenv("DSMOE_TOKEN", "hf_secret")
    load_command("config").main(["convert"], standalone_mode=False)
    load_command("config").main(["convert", "--json"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "DSMOE_TOKEN" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        ("cpu-moe = true", [], ALL_LAYERS),
        ("cpu-moe = true", ["--n-cpu-moe", "3"], 3),
        ("n-cpu-moe = 3", ["--cpu-moe"], ALL_LAYERS),
        ("", ["--cpu-moe", "--n-cpu-moe", "3"], None),
    ],
)
def test_a_flag_outweighs_a_configured_rival(
    config: str, arguments: list[str], expected: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Guards: two options that exclude each other refused, though only one was typed."""
    write_config(config)
    loaded: list[ModelOptions] = []
    monkeypatch.setattr(EngineClient, "load", lambda options, *_, **__: loaded.append(options))
    monkeypatch.setattr(
        load_command("chat"), "callback", lambda **values: load_engine(tmp_path / "m.gguf", values)
    )
    if expected is None:
        with pytest.raises(UsageError, match="are given"):
            chat(*arguments)
    else:
        chat(*arguments)
        assert loaded[0].n_cpu_moe == expected


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
