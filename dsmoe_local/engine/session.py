"""A loaded model with what belongs to it: made by `load`, worked with by `core`. Decides nothing."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from dsmoe_local.engine import native
from dsmoe_local.engine.observe.dispatcher import Dispatcher
from dsmoe_local.engine.prompts.encoder import PromptEncoder
from dsmoe_local.engine.schedule.plan import Limits
from dsmoe_local.engine.types import ModelInfo


@dataclass(slots=True)
class Session:
    """Owned by the engine's thread, but for `info`, `encoder`, `log` and the model's vocabulary, which any
    thread may use. Only `context` and `observers` are ever replaced.
    """

    info: ModelInfo
    model: native.Model
    context: native.Context
    encoder: PromptEncoder
    observers: Dispatcher
    limits: Limits

    def log(self) -> tuple[str, ...]:
        """llama.cpp's latest log lines."""
        return native.log_lines()

    def close(self) -> None:
        """Free everything native, and let observers end their files, whatever one of them raises."""
        with ExitStack() as last_to_first:
            for part in (self.model, self.observers, self.context, self.encoder):
                last_to_first.callback(part.close)
