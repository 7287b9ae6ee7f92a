"""`python -m support.fake_chat`: the chat on a fake engine whose replies halt, until cancelled, at a `#`."""

from __future__ import annotations

import sys
import time

from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.repl import Repl
from dsmoe_local.chat.screen import Screen
from dsmoe_local.chat.settings import ChatSettings
from dsmoe_local.engine.fake import FakeEngine


class HaltingEngine(FakeEngine):
    """Echoes; a `#` in the question halts the reply at that place until Ctrl-C."""

    def __init__(self, *, template: bool) -> None:
        super().__init__(self._answer, template=template, gate=self._halt)
        self._place = -1
        self._halted = False

    def _answer(self, prompt: str) -> str:
        question = prompt.rsplit("\n", 1)[-1].removeprefix("user: ")
        self._place = question.encode().find(b"#")
        return question.replace("#", "")

    def _halt(self, index: int) -> None:
        if index == self._place:
            # No Event: a signal handler that sets what its own thread waits for may wait for ever.
            self._halted = True
            print("[halt]", end="", flush=True)
            while self._halted:
                time.sleep(0.01)

    def cancel(self, request_id: str) -> None:
        super().cancel(request_id)
        self._halted = False


def main() -> None:
    """The chat; `base` as the argument: a model without a template."""
    engine = HaltingEngine(template="base" not in sys.argv)
    Repl(Conversation(engine, ChatSettings()), Screen()).run()


if __name__ == "__main__":
    main()
