"""The windows below the conversation: lines of state, input, completion menu, bar. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable

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
from dsmoe_local.chat.terminal.completion import Complete
from dsmoe_local.chat.terminal.status import shorten

STYLE = Style.from_dict(
    {
        "prompt": "bold ansicyan",
        "question": "bold",
        "state": "ansibrightblack",
        "bar": "ansibrightblack",
        "bar.model": "ansibrightblack bold",
        "bar.filling": "ansiyellow",
        "bar.full": "ansired",
        "offer.help": "ansibrightblack",
        "offer.selected": "reverse",
        "search-toolbar": "ansibrightblack",
        "incsearch": "underline",
        "incsearch.current": "underline",
        "selected": "reverse",
    }
)

TAB_CELLS = 4  # as in replies
_MENU_LINES = 6
_SMALLEST_INPUT = 3


class ChatLayout:
    """The buffers that are typed into and the windows that show them.

    `state_lines` and `bar` give text for so many columns, `question` what is asked (empty: nothing).
    """

    def __init__(
        self,
        *,
        history: History,
        complete: Complete,
        state_lines: Callable[[int], list[str]],
        bar: Callable[[int], StyleAndTextTuples],
        question: Callable[[], str],
    ) -> None:
        self._question = question
        self._choices = complete
        self.input = Buffer(
            name="input",
            multiline=True,
            history=history,
            # Whatever key of prompt_toolkit's would accept the input: it stays.
            accept_handler=lambda _: True,
        )
        self.input.on_text_insert += lambda _: self._offer_commands()
        self.answer = Buffer(name="answer", multiline=False)
        self.search = SearchToolbar(
            backward_search_prompt="history: ", forward_search_prompt="history, newer: ", ignore_case=True
        )
        self._input_control = BufferControl(
            self.input,
            input_processors=[
                HighlightIncrementalSearchProcessor(),
                HighlightSelectionProcessor(),
                TabsProcessor(tabstop=TAB_CELLS, char1=" ", char2=" "),
            ],
            include_default_input_processors=False,
            search_buffer_control=self.search.control,
            preview_search=True,
        )
        self._answer_control = BufferControl(self.answer, include_default_input_processors=False)
        self.layout = Layout(self._container(state_lines, bar), focused_element=self._input_control)

    def focus(self) -> None:
        """Type where the question is, or else where the next input is."""
        self.layout.focus(self._answer_control if self._question() else self._input_control)

    def _container(
        self, state_lines: Callable[[int], list[str]], bar: Callable[[int], StyleAndTextTuples]
    ) -> HSplit:
        asked = Condition(lambda: bool(self._question()))
        return HSplit(
            [
                _lines(lambda: [("class:state", "\n".join(state_lines(_columns())))]),
                ConditionalContainer(self._input_window(), ~asked),
                ConditionalContainer(self._answer_window(), asked),
                ConditionalContainer(_lines(lambda: menu(self.input, _columns())), has_completions & ~asked),
                self.search,
                _lines(lambda: bar(_columns())),
            ]
        )

    def _input_window(self) -> Window:
        return Window(
            self._input_control,
            height=lambda: Dimension(min=1, max=max(_SMALLEST_INPUT, _rows() // 3)),
            dont_extend_height=True,
            wrap_lines=True,
            get_line_prefix=lambda line, wraps: [("class:prompt", "> " if line == wraps == 0 else "  ")],
        )

    def _answer_window(self) -> Window:
        def prefix(line: int, wraps: int) -> AnyFormattedText:
            return [("class:question", safe_line(self._question(), max(1, _columns() - 12)) + " [y/N] ")]

        return Window(self._answer_control, height=1, dont_extend_height=True, get_line_prefix=prefix)

    def complete(self) -> None:
        """Tab: complete as far as it is clear, then offer what there is, then go through that."""
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

    def _offer_commands(self) -> None:
        """While a command's name is typed, what it could be is shown."""
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


def menu(buffer: Buffer, columns: int) -> StyleAndTextTuples:
    """The completions around the selected one, each on a line with its help."""
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
        note = shorten(each.display_meta_text, rest) if each.display_meta_text and rest > 5 else ""
        style = "class:offer.selected" if number == selected else "class:offer"
        lines += [("", "\n" if lines else ""), ("", "  "), (style, name)]
        lines += [("", "  "), ("class:offer.help", note)] if note else []
    below = len(state.completions) - first - len(shown)
    return [*lines, ("class:offer.help", f"\n  … {below} more")] if below else lines


def _lines(content: Callable[[], StyleAndTextTuples]) -> ConditionalContainer:
    """As many rows as the text has lines; none without text."""
    window = Window(FormattedTextControl(content), dont_extend_height=True, wrap_lines=False)
    return ConditionalContainer(window, Condition(lambda: any(part[1] for part in content())))


def _columns() -> int:
    return get_app().output.get_size().columns


def _rows() -> int:
    return get_app().output.get_size().rows
