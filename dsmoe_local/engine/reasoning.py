"""Separates the reasoning of a reply from its answer, and decides where the reasoning ends.

Reasoning models write their reasoning between two markers before they answer. Everything here works on text
and token ids, without a model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from dsmoe_local.engine.types import CallDelta, ReplyStart


class Markers(NamedTuple):
    """The texts before and after reasoning."""

    open: str
    close: str


_MARKERS = (
    Markers("<think>", "</think>"),
    Markers("<seed:think>", "</seed:think>"),
    Markers("[THINK]", "[/THINK]"),
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),
)
_PROMPT_END = 24  # tokens, in which a template may open or close reasoning
_SWITCHES = ("enable_thinking", "thinking")
"""The variables with which chat templates turn reasoning on and off."""


def markers_in(template: str | None) -> Markers | None:
    """Return the markers that a chat template uses; None if the model does not reason.

    Some templates contain the closing marker only: they remove reasoning from earlier replies.
    """
    return next((markers for markers in _MARKERS if template and markers.close in template), None)


def template_variables(given: Mapping[str, Any], budget: int | None) -> dict[str, Any]:
    """Return the variables for the chat template. A budget of 0 turns reasoning off, unless they are given.

    Templates ignore variables that they do not know.
    """
    return dict.fromkeys(_SWITCHES, False) | dict(given) if budget == 0 else dict(given)


class Parts(NamedTuple):
    """Parts of a reply. Reasoning comes before the answer and the tool calls in it."""

    answer: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


class ReasoningParser:
    """Splits the text of a reply, which arrives in pieces, into reasoning and answer.

    A reply has at most one block of reasoning, at its beginning. The markers, and whitespace next to them,
    are in neither part. Text that may turn out to be a marker, or whitespace next to one, is held back.
    """

    def __init__(
        self, markers: Markers | None = None, start: ReplyStart = ReplyStart.ANSWER, prompt: str = ""
    ) -> None:
        """`prompt` is the end of the prompt, where a template may have opened or closed the reasoning."""
        self._open, self._close = markers or ("", "")
        self.undecided = False  # the reply may still begin with reasoning
        self.in_reasoning = False
        self._held = ""
        self._trims = False  # whitespace at the beginning of the next text
        if markers is None or start is ReplyStart.ANSWER:
            return
        end = prompt.rstrip()
        if end.endswith(self._open):
            self.in_reasoning = self._trims = True
        elif end.endswith(self._close):
            self._trims = True
        elif start is ReplyStart.REASONING:
            self.in_reasoning = True
            # The reply was cut within the closing marker.
            self._held = self._close[: overlap(prompt, self._close)]
        else:
            self.undecided = True

    @property
    def holds(self) -> bool:
        """True if text is held back."""
        return bool(self._held)

    def feed(self, piece: str) -> Parts:
        """Add text. Return what is certain now."""
        if not (self.undecided or self.in_reasoning or self._trims):
            return Parts(piece)
        text, self._held = self._held + piece, ""
        if self.undecided:
            head = text.lstrip()
            if self._open.startswith(head) and head != self._open:  # also if it is empty
                self._held = text
                return Parts()
            self.undecided = False
            if head.startswith(self._open):
                self.in_reasoning = self._trims = True
                text = head.removeprefix(self._open)
        reasoning = ""
        if self.in_reasoning:
            reasoning, text = self._split(text)
        return Parts(self._trimmed(text), reasoning)

    def finish(self) -> Parts:
        """End the reply. Return what was held back, except for a part of the closing marker."""
        held, self._held = self._held, ""
        if self.in_reasoning:
            return Parts(reasoning=held[: len(held) - overlap(held, self._close)])
        return Parts(answer=held)

    def opens_with(self, piece: str) -> str | None:
        """Return the rest of the opening marker if `piece` may be its first text; None if it cannot be."""
        head = (self._held + piece).lstrip()
        if not self.undecided or not self._open.startswith(head):
            return None
        return self._open.removeprefix(head)

    def answers_with(self, piece: str) -> bool:
        """Return True if `piece` would end the reasoning and also begin the answer."""
        return self.in_reasoning and bool((self._held + piece).partition(self._close)[2].strip())

    @property
    def ending(self) -> str:
        """The text that ends the reasoning now: the closing marker on a new line, or the rest of it."""
        n_written = overlap(self._held, self._close)
        return self._close[n_written:] if n_written else f"\n{self._close}"

    def _split(self, text: str) -> tuple[str, str]:
        """Return reasoning and what follows its end."""
        text = self._trimmed(text)
        before, found, after = text.partition(self._close)
        if found:
            self.in_reasoning, self._trims = False, True
            return before.rstrip(), after
        # A part of the marker at the end, and the whitespace before it.
        certain = text[: len(text) - overlap(text, self._close)].rstrip()
        self._held = text[len(certain) :]
        return certain, ""

    def _trimmed(self, text: str) -> str:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        return text


def overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` with which `marker` begins."""
    lengths = range(min(len(text), len(marker) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(marker[:length])), 0)


class Vocabulary(Protocol):
    """The methods of `native.Model` that are needed here."""

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        """Return the token ids of UTF-8 text, without BOS."""
        ...

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of a token; b"" for a control token."""
        ...

    def text_of(self, token_id: int) -> str:
        """Return the text of a token, also of a control token."""
        ...

    def ends(self, token_id: int) -> bool:
        """Return True if the token ends a reply."""
        ...


class ReasoningFormat:
    """How a model marks reasoning: the markers as texts and as tokens."""

    def __init__(self, markers: Markers, vocabulary: Vocabulary) -> None:
        self.markers = markers
        self.vocabulary = vocabulary
        self._marker_tokens: dict[int, bytes] = {}
        for marker in markers:
            ids = self.tokenize(marker)
            if len(ids) == 1:
                self._marker_tokens[ids[0]] = marker.encode()

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a short text that may contain markers."""
        return self.vocabulary.tokenize(text.encode(), special=True)

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of a token. A marker has its text, also if it is a control token."""
        return self._marker_tokens.get(token_id) or self.vocabulary.piece(token_id)

    def guide(
        self, start: ReplyStart, prompt: Sequence[int], *, budget: int | None, constrained: bool
    ) -> ReasoningGuide:
        """Return the guide of a reply to a prompt."""
        end = "".join(map(self.vocabulary.text_of, prompt[-_PROMPT_END:]))
        parser = ReasoningParser(self.markers, start, end)
        return ReasoningGuide(self, parser, budget=budget, constrained=constrained)


class ReasoningGuide:
    """Chooses tokens of a reply in place of the sampler, to end the reasoning.

    - After `budget` tokens of reasoning the closing marker is forced. None: no limit.
    - If a grammar constrains the answer, reasoning is free. But it must be closed, and the answer must begin
      with a token of its own.

    `parser` must be fed with the text of the tokens. `n_tokens` counts those of the reasoning, with the
    closing marker.
    """

    def __init__(
        self, form: ReasoningFormat, parser: ReasoningParser, *, budget: int | None, constrained: bool
    ) -> None:
        self.parser = parser
        self.n_tokens = 0
        self._form = form
        self._budget = budget
        self._constrained = constrained
        self._forced: deque[int] = deque()

    def take(self, token_id: int) -> tuple[bytes, bool]:
        """Count a token of the reply. Return its bytes, and whether it belongs to the reasoning."""
        self.n_tokens += self.parser.in_reasoning
        return self._form.piece(token_id), self.parser.in_reasoning

    def replace(self, sampled: int) -> int | None:
        """Return the next token, or None if the sampler and the grammar choose it."""
        if self._forced:
            return self._forced.popleft()
        if self.parser.in_reasoning:
            if self._budget is not None and self.n_tokens >= self._budget:
                return self._force(f"{self.parser.ending}\n\n")
            if not self._constrained:
                return None
            ends = self._form.vocabulary.ends(sampled)
            if ends or self.parser.answers_with(self._form.vocabulary.text_of(sampled)):
                return self._force(self.parser.ending)
            return sampled
        free = self._constrained and self.parser.undecided and self._budget != 0
        return sampled if free and self._may_open(sampled) else None

    def _may_open(self, sampled: int) -> bool:
        """Return True if the token may begin the opening marker. The rest of the marker is then forced."""
        text = self._form.vocabulary.text_of(sampled)
        rest = self.parser.opens_with(text)
        if rest is None or self._form.vocabulary.ends(sampled):
            return False
        if text.strip():
            self._forced.extend(self._form.tokenize(rest) if rest else ())
            return True
        return not self.parser.holds  # one token of whitespace may come before it

    def _force(self, text: str) -> int:
        self._forced.extend(self._form.tokenize(text))
        return self._forced.popleft()
