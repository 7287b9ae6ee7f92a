"""The chat's view of the experts, and the commands about them: what is counted for what, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from support.checkpoints import TINY
from support.fake_engine import FakeEngine
from support.models import tiny_model
from support.routed import ShowingScreen, Token, observation, tokens

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started
from dsmoe_local.chat.commands.declare import Chat
from dsmoe_local.chat.commands.experts import COMMANDS
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.experts_view import OBSERVERS, REPLY, SESSION, ExpertsView
from dsmoe_local.chat.settings import ChatSettings
from dsmoe_local.chat.terminal.screen import Screen
from dsmoe_local.engine.errors import EngineCrashError, EngineError
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Observation, Request, SamplingParameters
from dsmoe_local.experts.cost import active_cost

ALL = tokens(200)


class Routed(FakeEngine):
    """Has seen `seen`; `dead` dies when it is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Token] = []
        self.looks = 0
        self.dead = False
        self.said_before_reload: list[str] = []
        self.screen = ShowingScreen()
        self.options = ModelOptions(tiny_model())
        self.info = replace(
            self.info,
            n_routed_experts=TINY.n_routed_experts,
            n_choosable_experts=TINY.n_choosable_experts,
            n_experts_per_token=TINY.n_experts_per_token,
        )

    def observe(self, name: str) -> Observation:
        self.looks += 1
        if self.dead:
            raise EngineCrashError("the engine died")
        self.observations["routing"] = observation(self.seen)
        return super().observe(name)

    def reload(
        self, options: ModelOptions, listen: Listener = lambda event: None, stop: object = None
    ) -> None:
        self.said_before_reload = list(self.screen.notices)
        listen(Note("paged from the file"))
        super().reload(options, listen)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Stage:
    """A view, what it looks at and where it shows it; `run` is one command."""

    def __init__(self) -> None:
        self.engine = Routed()
        self.screen = self.engine.screen
        self.clock = Clock()
        self.view = ExpertsView(self.engine, self.clock)
        self.experts = self.view
        self.conversation = Conversation(self.engine, ChatSettings())

    @property
    def as_screen(self) -> Screen:
        return cast(Screen, self.screen)

    def see(self, n: int) -> None:
        """The engine works on so many further tokens."""
        start = len(self.engine.seen)
        self.engine.seen += ALL[start : start + n]

    def exchange(
        self, n_read: int, n_written: int, during: Callable[[int], None] = lambda index: None
    ) -> None:
        """A message and its reply."""
        self.view.reply_begins()
        self.see(n_read)
        for index in range(n_written):
            self.view.reply_goes_on(self.as_screen)
            self.see(1)
            self.clock.now += 1
            during(index)
        self.view.reply_ends(self.as_screen)

    def run(self, line: str) -> None:
        name, _, argument = line.removeprefix("/").partition(" ")
        COMMANDS[name].run(cast(Chat, self), argument)

    def complete(self, name: str, typed: str) -> list[str]:
        return list(COMMANDS[name].complete(cast(Chat, self), typed))


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def watching(stage: Stage) -> Stage:
    stage.view.switch(True)
    return stage


def test_a_reply_is_what_was_written_and_a_session_all(watching: Stage) -> None:
    """Guards: a long prompt that hides the reply, and counts of former replies in the next."""
    watching.see(9)
    watching.exchange(20, 5)
    assert (watching.view.reply.tokens, watching.view.total.tokens) == (5, 25)
    watching.exchange(30, 7)
    assert (watching.view.reply.tokens, watching.view.total.tokens) == (7, 62)
    expected = observation(ALL[9:71])["layers"]
    for found, layer in zip(watching.view.total.layers, expected, strict=True):
        assert list(found.counts) == layer["counts"]


def test_reading_is_no_writing(watching: Stage) -> None:
    """Guards: a reply that begins with the first part of a long prompt."""
    watching.view.reply_begins()
    for _ in range(3):
        watching.see(10)
        watching.clock.now += 1
        watching.view.reply_goes_on(watching.as_screen, reading=True)
    assert watching.screen.lives == []
    watching.view.reply_goes_on(watching.as_screen)
    watching.see(4)
    watching.view.reply_ends(watching.as_screen)
    assert watching.view.reply.tokens == 4


def test_what_is_read_again_is_not_written(watching: Stage) -> None:
    """Guards: a conversation that makes room, and is read again, in the middle of a reply."""
    watching.exchange(10, 4, during=lambda index: read_again(watching) if index == 1 else None)
    assert (watching.view.reply.tokens, watching.view.total.tokens) == (4, 34)


def read_again(stage: Stage) -> None:
    stage.view.reply_goes_on(stage.as_screen, reading=True)
    stage.see(20)


def test_it_looks_few_times_a_second(watching: Stage) -> None:
    """Guards: a look with every token, which costs more than the token."""
    watching.view.reply_begins()
    for _ in range(1000):
        watching.see(0)
        watching.clock.now += 0.01
        watching.view.reply_goes_on(watching.as_screen)
    watching.view.reply_ends(watching.as_screen)
    assert 20 <= watching.engine.looks <= 30


def test_off_costs_nothing(stage: Stage) -> None:
    """Guards: looks, or an observer, that stay after /experts off."""
    stage.exchange(5, 5)
    assert (stage.engine.looks, stage.engine.observers, stage.screen.lives) == (0, [], [])
    stage.run("/experts")
    assert stage.engine.observers == [OBSERVERS]
    stage.run("/experts off")
    assert stage.engine.observers == [OBSERVERS, ()]
    stage.exchange(5, 5)
    assert (stage.engine.looks, stage.screen.lives, stage.screen.shown) == (0, [], [])


def test_the_live_panel_goes_away_in_every_case(watching: Stage) -> None:
    """Guards: a panel that stays below the prompt after a crash, or a reply of nothing."""
    watching.exchange(5, 3)
    assert watching.screen.lives[-1] is None
    assert watching.screen.lives[-2] is not None
    assert "2 tokens" in watching.screen.lives[-2]

    def die(index: int) -> None:
        watching.engine.dead = index >= 1

    watching.exchange(5, 3, during=die)
    assert watching.screen.lives[-1] is None
    watching.view.reply_begins()
    watching.view.reply_ends(watching.as_screen)
    assert watching.screen.lives[-1] is None
    assert len(watching.screen.shown) == 2


def test_counts_survive_a_crash(watching: Stage) -> None:
    """Guards: negative counts, or none at all, once another process began at 0."""
    watching.exchange(10, 4)

    def die(index: int) -> None:
        watching.engine.dead = index == 2

    watching.exchange(10, 3, during=die)
    # The dead process did not tell of its last token.
    assert (watching.view.reply.tokens, watching.view.total.tokens) == (2, 14 + 12)
    watching.engine.dead, watching.engine.seen = False, []
    watching.engine.crashes += 1
    watching.exchange(10, 6)
    assert (watching.view.reply.tokens, watching.view.total.tokens) == (6, 14 + 12 + 16)


def test_a_new_process_that_saw_more_is_a_new_process(watching: Stage) -> None:
    """Guards: what another process counted taken as the difference to the old one, because it is more."""
    watching.view.reply_begins()
    watching.see(5)
    watching.view.reply_goes_on(watching.as_screen)
    watching.engine.crashes += 1
    watching.see(7)
    watching.view.reply_ends(watching.as_screen)
    assert watching.view.reply.tokens == 12
    assert watching.view.total.tokens == 5 + 12


def test_a_dense_model_says_so(stage: Stage) -> None:
    """Guards: an observer's error about a model that has nothing to observe."""
    stage.engine.info = replace(stage.engine.info, n_routed_experts=0)
    for line in ("/experts", "/active", "/active 3"):
        with pytest.raises(UsageError, match="dense"):
            stage.run(line)
    assert (stage.engine.observers, stage.view.on) == ([], False)


def test_a_refusal_changes_nothing(stage: Stage) -> None:
    """Guards: a view that believes it watches, and then complains with every reply."""
    stage.engine.failures.append(EngineError("requests run"))
    with pytest.raises(EngineError):
        stage.run("/experts")
    assert not stage.view.on
    stage.exchange(3, 3)
    assert stage.engine.looks == 0


def test_commands_show_what_they_say(watching: Stage) -> None:
    """Guards: a word of the help that shows something else, or nothing."""
    watching.exchange(10, 5)
    watching.screen.shown.clear()
    watching.run("/experts")
    pictures, table = watching.screen.shown
    assert REPLY in pictures
    assert SESSION in pictures
    assert "busiest" in table
    for word, there, absent in (("reply", REPLY, SESSION), ("session", SESSION, REPLY)):
        watching.run(f"/experts {word}")
        assert there in watching.screen.shown[-2]
        assert absent not in watching.screen.shown[-2]
    watching.run("/experts layer 2")
    busiest = watching.view.reply.layers[1].busiest(1)[0]
    assert f"{busiest[1]:.0%}" in watching.screen.shown[-1].splitlines()[3]
    watching.run("/experts off")
    watching.run("/experts session")
    assert SESSION in watching.screen.shown[-2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/experts everything", "does not take"),
        ("/experts layer", "takes the number of a layer"),
        ("/experts layer -1", "takes the number of a layer"),
        ("/experts layer ²", "takes the number of a layer"),
        ("/experts layer 4", "layers 1 to 3 have"),
    ],
)
def test_mistakes_are_explained(watching: Stage, line: str, message: str) -> None:
    """Guards: tracebacks, and a refusal that does not say what would do."""
    watching.exchange(2, 2)
    with pytest.raises(UsageError) as caught:
        watching.run(line)
    assert message in str(caught.value)


def test_nothing_seen_yet_is_no_empty_picture(stage: Stage, tmp_path: Path) -> None:
    """Guards: a division by zero, and a file without content."""
    actions: list[Callable[[], None]] = [
        lambda: stage.run("/experts reply"),
        lambda: stage.run("/experts layer 1"),
        lambda: stage.view.export(tmp_path / "experts.svg"),
    ]
    for action in actions:
        with pytest.raises(UsageError, match="no experts were observed yet"):
            action()
    assert list(tmp_path.iterdir()) == []


def test_a_reply_of_one_token_is_nothing_to_show(watching: Stage) -> None:
    """Guards: a KeyError, since of the last token of a reply nothing is ever computed."""
    watching.exchange(10, 5)
    watching.exchange(10, 0)
    watching.run("/experts")
    assert REPLY not in watching.screen.shown[-2]
    with pytest.raises(UsageError, match="too short"):
        watching.run("/experts reply")


def test_a_plain_terminal_gets_lines(watching: Stage) -> None:
    """Guards: a screen reader that reads a picture aloud."""
    watching.screen.plain = True
    watching.exchange(10, 5)
    watching.run("/experts")
    watching.run("/experts layer 1")
    assert [live for live in watching.screen.lives if live] == []
    assert watching.screen.shown == []
    assert any("5 tokens" in notice for notice in watching.screen.notices)
    layers, _, experts = watching.screen.tables
    assert [row[0] for row in layers] == ["layer", "1", "2", "3"]
    assert experts[0] == ("expert", REPLY, SESSION)


def test_the_export_has_both(watching: Stage, tmp_path: Path) -> None:
    """Guards: a picture of something else than what /experts shows."""
    watching.exchange(10, 5)
    watching.view.export(tmp_path / "experts.json")
    found = json.loads((tmp_path / "experts.json").read_text())
    assert {name: part["tokens"] for name, part in found["parts"].items()} == {REPLY: 5, SESSION: 15}
    watching.view.export(tmp_path / "experts.svg")
    assert "fake" in (tmp_path / "experts.svg").read_text()


def test_another_session_begins_at_nothing(watching: Stage) -> None:
    """Guards: experts of a conversation that was left."""
    watching.exchange(10, 5)
    watching.view.forget()
    watching.exchange(3, 2)
    assert watching.view.total.tokens == 5


def test_active_says_what_it_costs_before_it_does_it(watching: Stage) -> None:
    """Guards: a model loaded again without a word, or with the observers lost."""
    watching.run("/active 2")
    (options,) = watching.engine.reloads
    assert (options.n_experts_per_token, options.observers) == (2, OBSERVERS)
    assert options.path == tiny_model()
    said = " ".join(watching.engine.said_before_reload)
    assert "with 2 instead of 3 experts" in said
    assert "% less" in said
    assert "trained with 3" in said
    assert "reloaded" in said
    assert "read again" in said
    assert "2 of 8" in watching.screen.notices[-1]
    assert "note: paged from the file" in watching.screen.notices
    assert "loading fake.gguf: 100%" in watching.screen.lives
    assert watching.screen.lives[-1] is None


def test_active_default_goes_back(stage: Stage) -> None:
    """Guards: a number that is the model's own kept as if it were asked for."""
    stage.engine.info = replace(stage.engine.info, n_experts_per_token=5)
    stage.run("/active default")
    stage.engine.info = replace(stage.engine.info, n_experts_per_token=5)
    stage.run("/active 3")
    assert [options.n_experts_per_token for options in stage.engine.reloads] == [None, None]
    assert not any("worse" in notice for notice in stage.screen.notices)


@pytest.mark.parametrize("argument", ["0", "9", "-1", "two", "²", "1 2", "1e3"])
def test_active_refuses_what_the_model_has_not(stage: Stage, argument: str) -> None:
    """Guards: an abort of llama.cpp over a number."""
    with pytest.raises(UsageError, match="out of range") as caught:
        stage.run(f"/active {argument}")
    assert "1 to 8" in str(caught.value)
    assert stage.engine.reloads == []


def test_active_in_groups(stage: Stage) -> None:
    """Guards: experts of groups that the router did not choose."""
    stage.engine.info = replace(stage.engine.info, n_choosable_experts=4)
    with pytest.raises(UsageError, match="out of range\nuse 1 to 4"):
        stage.run("/active 5")
    stage.run("/active")
    assert [row[0] for row in stage.screen.tables[0][1:]] == ["1 of 8", "3 of 8", "4 of 8"]
    assert stage.complete("active", "") == ["default", "1", "2", "3", "4"]


def test_active_that_changes_nothing_loads_nothing(stage: Stage) -> None:
    """Guards: a conversation that is read again for nothing."""
    stage.run("/active 3")
    stage.run("/active")
    assert stage.engine.reloads == []
    (rows,) = stage.screen.tables
    assert [row[0] for row in rows[1:]] == ["1 of 8", "3 of 8", "6 of 8", "8 of 8"]
    assert [row[3] for row in rows[1:]] == ["", "now", "", ""]
    costs = [active_cost(tiny_model(), number).n_bytes for number in (1, 3, 6, 8)]
    assert costs == sorted(costs)


def test_a_load_that_fails_leaves_no_panel(stage: Stage) -> None:
    """Guards: a percentage below the prompt for ever, and an error that is swallowed."""
    stage.engine.failures.append(EngineError("no room"))
    with pytest.raises(EngineError):
        stage.run("/active 8")
    assert stage.screen.lives[-1] is None


def test_progress_is_drawn_once_a_percent(stage: Stage) -> None:
    """Guards: a terminal that is drawn anew for each of a million tensors' pieces."""

    def reload(options: ModelOptions, listen: Listener, stop: object = None) -> None:
        listen(Started("loading\x1b[2J", 100_000))
        for _ in range(100_000):
            listen(Advanced(1))
        listen(Finished("loading"))

    stage.engine.reload = reload  # type: ignore[method-assign, assignment]
    stage.run("/active 8")
    assert len(stage.screen.lives) == 102
    assert not any("\x1b[2J" in (live or "") for live in stage.screen.lives)


def test_words_are_completed(watching: Stage) -> None:
    """Guards: a completion that offers what the command refuses."""
    watching.exchange(2, 2)
    for word in watching.complete("experts", ""):
        if word != "layer":
            watching.run(f"/experts {word}")
    assert watching.complete("experts", "layer ") == ["1", "2", "3"]
    assert watching.complete("experts", "reply ") == []
    assert watching.complete("active", "") == ["default", *map(str, range(1, 9))]
    for word in watching.complete("active", ""):
        watching.run(f"/active {word}")


@pytest.fixture(scope="module")
def client() -> Iterator[EngineClient]:
    with EngineClient.load(ModelOptions(tiny_model(), n_threads=1, n_context=128)) as client:
        yield client


def test_a_real_engine_counts_every_token_once(client: EngineClient) -> None:
    """Guards: observers that the child does not get, miss the last step, or stay when switched off."""
    view, screen = ExpertsView(client), cast(Screen, ShowingScreen())
    view.switch(True)
    n_read = n_written = 0
    for number in range(3):
        view.reply_begins()
        request = Request(str(number), f"The quick {number}", SamplingParameters(temperature=0), max_tokens=9)
        for event in client.submit(request):
            view.reply_goes_on(screen, reading=event.progress is not None)
            if event.usage is not None:
                n_read += event.usage.prompt_tokens - event.usage.cached_tokens
                n_written += event.usage.completion_tokens - 1
        view.reply_ends(screen)
    first = view.total.layers[0]
    assert first.tokens == n_read + n_written
    assert sum(first.counts) == first.tokens * TINY.n_experts_per_token
    view.switch(False)
    with pytest.raises(DsmoeError, match="no observer"):
        client.observe("routing")
