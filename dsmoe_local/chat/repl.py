"""The interactive chat: reads with prompt-toolkit, asks the conversation, has the screen print the reply."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.styles import Style

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.paths import data_folder
from dsmoe_local.chat.commands import table as commands
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.screen import Screen, describe_usage, keys_withheld
from dsmoe_local.engine.types import TokenEvent

_BLOCK = '"""'


class Repl:
    """One chat on one terminal."""

    def __init__(
        self, conversation: Conversation, screen: Screen, *, history: bool = True, stats: bool = False
    ) -> None:
        self.conversation = conversation
        self.screen = screen
        self.finished = False
        self._stats = stats
        self._read = _read_plainly if screen.console.is_dumb_terminal else self._prompt(history)

    def _prompt(self, history: bool) -> Callable[[], str]:
        session: PromptSession[str] = PromptSession(
            FormattedText([("bold ansicyan", "> ")]),
            history=_open_history() if history else InMemoryHistory(),
            multiline=True,
            key_bindings=_keys(),
            completer=_CommandCompleter(),
            complete_while_typing=False,
            enable_open_in_editor=True,
            prompt_continuation="  ",
            bottom_toolbar=self._meter,
            style=Style.from_dict({"bottom-toolbar": "noreverse ansibrightblack"}),
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
        )
        return session.prompt

    def run(self) -> None:
        """Read and answer until the user leaves."""
        self._greet()
        # Outside the prompt Ctrl-C only ever ends a reply, and keys wait for the prompt.
        withheld = nullcontext() if self.screen.console.is_dumb_terminal else keys_withheld()
        with withheld, _on_interrupt(lambda number, frame: self.conversation.cancel()):
            self._loop()

    def _loop(self) -> None:
        while not self.finished:
            try:
                text = self._read()
            except KeyboardInterrupt:
                self.screen.notice("Ctrl-D or /exit leaves")
                continue
            except EOFError:
                return
            try:
                self._take(text)
            except DsmoeError as error:
                self.screen.error(error)
            self.screen.console.print()

    def show_reply(self, action: Callable[[Conversation], Iterable[TokenEvent]]) -> None:
        """Print a reply; Ctrl-C ends it and it stays in the conversation."""
        self.screen.reply(action(self.conversation), trim=not self.conversation.completes)
        if self._stats and self.conversation.usage is not None:
            self.screen.notice(describe_usage(self.conversation.usage))

    def _take(self, text: str) -> None:
        """A line of input: a command, or a message to answer."""
        if text.startswith(_BLOCK):
            message = text.removeprefix(_BLOCK).removesuffix(_BLOCK).strip("\n")
            self.show_reply(lambda conversation: conversation.send(message))
            return
        parsed = commands.parse(text)
        if isinstance(parsed, tuple):
            command, argument = parsed
            command.run(self, argument)
        elif isinstance(parsed, commands.Unknown):
            self.screen.notice(f"/{parsed.word} is no command; did you mean /{parsed.nearest}?")
        elif text.strip():
            self.show_reply(lambda conversation: conversation.send(text))
        elif self.conversation.completes and self.conversation.turns:
            self.show_reply(lambda conversation: conversation.go_on())

    def _greet(self) -> None:
        info = self.conversation.engine.info
        self.screen.notice(f"{info.name} · {info.n_context} tokens of context · /help")
        if self.conversation.completes:
            self.screen.notice(
                "a base model without a chat template: it completes your text; Enter alone goes on"
            )

    def _meter(self) -> str:
        """The line below the prompt, which is gone once a message is sent."""
        used, info = self.conversation.n_used, self.conversation.engine.info
        speed = 0.0 if self.conversation.usage is None else self.conversation.usage.tokens_per_second
        parts = [
            info.name,
            f"context {used}/{info.n_context}",
            *([f"{speed:.0f} tokens/s"] if speed >= 1 else []),
        ]
        return "  ".join(parts)


class _CommandCompleter(Completer):
    """Completes the names of slash commands and the words they take."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        if not before.startswith("/") or "\n" in before:
            return
        name, space, rest = before[1:].partition(" ")
        if not space:
            for word, command in commands.BY_WORD.items():
                if word.startswith(name):
                    yield Completion(word, -len(name), display=f"/{word}", display_meta=command.help)
        elif name in commands.BY_WORD and " " not in rest:
            for word in commands.BY_WORD[name].words:
                if word.startswith(rest):
                    yield Completion(word, -len(rest))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None
        elif buffer.text.startswith(_BLOCK) and (
            len(buffer.text) < 2 * len(_BLOCK) or not buffer.text.endswith(_BLOCK)
        ):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-g")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return keys


def _read_plainly() -> str:
    """A message from a terminal that can do nothing but print; a block is read to its end."""
    with _on_interrupt(signal.default_int_handler):
        lines = [input("> ")]
        while lines[0].startswith(_BLOCK) and (len("".join(lines)) < 6 or not lines[-1].endswith(_BLOCK)):
            lines.append(input("  "))
        return "\n".join(lines)


@contextmanager
def _on_interrupt(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _open_history() -> History:
    """The history file, readable by its owner only; without one if the folder cannot be written."""
    path: Path = data_folder() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
