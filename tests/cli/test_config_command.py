"""`dsmoe config`: what it shows is what commands get, and nothing that is secret or no JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.configured import chat, complaint, shown, write_config

from dsmoe_convert.demo.calibration import N_ACTIVE
from dsmoe_local.base.config_file import config_path
from dsmoe_local.base.errors import UsageError
from dsmoe_local.chat.settings import SETTINGS
from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.options import configurable
from dsmoe_local.engine.parameters import SamplingParameters
from dsmoe_local.evaluate.importance import SAVE_EVERY
from dsmoe_quantize.budget.sensitivity import SAMPLE


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
    assert "'many' is not a whole number" in table["batch-size"]["error"]
    monkeypatch.delenv("DSMOE_BATCH_SIZE")
    chat()
    for option in configurable(load_command("chat")):
        if option.expose_value:
            value = given_to_chat[str(option.name)]
            plain = list(value) if isinstance(value, tuple) else value
            assert shown(capsys)[option.keys[0]]["value"] == plain


def test_json_has_the_values_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: null for a default that the table and the help state; a default that help misstates."""
    sampling = SamplingParameters()
    for name in ("chat", "batch"):
        table = shown(capsys, name)
        for setting in sampling.__dataclass_fields__:
            if setting != "seed":
                assert table[SETTINGS[setting].key]["value"] == getattr(sampling, setting)
        assert (table["seed"]["value"], table["predict"]["value"]) == (-1, -1)
        assert table["predict"]["in_words"] == "-1"
        assert table["reverse-prompt"]["value"] == []
        assert (table["ctx-size"]["value"], table["ctx-size"]["in_words"]) == (None, "what fits")
    assert shown(capsys, "quantize")["sample"]["value"] == SAMPLE
    assert shown(capsys, "imatrix")["save-every"]["value"] == SAVE_EVERY
    assert shown(capsys, "imatrix")["ctx-size"]["value"] == shown(capsys, "eval")["ctx-size"]["value"] == 512
    assert shown(capsys, "demo")["active-experts"]["value"] == N_ACTIVE
    assert shown(capsys, "bench")["n-prompt"]["value"] == [512]


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


def test_values_that_json_or_python_cannot_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: `config --json` that crashes, or prints what no JSON is, for dates, nan and what has no end."""
    write_config(
        "min-p = nan\n[chat]\ntemp = 2020-01-01\ntop-p = inf\ntypical = nan\n"
        "[presets.odd]\ntemp = 2020-01-01\nmin-p = nan\ntop-k = [1, -inf]\n"
    )
    monkeypatch.setenv("DSMOE_TOP_P", "nan")
    load_command("config").main(["--json"], standalone_mode=False)

    def refuse(word: str) -> Any:
        raise AssertionError(word)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["presets"] == {"odd": {"temp": "2020-01-01", "min-p": "nan", "top-k": [1, "-inf"]}}
    table = {each["key"]: each for each in found["options"]}
    for key in ("temp", "typical", "top-p", "min-p"):
        assert table[key]["value"] is None
        assert table[key]["error"]
        assert table[key]["where"]
    # The table shows the same.
    load_command("config").main([], standalone_mode=False)
    assert "this takes a text or a number" in capsys.readouterr().out


@pytest.mark.parametrize(
    "number", ["9" * 5000, "0x" + "f" * 5000, "9223372036854775808", "[[{a=-1" + "0" * 30 + "}]]"]
)
def test_numbers_that_python_cannot_print(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a Python error for a number of thousands of digits."""
    for config in (f"temp = {number}", f"[presets.x]\ntop-k = {number}"):
        write_config(config)
        assert "too large" in complaint(capsys, "config")
        assert "too large" in complaint(capsys, "chat", "-p", "x")


def test_a_presets_other_keys_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: an access token on the screen since it stands in a preset."""
    write_config('[presets.mine]\ntoken = "hf_secret"\ntemp = 1\n')
    for arguments in ([], ["--json"]):
        load_command("config").main(arguments, standalone_mode=False)
        captured = capsys.readouterr()
        assert "secret" not in captured.out + captured.err
        assert "mine" in captured.out
