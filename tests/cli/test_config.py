"""Flags, variables, presets and the config file: who is heard, and what is said about a wrong value."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.configured import chat, complaint, write_config

from dsmoe_local.base.config_file import config_path
from dsmoe_local.base.errors import FormatError, UsageError
from dsmoe_local.chat.settings import SETTINGS
from dsmoe_local.cli.commands import COMMANDS, load_command
from dsmoe_local.cli.main import group, run
from dsmoe_local.cli.model_argument import find_model
from dsmoe_local.cli.model_options import load_engine
from dsmoe_local.cli.options import Option, configurable, variable
from dsmoe_local.cli.reply_options import reply_settings
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ALL_LAYERS, ModelOptions, SamplingParameters

SHARED = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


_OWN_VARIABLES = {
    ("eval", "--sensitivity"): "EVAL_",
    ("quantize", "--device"): "QUANTIZE_",
    ("serve", "--keep"): "SERVE_",
    **{("worker", flag): "WORKER_" for flag in ("--host", "--port", "--insecure")},
}
"""Prefixes of variables where another command gives the same flag another meaning."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_variable_and_a_key(name: str) -> None:
    """Guards: an option that only the command line can give; two options that share a key; a file that one
    command reads, and that sends another off to measure for hours; a number that is a file elsewhere.
    """
    command = load_command(name)
    keys = [key for option in configurable(command) for key in option.keys]
    assert len(set(keys)) == len(keys)
    alone = {"help", "version", "debug", "show_path"}
    options = [each for each in command.params if isinstance(each, Option) and each.name not in alone]
    for option in options:
        flags = [flag for flag in option.opts if flag.startswith("--")]
        assert flags, f"{option.opts} has no long flag"
        own = _OWN_VARIABLES.get((name, flags[0]), "")
        assert f"DSMOE_{own}{flags[0][2:].upper().replace('-', '_')}" in option.variables


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
        built_in = getattr(SamplingParameters(), parameter)
        expected = kind(words.format(LAYERS.index(heard[0]) + 1)) if heard else built_in
        assert given_to_chat[parameter] == expected


@pytest.mark.parametrize("name", ["chat", "batch"])
@pytest.mark.parametrize("word", ["predict", "n-predict", "max-tokens", "n_predict", "max_tokens"])
def test_one_thing_has_every_name_that_people_know(
    name: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: `--max-tokens` that only batch takes, `--predict` that only chat does, `max_tokens` of requests
    that the config file does not take.
    """
    seen: list[Any] = []
    monkeypatch.setattr(load_command(name), "callback", lambda **values: seen.append(values["max_tokens"]))

    def run_with(*arguments: str) -> None:
        needed = ["in", "-o", "out"] if name == "batch" else []
        load_command(name).main([*needed, *arguments], standalone_mode=False)

    run_with(f"--{word}", "7")
    monkeypatch.setenv(variable(word), "8")
    run_with()
    monkeypatch.delenv(variable(word))
    for config in (f"{word} = 9", f"[{name}]\n{word} = 9", f"preset = 'p'\n[presets.p]\n{word} = 9"):
        write_config(config)
        run_with()
    assert seen == [7, 8, 9, 9, 9]


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
    "config",
    [
        "chat-template-kwargs = '{\"thinking\": true}'",
        "chat-template-kwargs = { thinking = true }",
        "[chat.chat_template_kwargs]\nthinking = true",
        "preset = 'p'\n[presets.p.chat-template-kwargs]\nthinking = true",
    ],
)
def test_variables_of_a_template_are_text_or_a_table(config: str, given_to_chat: dict[str, Any]) -> None:
    """Guards: a table taken for a section, and ignored."""
    write_config(config)
    chat()
    values = {name: value for name, value in given_to_chat.items() if name in SETTINGS}
    assert reply_settings(values).chat_template_kwargs == {"thinking": True}


@pytest.mark.parametrize(
    ("config", "variables", "where"),
    [
        ("chat-template-kwargs = [1]", {}, "config.toml: chat-template-kwargs"),
        ("chat-template-kwargs = { x = nan }", {}, "config.toml: chat-template-kwargs"),
        ("chat-template-kwargs = '[1]'", {}, "config.toml: chat-template-kwargs"),
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
        "tempp = 1\nmax-errors = 3\nmodels-folder = 'x'\n[chatt]\na = 1\n[chat]\ntop_q = 3\ntop_k = 3\n"
        "[batch]\nnonsense = 1\n[presets.p]\nctx-size = 1\ntemp = 1\n"
    )
    chat()
    notes = capsys.readouterr().err.splitlines()
    assert [note.partition("config.toml: ")[2] for note in notes] == [
        "'tempp' is not an option; did you mean temp?",
        "'chatt' is not an option; did you mean chat?",
        "'top_q' in [chat] is not an option; did you mean top-p?",
        "'ctx-size' in [presets.p] is not an option",
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
    assert run(lambda: group, "dsmoe") == 0
    assert "--temp" in capsys.readouterr().out
    for words in ("dsmoe chat --to", "dsmoe chat -m ", "dsmoe chat --preset "):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        monkeypatch.setenv("_DSMOE_COMPLETE", "bash_complete")
        monkeypatch.setattr(sys, "argv", ["dsmoe"])
        with pytest.raises(SystemExit):
            run(lambda: group, "dsmoe")
        captured = capsys.readouterr()
        assert not captured.err
        assert ("--top-k" in captured.out) == words.endswith("--to")
    with pytest.raises(FormatError, match="line 1"):
        chat()


def test_an_argument_outweighs_the_configured_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a model that is refused as a second one, since the config file has a default."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    write_config(f"model = '{tmp_path / 'b.gguf'}'\n")
    found: list[Path] = []
    monkeypatch.setattr(
        load_command("chat"),
        "callback",
        lambda words, named_model, **_: found.append(find_model(words[0] if words else None, named_model)),
    )
    chat(str(tmp_path / "a.gguf"))
    chat()
    assert [path.name for path in found] == ["a.gguf", "b.gguf"]
    with pytest.raises(UsageError, match="two models are named"):
        chat(str(tmp_path / "a.gguf"), "-m", str(tmp_path / "b.gguf"))


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
        with pytest.raises(UsageError, match="exclude each other"):
            chat(*arguments)
    else:
        chat(*arguments)
        assert loaded[0].n_cpu_moe == expected


def test_a_flag_is_taken_back(given_to_chat: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a boolean of the file or a variable that the command line cannot undo."""
    write_config("stats = true\nno-kv-offload = true\n[chat]\nplain = true\n")
    monkeypatch.setenv("DSMOE_NO_HISTORY", "1")
    chat()
    flags = ("stats", "keep_cache", "plain", "no_history")
    assert [given_to_chat[each] for each in flags] == [True] * 4
    chat("--no-stats", "--kv-offload", "--no-plain", "--history")
    assert [given_to_chat[each] for each in flags] == [False] * 4
    chat("--no-stats", "--stats", "--plain", "--no-plain")
    assert (given_to_chat["stats"], given_to_chat["plain"]) == (True, False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_can_be_taken_back_and_help_stays_short(name: str) -> None:
    """Guards: a flag without a way back; one whose way back is another option; help of twice the length."""
    command = load_command(name)
    options = [each for each in command.params if isinstance(each, click.Option)]
    words = [word for option in options for word in (*option.opts, *option.secondary_opts)]
    assert len(set(words)) == len(words)
    for option in configurable(command):
        assert bool(option.secondary_opts) == option.is_bool_flag
    with click.Context(command, info_name=name) as context:
        text = command.get_help(context)
        assert not [each for option in options for each in option.secondary_opts if f"{each} " in text]
        # Asked twice it is the same.
        assert command.get_help(context) == text


def test_a_preset_gives_settings_alone(
    given_to_chat: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: keys of a preset that are called no option, and obeyed."""
    write_config("[presets.p]\nmodel = 'nobody'\njson = true\ntemp = 0.1\n[chat]\nctx-size = 7\n")
    chat("--preset", "p")
    assert given_to_chat["temperature"] == 0.1
    assert given_to_chat["named_model"] is None
    assert given_to_chat["as_json"] is False
    notes = capsys.readouterr().err
    assert "'model' in [presets.p] is not an option" in notes


def test_help_needs_no_preset(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: no help behind --preset while the file is broken, or has no such preset."""
    for config in ("broken = = 1", ""):
        write_config(config)
        monkeypatch.setattr(sys, "argv", ["dsmoe", "chat", "--preset", "x", "--help"])
        assert run(lambda: group, "dsmoe") == 0
        assert "--temp" in capsys.readouterr().out
    assert "no preset 'x'" in complaint(capsys, "chat", "--preset", "x", "-p", "y")


def test_a_wrong_argument_is_not_blamed_on_the_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: "from DSMOE_MODEL" for a model that was typed."""
    monkeypatch.setenv("DSMOE_MODEL", "also-nobody")
    for arguments in (["chat", "nobody", "-p", "x"], ["eval", "nobody"], ["imatrix", "nobody", "-o", "x"]):
        error = complaint(capsys, *arguments)
        assert "'nobody'" in error
        assert "DSMOE_MODEL" not in error
    assert "from DSMOE_MODEL" in complaint(capsys, "imatrix", "-o", "x")


@pytest.mark.parametrize(
    ("value", "shown"), [("0", False), ("no", False), (" ", False), ("1", True), ("yes", True)]
)
def test_the_variable_of_debug(
    value: str, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: DSMOE_DEBUG=0 that switches tracebacks on."""
    monkeypatch.setenv("DSMOE_DEBUG", value)
    error = complaint(capsys, "inspect", "nobody")
    assert ("Traceback" in error) == shown


def test_a_window_is_no_context(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: another perplexity of the same model, since conversations have a context of another size."""
    seen: list[Any] = []
    for name in ("eval", "imatrix", "bench"):
        monkeypatch.setattr(load_command(name), "callback", lambda **values: seen.append(values["n_context"]))
    for config in (
        "ctx-size = 4096",
        "[eval]\nctx-size = 256\n[imatrix]\nctx-size = 256\n[bench]\nctx-size = 256\n",
    ):
        write_config(config)
        for name in ("eval", "imatrix", "bench"):
            load_command(name).main(["m"], standalone_mode=False)
    monkeypatch.setenv("DSMOE_CTX_SIZE", "128")
    load_command("eval").main(["m"], standalone_mode=False)
    assert seen == [512, 512, None, 256, 256, 256, 128]


def test_quantize_and_eval_share_no_sensitivity(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a perplexity that takes hours, since a file is named that dsmoe-quantize is to read."""
    seen: list[Any] = []
    for name in ("eval", "quantize"):
        monkeypatch.setattr(
            load_command(name), "callback", lambda **values: seen.append(values["sensitivity_file"])
        )

    def run() -> list[Any]:
        seen.clear()
        for name in ("eval", "quantize"):
            load_command(name).main(["m"], standalone_mode=False)
        return [each and each.name for each in seen]

    write_config('sensitivity = "common"\n')
    assert run() == [None, "common"]
    monkeypatch.setenv("DSMOE_SENSITIVITY", "variable")
    assert run() == [None, "variable"]
    monkeypatch.setenv("DSMOE_EVAL_SENSITIVITY", "own")
    assert run() == ["own", "variable"]
    monkeypatch.delenv("DSMOE_EVAL_SENSITIVITY")
    write_config('[eval]\nsensitivity = "section"\n')
    assert run() == ["section", "variable"]
    load_command("config").main(["eval", "--json"], standalone_mode=False)
    shown = {each["key"]: each for each in json.loads(capsys.readouterr().out)["options"]}
    assert shown["sensitivity"]["variable"] == "DSMOE_EVAL_SENSITIVITY"
    assert shown["sensitivity"]["source"] == "config"


def test_a_folder_with_a_nul(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: Python's own error for a path that no system takes."""
    write_config('models-folder = "a\\u0000b"\n')
    for arguments in (["models"], ["chat", "nobody", "-p", "x"], ["config"]):
        assert "config.toml: models-folder" in complaint(capsys, *arguments)
    write_config('log-file = "a\\u0000b"\n')
    assert "config.toml: log-file" in complaint(capsys, "chat", "-p", "x")


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each chat that `dsmoe chat` would hold on a terminal."""
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr("dsmoe_local.cli.chat.sys", SimpleNamespace(stdin=terminal, stdout=terminal))
    monkeypatch.setattr("dsmoe_local.cli.prompt_input.one_prompt", lambda *_: None)
    monkeypatch.setattr("dsmoe_local.cli.chat.find_model", lambda *_: Path("m.gguf"))
    monkeypatch.setattr("dsmoe_local.cli.chat.load_engine", lambda *_: nullcontext())
    held: list[tuple[Any, ...]] = []
    monkeypatch.setattr("dsmoe_local.cli.chat._converse", lambda *arguments: held.append(arguments))
    return held


@pytest.mark.parametrize("flag", ["--json", "--schema"])
def test_what_is_for_one_answer_does_not_hinder_a_chat(
    flag: str, chats: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: no chat at all, since a variable says what single answers look like."""
    value = ["none.json"] if flag == "--schema" else []
    with pytest.raises(UsageError, match=f"^{flag} is for one answer"):
        chat(flag, *value)
    monkeypatch.setenv(variable(flag[2:]), *(value or ["1"]))
    chat()
    write_config(f"{flag[2:]} = {'true' if flag == '--json' else repr(value[0])}")
    monkeypatch.delenv(variable(flag[2:]))
    chat()
    assert len(chats) == 2


@pytest.mark.parametrize(
    ("config", "arguments", "kept"),
    [
        ("", [], (None, False, False)),
        ("no-history = true", ["--session", "s"], ("s", False, None)),
        ("session = 's'", ["--no-history"], (None, False, True)),
        ("session = 's'\nno-history = true", ["--no-history"], (None, False, True)),
        ("", ["--session", "s", "--continue"], None),
        ("", ["--session", "s", "--no-history"], None),
        ("session = 's'\nno-history = true", [], None),
    ],
)
def test_which_conversation_is_continued(
    config: str, arguments: list[str], kept: tuple[Any, ...] | None, chats: list[Any]
) -> None:
    """Guards: a flag that the config file overrides; one of two conflicting options ignored in silence."""
    write_config(config)
    if kept is None:
        with pytest.raises(UsageError, match="exclude each other"):
            chat(*arguments)
    else:
        chat(*arguments)
        conversing = chats[0][3]
        assert (conversing.session, conversing.latest, conversing.no_history) == kept
