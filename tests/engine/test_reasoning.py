"""Reasoning in replies: what the parser separates, and which tokens end it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.byte_vocabulary import ByteVocabulary

from dsmoe_local.engine.reasoning import (
    Markers,
    ReasoningFormat,
    ReasoningGuide,
    ReasoningParser,
    markers_in,
    template_variables,
)
from dsmoe_local.engine.text_stream import TextStream
from dsmoe_local.engine.types import ReplyStart

THINK = Markers("<think>", "</think>")


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


def parse(pieces: Sequence[str], start: ReplyStart = ReplyStart.DETECT, prompt: str = "") -> tuple[str, str]:
    """Return reasoning and answer."""
    parser = ReasoningParser(THINK, start, prompt)
    parts = [*map(parser.feed, pieces), parser.finish()]
    return "".join(part.reasoning for part in parts), "".join(part.answer for part in parts)


FRAGMENTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n\n", "a", "b c", "é"]), max_size=10
).map("".join)


@given(FRAGMENTS, st.lists(st.integers(0, 60)), st.sampled_from(["", "x<think>\n", "<think></think>\n"]))
def test_pieces_do_not_matter(text: str, places: list[int], prompt: str) -> None:
    """Guards: a marker that is cut between tokens shown as text, or text lost that looked like a marker."""
    reasoning, answer = parse(cut(text, places), prompt=prompt)
    opened = prompt.rstrip().endswith("<think>")
    whole = re.fullmatch(r"\s*(<think>)?(.*)", text, re.DOTALL)
    if opened:
        thought, closed, said = text.partition("</think>")
    elif not prompt and whole and whole[1]:
        thought, closed, said = whole[2].partition("</think>")
    else:
        thought, closed, said = "", "", text
    if closed:
        assert (reasoning, answer) == (thought.strip(), said.lstrip())
    elif thought:
        # A part of the closing marker at the end is none of the reasoning.
        part = next(size for size in range(7, -1, -1) if thought.endswith("</think>"[:size]))
        assert (reasoning, answer) == (thought[: len(thought) - part].lstrip(), "")
    else:
        assert (reasoning.strip(), answer.strip()) == ("", said.strip())


@pytest.mark.parametrize(
    ("start", "prompt", "text", "reasoning", "answer"),
    [
        (ReplyStart.DETECT, "assistant\n", "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        (ReplyStart.DETECT, "assistant<think>\n", "hm\n</think>\n\nyes", "hm", "yes"),
        (ReplyStart.DETECT, "<think>\n\n</think>\n\n", "\n<think> is a tag", "", "<think> is a tag"),
        (
            ReplyStart.DETECT,
            "assistant\n",
            "the tag <think> and </think>",
            "",
            "the tag <think> and </think>",
        ),
        (ReplyStart.DETECT, "assistant\n", " plain", "", " plain"),
        (ReplyStart.DETECT, "assistant\n", "<think>cut", "cut", ""),
        (ReplyStart.DETECT, "assistant\n", "<think>\n\n</think>\n\nyes", "", "yes"),
        (ReplyStart.REASONING, "he said", " more\n</think>\nyes", " more", "yes"),
        (ReplyStart.REASONING, "he said</think>", "\n\nyes", "", "yes"),
        (ReplyStart.ANSWER, "<think>", "a</think>b", "", "a</think>b"),
    ],
)
def test_what_is_reasoning(start: ReplyStart, prompt: str, text: str, reasoning: str, answer: str) -> None:
    """Guards: reasoning that the template opened, closed, or leaves to the model, taken for the answer."""
    assert parse([*text], start, prompt) == (reasoning, answer)


@pytest.mark.parametrize(
    "text", ["<think>\nhm, </b> well\n</think>\n\nyes, </think> no", "<think>a</think>b"]
)
def test_a_reply_that_was_cut_anywhere_goes_on(text: str) -> None:
    """Guards: reasoning that never ends, since the reply was stopped within its closing marker."""
    whole = parse([*text])
    for cut_at in range(len("<think>"), len(text)):
        reasoning, answer = parse([*text[:cut_at]])
        start = ReplyStart.ANSWER if answer else ReplyStart.REASONING
        more = parse([*text[cut_at:]], start, text[:cut_at])
        assert (reasoning + more[0]).split() == whole[0].split(), cut_at
        assert answer + more[1] == whole[1], cut_at


def test_markers_are_those_of_the_template() -> None:
    """Guards: an ordinary model's text parsed, because it mentions a tag."""
    assert markers_in("{{ messages }}") is None
    assert markers_in(None) is None
    assert markers_in("{{ content.split('</think>')[-1] }}") == THINK
    assert markers_in("[THINK]{{ x }}[/THINK]") == ("[THINK]", "[/THINK]")
    assert parse(["<think>a</think>b"], ReplyStart.ANSWER) == ("", "<think>a</think>b")


def test_no_budget_turns_reasoning_off_in_the_template() -> None:
    """Guards: a variable of the user overridden, or reasoning turned off by a budget that allows it."""
    assert template_variables({}, None) == template_variables({}, 1) == {}
    assert template_variables({"x": 1}, 0) == {"enable_thinking": False, "thinking": False, "x": 1}
    assert template_variables({"thinking": True}, 0)["thinking"] is True


def test_stop_strings_apply_to_the_answer() -> None:
    """Guards: a reply ended by a stop string in its reasoning."""
    stream = TextStream(["END"], ReasoningParser(THINK, ReplyStart.DETECT))
    parts = [stream.feed(b"<think>an END here"), stream.feed(b"</think>\n\nyes E"), stream.feed(b"ND no")]
    assert [part.reasoning for part in parts] == ["an END here", "", ""]
    assert [part.answer for part in parts] == ["", "yes ", ""]
    assert stream.stopped


def replies(
    script: str,
    *,
    budget: int | None = None,
    constrained: bool = False,
    prompt: str = "",
    control: bool = True,
) -> tuple[str, str, int]:
    """Return reasoning, answer and tokens of reasoning if the model would write `script`."""
    vocabulary = ByteVocabulary(control=control)
    ids = vocabulary.tokenize(prompt.encode(), special=True)
    form = ReasoningFormat(THINK, vocabulary)
    guide = form.guide(ReplyStart.DETECT, ids, budget=budget, constrained=constrained)
    stream = TextStream((), guide.parser)
    reasoning = answer = ""
    for token_id in _chosen(guide, vocabulary, script):
        parts = stream.feed(guide.take(token_id)[0])
        reasoning, answer = reasoning + parts.reasoning, answer + parts.answer
    last = stream.finish(cut=False)
    return reasoning + last.reasoning, answer + last.answer, guide.n_tokens


def _chosen(guide: ReasoningGuide, vocabulary: ByteVocabulary, script: str) -> Iterator[int]:
    """Yield the tokens of a reply. A sampled token that is replaced is lost."""
    for sampled in [*vocabulary.tokenize(script.encode(), special=True), vocabulary.end]:
        chosen = guide.replace(sampled)
        yield sampled if chosen is None else chosen


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize(("prompt", "script"), [("<think>\n", ""), ("", "<think>"), ("", "\n<think>")])
def test_a_budget_closes_reasoning(prompt: str, script: str, budget: int, control: bool) -> None:
    """Guards: reasoning that goes on after its budget, or a budget of 0 that lets a token through."""
    reasoning, answer, n_tokens = replies(script + 40 * "x", budget=budget, prompt=prompt, control=control)
    assert reasoning == budget * "x"
    assert answer == len(answer) * "x"
    assert answer
    assert n_tokens == budget + len(ByteVocabulary(control=control).tokenize(b"\n</think>", special=True))


@pytest.mark.parametrize("budget", [None, 7, 100])
def test_a_budget_that_suffices_changes_nothing(budget: int | None) -> None:
    """Guards: a second marker forced after the model's own."""
    assert replies("<think>abcdef</think>yes", budget=budget)[:2] == ("abcdef", "yes")
    assert replies("yes", prompt="<think></think>", budget=budget)[:2] == ("", "yes")


def test_tokens_of_reasoning_are_counted() -> None:
    """Guards: tokens of the answer counted, or those of reasoning that the template opened forgotten."""
    assert replies("<think>abc</think>yes")[2] == 3 + 1
    assert replies("abc</think>yes", prompt="<think>")[2] == 3 + 1
    assert replies("yes")[2] == 0


def test_a_grammar_needs_the_end_of_the_reasoning() -> None:
    """Guards: a reply for a schema that ends in its reasoning; an answer that begins inside a token."""
    vocabulary = ByteVocabulary(control=True, more=(b"</think>{",))
    form = ReasoningFormat(THINK, vocabulary)
    for prompt, sampled in (("<think>", vocabulary.end), ("<think>", vocabulary.id_of(b"</think>{"))):
        ids = vocabulary.tokenize(prompt.encode(), special=True)
        guide = form.guide(ReplyStart.DETECT, ids, budget=None, constrained=True)
        assert guide.replace(sampled) == vocabulary.id_of(b"\n")
        assert guide.replace(sampled) == vocabulary.id_of(b"</think>")


@pytest.mark.parametrize("control", [True, False])
def test_reasoning_is_free_of_a_grammar(control: bool) -> None:
    """Guards: a grammar that forbids the model to think, or one that does not constrain the answer."""
    vocabulary = ByteVocabulary(control=control)
    form = ReasoningFormat(THINK, vocabulary)
    guide = form.guide(ReplyStart.DETECT, (), budget=None, constrained=True)
    stream = TextStream((), guide.parser)
    free = []
    for sampled in vocabulary.tokenize(b"\n<think>no\n</think>\n{", special=True):
        chosen = guide.replace(sampled)
        free.append(chosen is not None)
        stream.feed(form.piece(sampled if chosen is None else chosen))
    n_marked = sum(free)
    # The newline after the reasoning and the brace are up to the grammar.
    assert free == [True] * n_marked + [False] * 2


def test_without_reasoning_the_grammar_decides_at_once() -> None:
    """Guards: free text before JSON, because the model might have thought."""
    vocabulary = ByteVocabulary(control=True)
    form = ReasoningFormat(THINK, vocabulary)
    guide = form.guide(ReplyStart.DETECT, (), budget=None, constrained=True)
    assert guide.replace(vocabulary.id_of(b"S")) is None
    assert guide.replace(vocabulary.end) is None
    none = form.guide(ReplyStart.DETECT, (), budget=0, constrained=True)
    assert none.replace(vocabulary.id_of(b"<think>")) is None
