"""What the chat shows of the routed experts: live beside a reply, the picture behind it, sums of the session.

The numbers are `experts.activity`'s, the drawing is `experts.panel`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.experts.activity import Activity, activity_of

if TYPE_CHECKING:
    from dsmoe_local.chat.terminal.screen import Screen

OBSERVERS = (ObserverOptions("routing"),)
REPLY, SESSION = "last reply", "session"
_LOOK_EVERY = 0.4  # seconds; a look takes some milliseconds of both processes


class ExpertsView:
    """Watches the routers of `engine` while replies run, once switched on.

    `reply` is what happened in the last reply, `session` in all since `forget` or the beginning, prompts
    included, as far as it was watched. Counts survive a crash of the engine: only what the dead one had not
    told is missing. `clock` counts seconds.
    """

    def __init__(self, engine: TextEngine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.on = False
        self.reply = Activity()
        self.session = Activity()
        self._clock = clock
        self._latest = Activity()
        self._writing = False
        self._looked = -_LOOK_EVERY
        self._crashes = 0

    def switch(self, on: bool) -> None:
        """Watch, or no longer; what was seen stays. UsageError for a dense model, EngineError while a reply
        runs.
        """
        if on and not self.engine.info.n_routed_experts:
            raise UsageError("the model is dense: it has no experts to look at")
        self.engine.set_observers(OBSERVERS if on else ())
        self.on = on

    def forget(self) -> None:
        """Begin anew, as for another session."""
        self.reply, self.session = Activity(), Activity()

    def reply_begins(self) -> None:
        """Call before the request is made."""
        if not self.on:
            return
        self.reply = Activity()
        self._crashes = self._n_crashes()
        self._latest = self._look() or Activity()
        self._writing = False
        self._looked = -_LOOK_EVERY

    def reply_goes_on(self, screen: Screen, *, reading: bool = False) -> None:
        """Call with every event; draws now and then. `reading`: the prompt is still, or again, being read."""
        if not self.on:
            return
        now = self._clock()
        turned = reading == self._writing
        if not turned and (reading or now - self._looked < _LOOK_EVERY):
            return
        self._looked = now
        self._take()
        if turned:
            # What came until here was the prompt's, what comes now is the reply's; or the other way round.
            self._writing = not reading
        elif self._writing and not screen.plain:
            from dsmoe_local.experts.panel import live_panel

            screen.live(live_panel(self.reply, screen.width, screen.height))

    def reply_ends(self, screen: Screen) -> None:
        """Call when no more events come, for whatever reason."""
        if not self.on:
            return
        screen.live(None)
        self._take()
        if not self.reply.tokens:
            return
        from dsmoe_local.experts.panel import reply_panel, summary

        if screen.plain:
            screen.notice(f"experts: {summary(self.reply)}")
        else:
            screen.show(reply_panel(self.reply, screen.width, screen.height))

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that were seen."""
        return tuple(layer.layer for layer in self.session.layers)

    def show(self, screen: Screen, *which: str) -> None:
        """REPLY, SESSION or both: the pictures, and the first one's layers. UsageError if there is none."""
        from dsmoe_local.experts.panel import panels, summary
        from dsmoe_local.experts.tables import layer_rows, layer_table

        parts = {name: activity for name, activity in self._seen().items() if name in which}
        if not parts:
            raise UsageError(
                "the last reply was not watched, or too short", remedy="/experts session shows all"
            )
        if screen.plain:
            for name, activity in parts.items():
                screen.notice(f"{name}: {summary(activity)}")
                screen.table(layer_rows(activity))
            return
        screen.show(panels(parts, screen.width))
        screen.show(layer_table(next(iter(parts.values())), screen.width))

    def show_layer(self, screen: Screen, number: int) -> None:
        """One layer's busiest experts. UsageError if there is no such layer, or nothing was seen."""
        from dsmoe_local.experts.tables import expert_rows, expert_table

        parts = {
            name: layer
            for name, activity in self._seen().items()
            for layer in activity.layers
            if layer.layer == number
        }
        if not parts:
            first, last = self.layers[0], self.layers[-1]
            raise UsageError(f"layer {number} has no routed experts", remedy=f"layers {first} to {last} have")
        if screen.plain:
            screen.table(expert_rows(parts))
        else:
            screen.show(expert_table(parts, screen.width))

    def export(self, path: Path) -> None:
        """Write the picture, or for `.json` the numbers, of the last reply and the session over `path`.

        UsageError for another ending or where nothing was seen, FileError as the disk says.
        """
        from dsmoe_local.experts.picture import write_picture

        write_picture(path, self.engine.info.name, self._seen())

    def _seen(self) -> dict[str, Activity]:
        found = {REPLY: self.reply, SESSION: self.session}
        if not self.session.tokens:
            remedy = "send a message" if self.on else "/experts watches from the next reply on"
            raise UsageError("no experts were seen yet", remedy=remedy)
        return {name: activity for name, activity in found.items() if activity.tokens}

    def _take(self) -> None:
        """Look, and count what came since."""
        now = self._look()
        if now is None:
            return
        # Another process began to count at 0.
        anew = self._n_crashes() != self._crashes or not now.follows(self._latest)
        since = now if anew else now - self._latest
        self._crashes, self._latest = self._n_crashes(), now
        self.session += since
        if self._writing:
            self.reply += since

    def _look(self) -> Activity | None:
        try:
            return activity_of(self.engine.observe("routing"))
        except EngineError:
            return None

    def _n_crashes(self) -> int:
        return getattr(self.engine, "crashes", 0)
