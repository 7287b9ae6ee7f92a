"""Count the routed experts that replies use, and show them: live, after each reply, and on request."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.interface import ReloadableEngine
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.experts.activity import Activity, activity_of

if TYPE_CHECKING:
    from dsmoe_local.chat.terminal.screen import Screen

OBSERVERS = (ObserverOptions("routing"),)
REPLY, SESSION = "last reply", "session"
_FETCH_SECONDS = 0.4  # between two fetches of the counts, which take a few milliseconds in both processes


class ExpertsView:
    """Counts the experts that the routers of `engine` choose, while it is switched on.

    `reply` is the activity of the last reply, `total` that of all prompts and replies since `forget`. After a
    crash of the engine, only what it had not reported yet is missing. `clock` returns seconds.
    """

    def __init__(self, engine: ReloadableEngine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.on = False
        self.reply = Activity()
        self.total = Activity()
        self._clock = clock
        self._latest = Activity()
        self._generating = False
        self._fetched = -_FETCH_SECONDS
        self._crashes = 0

    def switch(self, on: bool) -> None:
        """Start or stop observing; counts stay. UsageError for a dense model, EngineError during a reply."""
        if on and not self.engine.info.n_routed_experts:
            raise UsageError("the model is dense: it has no routed experts")
        self.engine.set_observers(OBSERVERS if on else ())
        self.on = on

    def model_changed(self, screen: Screen) -> None:
        """Observe the new model, if the old one was observed and the new one has routed experts."""
        if not self.on:
            return
        try:
            self.switch(True)
        except DsmoeError as error:
            self.on = False
            screen.notice(f"experts are no longer observed: {error.what}")

    def forget(self) -> None:
        """Reset all counts, for another session."""
        self.reply, self.total = Activity(), Activity()

    def reply_begins(self) -> None:
        """Start counting for a new reply. Must be called before its request."""
        if not self.on:
            return
        self.reply = Activity()
        self._crashes = self.engine.crashes
        self._latest = self._fetch() or Activity()
        self._generating = False
        self._fetched = -_FETCH_SECONDS

    def reply_goes_on(self, screen: Screen, *, reading: bool = False) -> None:
        """Update the counts and the live panel from time to time. Must be called after every event.

        `reading`: the event belongs to prefill.
        """
        if not self.on:
            return
        now = self._clock()
        new_phase = reading == self._generating
        if not new_phase and (reading or now - self._fetched < _FETCH_SECONDS):
            return
        self._fetched = now
        self._update()
        if new_phase:
            # Prefill has ended, or begun again because room was made in the context.
            self._generating = not reading
        elif self._generating and not screen.plain:
            from dsmoe_local.experts.panel import live_panel

            screen.live(live_panel(self.reply, screen.width, screen.height))

    def reply_ends(self, screen: Screen) -> None:
        """Show the counts of the reply. Must be called after the last event, or when the reply fails."""
        if not self.on:
            return
        screen.live(None)
        self._update()
        if not self.reply.tokens:
            return
        from dsmoe_local.experts.panel import reply_panel, summary

        if screen.plain:
            screen.notice(f"experts: {summary(self.reply)}")
        else:
            screen.show(reply_panel(self.reply, screen.width, screen.height))

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that were observed."""
        return tuple(layer.layer for layer in self.total.layers)

    def show(self, screen: Screen, *which: str) -> None:
        """Show heatmaps of REPLY, SESSION or both, and the layers of the first. UsageError without counts."""
        from dsmoe_local.experts.panel import panels, summary
        from dsmoe_local.experts.tables import layer_rows, layer_table

        parts = {name: activity for name, activity in self._activities().items() if name in which}
        if not parts:
            raise UsageError(
                "the last reply was not observed, or too short", remedy="/experts session shows all replies"
            )
        if screen.plain:
            for name, activity in parts.items():
                screen.notice(f"{name}: {summary(activity)}")
                screen.table(layer_rows(activity))
            return
        screen.show(panels(parts, screen.width))
        screen.show(layer_table(next(iter(parts.values())), screen.width))

    def show_layer(self, screen: Screen, number: int) -> None:
        """Show the most used experts of a layer. UsageError without such a layer, or without counts."""
        from dsmoe_local.experts.tables import expert_rows, expert_table

        parts = {
            name: layer
            for name, activity in self._activities().items()
            for layer in activity.layers
            if layer.layer == number
        }
        if not parts:
            first, last = self.layers[0], self.layers[-1]
            raise UsageError(
                f"layer {number} has no routed experts", remedy=f"layers {first} to {last} have them"
            )
        if screen.plain:
            screen.table(expert_rows(parts))
        else:
            screen.show(expert_table(parts, screen.width))

    def export(self, path: Path) -> None:
        """Write the last reply and the session to `path`, as an SVG picture or as numbers (.json).

        UsageError for another file name extension or without counts, FileError if it cannot be written.
        """
        from dsmoe_local.experts.picture import write_picture

        write_picture(path, self.engine.info.name, self._activities())

    def _activities(self) -> dict[str, Activity]:
        """Return the counts of the last reply and the session, if not empty. UsageError if both are."""
        found = {REPLY: self.reply, SESSION: self.total}
        if not self.total.tokens:
            remedy = "send a message" if self.on else "/experts observes them from the next reply on"
            raise UsageError("no experts were observed yet", remedy=remedy)
        return {name: activity for name, activity in found.items() if activity.tokens}

    def _update(self) -> None:
        """Fetch the counts, and add what is new to the totals."""
        now = self._fetch()
        if now is None:
            return
        # A new process counts from 0.
        restarted = self.engine.crashes != self._crashes or not now.follows(self._latest)
        since = now if restarted else now - self._latest
        self._crashes, self._latest = self.engine.crashes, now
        self.total += since
        if self._generating:
            self.reply += since

    def _fetch(self) -> Activity | None:
        try:
            return activity_of(self.engine.observe("routing"))
        except EngineError:
            return None
