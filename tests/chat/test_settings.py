"""/set: names, values, presets and what is kept; the round trip through the config file is tests/cli's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_engine import FakeEngine

from dsmoe_local.base.config_file import ConfigFile
from dsmoe_local.base.errors import FormatError, UsageError
from dsmoe_local.chat.commands.declare import Chat
from dsmoe_local.chat.commands.settings import COMMANDS
from dsmoe_local.chat.settings import (
    SETTINGS,
    ChatSettings,
    OnFull,
    apply,
    as_value,
    change,
    get_setting,
    in_words,
    setting_name,
)
from dsmoe_local.engine.types import SamplingParameters


class Recorder:
    """A chat as far as /set sees it; `said` is what its screen was told."""

    def __init__(self, path: Path) -> None:
        self.conversation = self
        self.engine = FakeEngine()
        self.screen = self
        self.settings = ChatSettings()
        self.config = ConfigFile(path)
        self.said: list[str] = []
        self.n_saves = 0

    def notice(self, text: str) -> None:
        self.said.append(text)

    def save(self) -> None:
        self.n_saves += 1

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        self.said += ["  ".join(row) for row in rows]

    def set(self, argument: str = "") -> str:
        """Run the command; what it said last."""
        COMMANDS["set"].run(cast(Chat, self), argument)
        return self.said[-1]

    def complete(self, typed: str) -> list[str]:
        """What the last word could become."""
        return list(COMMANDS["set"].complete(cast(Chat, self), typed))


@pytest.fixture
def chat(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / "config.toml")


def test_every_sampling_parameter_can_be_set() -> None:
    """Guards: a parameter of the engine that /set does not know, or a default that cannot be said."""
    assert set(SamplingParameters.__dataclass_fields__) <= set(SETTINGS)
    for name in SETTINGS:
        default = ChatSettings()
        assert change(default, name, in_words(default, name)) == default
        assert apply(default, {SETTINGS[name].key: as_value(default, name)}) == default


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("temp", "temperature"),
        ("--top-k", None),
        ("Top-K", "top_k"),
        ("n", "max_tokens"),
        ("predict", "max_tokens"),
        ("typical", "typical_p"),
        ("mirostat-lr", "mirostat_eta"),
        ("reverse-prompt", "stop"),
        ("on-full", "on_full"),
        ("n-predict", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("temperature", "temperature"),
    ],
)
def test_names(word: str, name: str | None) -> None:
    """Guards the names and short forms people know from flags."""
    if name is None:
        with pytest.raises(UsageError, match="no setting"):
            setting_name(word)
    else:
        assert setting_name(word) == name


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("temperature hot", "cannot be 'hot'"),
        ("temperature nan", "out of range"),
        ("temperature 1e999", "out of range"),
        ("top_p 1.5", "out of range"),
        ("top_k 2.5", "cannot be"),
        ("top_k " + "9" * 5000, "cannot be"),
        ("seed -2", "out of range"),
        ("n 0", "out of range"),
        ("stop \\x", "cannot be"),
        ("stop \\ud800", "cannot be"),
        ('stop ["\\ud800"]', "cannot be"),
        ('stop ["a", ""]', "empty"),
        ("on_full explode", "cannot be"),
        ("mirostat 3", "out of range"),
        ("tempature 1", "no setting"),
        ("use nothing", "no preset"),
        ("save ../x", "cannot be the name"),
        ("save two words", "cannot be the name"),
    ],
)
def test_mistakes_change_nothing(argument: str, words: str, chat: Recorder) -> None:
    """Guards: a value out of range that is taken, or a Python error that is not ours."""
    with pytest.raises(UsageError, match=words):
        chat.set(argument)
    assert chat.settings == ChatSettings()
    assert not chat.config.path.exists()


def test_setting_and_showing(chat: Recorder) -> None:
    """Guards what /set says: values in the form that it reads, defaults beside what differs."""
    assert chat.set("temp 0.2") == "temperature 0.2"
    assert chat.set("stop \\n###").startswith('stop ["\\n###"]')
    assert chat.set('stop ["a b", "日本"]') == 'stop ["a b", "日本"]'
    assert chat.settings.stop == ("a b", "日本")
    assert chat.set("on_full Shift") == "on_full shift"
    assert chat.settings.on_full is OnFull.SHIFT
    assert chat.set("seed").startswith("seed none: ")
    chat.said.clear()
    chat.set()
    assert len(chat.said) == len(SETTINGS)
    assert chat.said[0].startswith("temperature  0.2 (default 0.8)  ")
    chat.set("reset temp")
    assert chat.settings.sampling.temperature == 0.8
    assert chat.settings.on_full is OnFull.SHIFT
    chat.set("reset")
    assert chat.settings == ChatSettings()


@given(st.text(max_size=20), st.sampled_from(list(SETTINGS)))
def test_any_text_is_read_or_refused(text: str, name: str) -> None:
    """Guards: an input that raises something else than a UsageError; words that are not safe to print."""
    try:
        settings = change(ChatSettings(), name, text)
    except UsageError:
        return
    words = in_words(settings, name)
    assert "\x1b" not in words
    assert "\n" not in words
    if name != "stop" or words != "none":
        # Also a stop text, all of it: it may be longer than a line, or not fit to be printed.
        assert get_setting(change(ChatSettings(), name, words), name) == get_setting(settings, name)


def test_stop_texts_are_shown_as_they_are_read() -> None:
    """Guards: words that are cut, or show a picture of a control character, and are read as other texts."""
    texts = ("\x1b[31m\x7f\x9b\u202e\u2028", "x" * 500, '"\\', "日本 🚀")
    settings = apply(ChatSettings(), {"reverse-prompt": list(texts)})
    words = in_words(settings, "stop")
    assert words.startswith('["\\u001b[31m\\u007f\\u009b\\u202e\\u2028", "xxx')
    assert words.endswith('"日本 🚀"]')
    assert change(ChatSettings(), "stop", words) == settings


def test_backslashes_in_stop_texts() -> None:
    """Guards: Python's warning about escapes that it does not know, in the middle of a chat."""
    read = {
        "\\n": "\n", "\\8": "\\8", "\\d+\\": "\\d+\\", "\\101": "A", "\\777": "?7", "\\N{BULLET}": "•",
        "é\\x41": "éA",
        "\\\\n": "\\n",
    }  # fmt: skip
    for text, meant in read.items():
        assert change(ChatSettings(), "stop", text).stop == (meant,)


def test_save_keeps_what_was_set_in_the_chat(chat: Recorder) -> None:
    """Guards: flags of one run (`-n 30 -s 1`) kept for all later ones; the user's own words lost."""
    flags = replace(ChatSettings(), max_tokens=30, sampling=SamplingParameters(seed=1))
    chat.settings = flags
    with pytest.raises(UsageError, match="nothing was set"):
        chat.set("save")
    with pytest.raises(UsageError, match="nothing was set"):
        chat.set("save calm")
    assert not chat.config.path.exists()
    chat.config.path.write_text("# mine\ntop-p = 0.5\n[chat]\nsystem = 'x'\nmin-p = 0.3\n")
    chat.set("temp 0.2")
    assert "temperature 0.2: " in chat.set("save")
    assert chat.config.values() == {"top-p": 0.5, "chat": {"system": "x", "min-p": 0.3, "temp": 0.2}}
    assert chat.config.path.read_text().startswith("# mine\n")
    chat.set("save calm")
    assert chat.config.values()["presets"] == {"calm": {"temp": 0.2}}


def test_save_takes_defaults_back(chat: Recorder) -> None:
    """Guards: a default written down, which then does not follow a new version's; one that the file's top
    level or another spelling of the key overrides.
    """
    chat.config.path.write_text("top-p = 0.5\n[chat]\ntemperature = 0.2\nmax_tokens = 5\npredict = 6\n")
    for setting in ("temp 0.8", "top_p 0.95", "n none"):
        chat.set(setting)
    chat.set("save")
    assert chat.config.values() == {"top-p": 0.5, "chat": {"top-p": 0.95}}
    chat.set("top_k 3")
    chat.set("reset")
    chat.set("save")
    assert chat.config.values() == {"top-p": 0.5, "chat": {"top-p": 0.95}}
    chat.set("reset temp")
    chat.set("save calm")
    assert chat.config.values()["presets"] == {"calm": {"top-p": 0.95}}
    chat.config.path.unlink()
    with pytest.raises(UsageError, match="all settings are the defaults"):
        chat.set("save calm")


def test_presets(chat: Recorder) -> None:
    """Guards: a preset that holds what was not set, which then outweighs the rest of the file."""
    chat.set("use")
    assert "no presets" in chat.said[-1]
    chat.set("top_k 3")
    chat.set("n 50")
    assert "saved" in chat.set("save calm")
    assert "replaced" in chat.set("save calm")
    chat.set("reset")
    chat.set("temp 1.5")
    chat.set("use calm")
    assert chat.settings.sampling.temperature == 1.5
    assert chat.settings.sampling.top_k == 3
    assert chat.settings.max_tokens == 50
    chat.config.set(("presets", "hand"), {"temp": 1, "reverse-prompt": "\\n"})
    assert chat.set("use hand") == 'hand: temperature 1, stop ["\\\\n"]'
    assert chat.set("use hand") == "hand: nothing changed"
    assert chat.settings.sampling.top_k == 3
    assert chat.settings.stop == ("\\n",)
    with pytest.raises(UsageError) as caught:
        chat.set("use clam")
    assert "calm" in caught.value.remedy


def test_what_is_no_setting_in_a_preset(chat: Recorder) -> None:
    """Guards: a preset of which /set use and --preset take different parts."""
    chat.config.set(("presets", "odd"), {"temperature": 2, "temp": 0.1, "ctx-size": 7, "max_tokens": 5})
    assert chat.set("use odd") == "odd: temperature 0.1, max_tokens 5"
    assert chat.said[-2] == "[presets.odd] has unknown settings: temperature, ctx-size"


def test_a_preset_that_is_wrong_says_where_it_stands(chat: Recorder) -> None:
    """Guards: half a preset in force, and no place named."""
    chat.config.set(("presets", "bad"), {"temp": 0.1, "top-k": True})
    with pytest.raises(UsageError) as caught:
        chat.set("use bad")
    assert caught.value.where == f"{chat.config.path}: [presets.bad]"
    assert chat.settings == ChatSettings()
    chat.config.path.write_text("no TOML")
    with pytest.raises(FormatError):
        chat.set("use bad")


def test_completion(chat: Recorder) -> None:
    """Guards completion of names, values and presets, also while the file is broken."""
    assert chat.complete("te") == ["temperature"]
    assert {"save", "use", "reset", "on_full"} <= set(chat.complete(""))
    assert chat.complete("on_full s") == ["stop", "shift"]
    assert chat.complete("on-full c") == ["compact"]
    assert chat.complete("mirostat ") == ["0", "1", "2"]
    assert chat.complete("temperature 1 ") == []
    assert chat.complete("nonsense ") == []
    assert chat.complete("reset top") == ["top_k", "top_p"]
    chat.config.set(("presets", "calm"), {"temp": 0.1})
    assert chat.complete("use c") == ["calm"]
    chat.config.path.write_text("no TOML")
    assert chat.complete("use c") == []
