"""The windows below the conversation: state lines, input, completion menu, status bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prompt_toolkit.application import get_app
from prompt_toolkit.buffer import Buffer, CompletionState
from prompt_toolkit.completion import Completion, get_common_complete_suffix
from prompt_toolkit.filters import Condition, has_completions
from prompt_toolkit.formatted_text import AnyFormattedText, StyleAndTextTuples
from prompt_toolkit.history import History
from prompt_toolkit.layout import (
    BufferControl,
    ConditionalContainer,
    Dimension,
    FormattedTextControl,
    HSplit,
    Layout,
    Window,
)
from prompt_toolkit.layout.processors import (
    HighlightIncrementalSearchProcessor,
    HighlightSelectionProcessor,
    TabsProcessor,
)
from prompt_toolkit.styles import Style
from prompt_toolkit.widgets import SearchToolbar
from rich.cells import cell_len, set_cell_size

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.terminal.screen import Completer, Status

STYLE = Style.from_dict(
    {
        "prompt": "bold ansicyan",
        "question": "bold",
        "state": "ansibrightblack",
        "bar": "ansibrightblack",
        "bar.model": "ansibrightblack bold",
        "bar.filling": "ansiyellow",
        "bar.full": "ansired",
        "menu.help": "ansibrightblack",
        "menu.selected": "reverse",
        "search-toolbar": "ansibrightblack",
        "incsearch": "underline",
        "incsearch.current": "underline",
        "selected": "reverse",
    }
)

_TAB_CELLS = 4  # as in replies
_MENU_LINES = 6
_MIN_INPUT_LINES = 3
_METER_CELLS = 8
_EIGHTHS = " ▏▎▍▌▋▊▉"
_SEPARATOR = "  ·  "
# The parts that the status bar of a narrow window lacks, in this order. "word" is the word "context".
_OPTIONAL_PARTS = ("note", "speed", "session", "meter", "word", "model")


class ChatLayout:
    """The buffers for typing and the windows that show them.

    `state_lines` returns the lines for a number of columns, `status` the content of the status bar, and
    `question` the question that is asked, or "".
    """

    def __init__(
        self,
        *,
        history: History,
        complete: Completer,
        state_lines: Callable[[int], list[str]],
        status: Callable[[], Status],
        question: Callable[[], str],
    ) -> None:
        self._question = question
        self._choices = complete
        self.input = Buffer(
            name="input",
            multiline=True,
            history=history,
            # Some keys of prompt_toolkit accept the input. It then stays in the buffer.
            accept_handler=lambda _: True,
        )
        self.input.on_text_insert += lambda _: self._complete_while_typing()
        self.answer = Buffer(name="answer", multiline=False)
        self.search = SearchToolbar(
            backward_search_prompt="history: ", forward_search_prompt="history, newer: ", ignore_case=True
        )
        self._input_control = BufferControl(
            self.input,
            input_processors=[
                HighlightIncrementalSearchProcessor(),
                HighlightSelectionProcessor(),
                TabsProcessor(tabstop=_TAB_CELLS, char1=" ", char2=" "),
            ],
            include_default_input_processors=False,
            search_buffer_control=self.search.control,
            preview_search=True,
        )
        self._answer_control = BufferControl(self.answer, include_default_input_processors=False)
        asked = Condition(lambda: bool(question()))
        windows = HSplit(
            [
                _lines(lambda: [("class:state", "\n".join(state_lines(_columns())))]),
                ConditionalContainer(self._input_window(), ~asked),
                ConditionalContainer(self._answer_window(), asked),
                ConditionalContainer(_lines(lambda: _menu(self.input, _columns())), has_completions & ~asked),
                self.search,
                _lines(lambda: status_bar(status(), _columns())),
            ]
        )
        self.layout = Layout(windows, focused_element=self._input_control)

    def focus(self) -> None:
        """Focus the answer if a question is asked, otherwise the input."""
        self.layout.focus(self._answer_control if self._question() else self._input_control)

    def complete(self) -> None:
        """Insert the common prefix of the choices, then offer them in a menu, then step through the menu.

        Buffer.start_completion is not used, since it runs in a task: an Enter typed right after Tab would
        come before the completion.
        """
        offered = self.input.complete_state
        if offered is not None and len(offered.completions) > 1:
            self.input.complete_next()
            return
        found = self._completions()
        if len(found) == 1:
            self.input.apply_completion(found[0])
        elif found:
            self.input.insert_text(get_common_complete_suffix(self.input.document, found))
            self._offer(self._completions())

    def _input_window(self) -> Window:
        return Window(
            self._input_control,
            height=lambda: Dimension(min=1, max=max(_MIN_INPUT_LINES, _rows() // 3)),
            dont_extend_height=True,
            wrap_lines=True,
            get_line_prefix=lambda line, wraps: [("class:prompt", "> " if line == wraps == 0 else "  ")],
        )

    def _answer_window(self) -> Window:
        def prefix(line: int, wraps: int) -> AnyFormattedText:
            return [("class:question", safe_line(self._question(), max(1, _columns() - 12)) + " [y/N] ")]

        return Window(self._answer_control, height=1, dont_extend_height=True, get_line_prefix=prefix)

    def _complete_while_typing(self) -> None:
        """Offer the commands that begin like what is typed."""
        text = self.input.text
        if text.startswith("/") and not any(character.isspace() for character in text):
            self._offer(self._completions())

    def _offer(self, completions: list[Completion]) -> None:
        self.input.complete_state = CompletionState(self.input.document, completions) if completions else None

    def _completions(self) -> list[Completion]:
        try:
            found = list(self._choices(self.input.document.text_before_cursor))
        except DsmoeError:
            return []
        return [
            Completion(
                choice.text,
                -choice.replaces,
                display=safe_line(choice.shown or choice.text),
                display_meta=safe_line(choice.help),
            )
            for choice in found
        ]


def _menu(buffer: Buffer, columns: int) -> StyleAndTextTuples:
    """Return the completions around the selected one, each on a line with its help."""
    state = buffer.complete_state
    if state is None:
        return []
    selected = state.complete_index
    first = max(0, min((selected or 0) - _MENU_LINES + 2, len(state.completions) - _MENU_LINES))
    shown = state.completions[first : first + _MENU_LINES]
    width = min(max(cell_len(each.display_text) for each in shown), max(12, columns // 3))
    lines: StyleAndTextTuples = []
    for number, each in enumerate(shown, first):
        name = set_cell_size(shorten(each.display_text, width), width)
        rest = columns - width - 5
        help_text = shorten(each.display_meta_text, rest) if each.display_meta_text and rest > 5 else ""
        style = "class:menu.selected" if number == selected else "class:menu"
        lines += [("", "\n" if lines else ""), ("", "  "), (style, name)]
        lines += [("", "  "), ("class:menu.help", help_text)] if help_text else []
    n_below = len(state.completions) - first - len(shown)
    return [*lines, ("class:menu.help", f"\n  … {n_below} more")] if n_below else lines


def status_bar(status: Status, columns: int) -> StyleAndTextTuples:
    """Return the status bar, without the parts that do not fit into `columns` cells."""
    parts = dict(_status_parts(status))
    for name in ("", *_OPTIONAL_PARTS):
        if name == "word":
            parts["context"] = parts.get("context", [])[-1:]
        parts.pop(name, None)
        if _width(parts) <= columns:
            break
    line: StyleAndTextTuples = []
    for text in parts.values():
        line += [("class:bar", _SEPARATOR)] if line else []
        line += text
    return line


def _status_parts(status: Status) -> Iterator[tuple[str, StyleAndTextTuples]]:
    if status.model:
        yield "model", [("class:bar.model", safe_line(status.model, 40))]
    if status.session:
        yield "session", [("class:bar", safe_line(status.session, 40))]
    if status.n_context:
        share = min(1.0, status.n_used / status.n_context)
        style = "class:bar.full" if share > 0.9 else "class:bar.filling" if share > 0.75 else "class:bar"
        yield "meter", [(style, _meter(share))]
        yield "context", [(style, "context "), (style, f"{status.n_used:,}/{status.n_context:,}")]
    if status.tokens_per_second >= 0.05:
        digits = 0 if status.tokens_per_second >= 10 else 1
        yield "speed", [("class:bar", f"{status.tokens_per_second:.{digits}f} tokens/s")]
    if status.note:
        yield "note", [("class:bar.note", safe_line(status.note, 60))]


def _meter(share: float) -> str:
    eighths = round(share * _METER_CELLS * 8)
    full, rest = divmod(eighths, 8)
    return f"▕{('█' * full + (_EIGHTHS[rest] if rest else '')).ljust(_METER_CELLS)}▏"


def _width(parts: dict[str, StyleAndTextTuples]) -> int:
    texts = [sum(cell_len(part[1]) for part in text) for text in parts.values()]
    return sum(texts) + len(_SEPARATOR) * max(0, len(texts) - 1)


def shorten(text: str, columns: int) -> str:
    """Return `text` as one line of at most `columns` cells."""
    line = safe_line(text, max(1, columns))
    return line if cell_len(line) <= columns else f"{set_cell_size(line, columns - 1).rstrip()}…"


def _lines(content: Callable[[], StyleAndTextTuples]) -> ConditionalContainer:
    """Return a window as high as its text has lines; none without text."""
    window = Window(FormattedTextControl(content), dont_extend_height=True, wrap_lines=False)
    return ConditionalContainer(window, Condition(lambda: any(part[1] for part in content())))


def _columns() -> int:
    return get_app().output.get_size().columns


def _rows() -> int:
    return get_app().output.get_size().rows
