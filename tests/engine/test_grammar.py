"""GBNF grammars against llama.cpp's own sampler, and hostile ones, on which that one dies or never ends."""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp  # noqa: TID251 - the oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import llama_oracle
from support.grammar_texts import END, belongs, gbnf, permitted, random_text
from support.models import smollm2

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.sampling.constraint import CompiledGrammar, Constraint


class Oracle:
    """llama.cpp's grammar sampler, fed one character after another."""

    def __init__(self, model: Any) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._eos = llama_cpp.llama_vocab_eos(self._vocab)
        self._ids: dict[str, list[int]] = {}

    def _allows(self, sampler: Any, token_id: int) -> bool:
        data = (llama_cpp.llama_token_data * 1)(llama_cpp.llama_token_data(token_id, 1.0, 0.0))
        array = llama_cpp.llama_token_data_array(data, 1, -1, False)
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        return bool(data[0].logit > 0)

    def _tokens(self, char: str) -> list[int]:
        if char not in self._ids:
            raw = char.encode()
            room = (llama_cpp.llama_token * 8)()
            count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), room, 8, False, False)
            self._ids[char] = room[:count]
        return self._ids[char]

    def belongs(self, grammar: str, text: str) -> bool:
        sampler = llama_cpp.llama_sampler_init_grammar(self._vocab, grammar.encode(), b"root")
        assert sampler
        try:
            for token_id in (token_id for char in text for token_id in self._tokens(char)):
                if not self._allows(sampler, token_id):
                    return False
                llama_cpp.llama_sampler_accept(sampler, token_id)
            return self._allows(sampler, self._eos)
        finally:
            llama_cpp.llama_sampler_free(sampler)


@contextmanager
def oracle() -> Iterator[Oracle]:
    with llama_oracle.loaded(smollm2(), vocab_only=True) as model:
        yield Oracle(model)


GRAMMARS = [
    'root ::= "a" | "ab" | "abc"?',
    'root ::= (("a" | "b")+ "c"){2,3} [^a-c]*',
    "root ::= [a-c]{2} | [x-z\\]\\\\^-]{0,3} | .",
    'root ::= expr # a comment\nexpr ::= term ("+" term)*\nterm ::= "(" expr ")" | [0-9]+',
    'root ::= "é" | "中"+ | [à-ï]{2} | "\\u20AC" | "\\x41"',
    'root ::= (\n  "a"  # first\n  | "b"\n)  "\\n"?\n\nunused ::= "z"',
    'root ::= a\na ::= b c\nb ::= "x"? | d\nc ::= "y"*\nd ::= ""',
    'root ::= list\nlist ::= item | item "," list\nitem ::= [a-b] item-2?\nitem-2 ::= "c" item-2 | "d"',
    'root ::= "" | "a" root "b"',
    'root ::= "a"{0,} | "b"',
    'root ::= ("ab" | "a" "bc")* "c"?',
]
ALPHABET = "aabbccxyz(+)012,d^]-\\é中à€A\n "


def test_texts_belong_as_for_llama_cpp() -> None:
    """Guards: repetition, grouping, escapes, sets, comments or empty rules read in another way."""
    rng = random.Random(0)
    with oracle() as their:
        for grammar in GRAMMARS:
            root = gbnf(grammar)
            texts = {"".join(rng.choices(ALPHABET, k=rng.randrange(7))) for _ in range(150)}
            for _ in range(25):
                raw = random_text(root, rng, patience=8)
                if raw is None or len(raw) > 60:
                    continue
                own = raw.decode()
                texts |= {own, own[:-1], own + rng.choice(ALPHABET)}
                cut = rng.randrange(len(own) + 1)
                texts.add(own[:cut] + rng.choice(ALPHABET) + own[cut + 1 :])
            # The vocabulary has no token for some control characters.
            for text in sorted(text for text in texts if text.replace("\n", "").isprintable()):
                assert belongs(root, text) == their.belongs(grammar, text), (grammar, text)


# Each item in both notations: GBNF and Python's.
_ITEMS = st.recursive(
    st.sampled_from(
        [('"a"', "a"), ('"ab"', "(?:ab)"), ("[ab]", "[ab]"), ("[^a]", "[^a]"), (".", "."), ('""', "")]
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda items: _group(items, " ", "")),
        st.lists(inner, min_size=1, max_size=3).map(lambda items: _group(items, " | ", "|")),
        st.tuples(inner, st.sampled_from(["?", "+", "*", "{2}", "{1,2}", "{2,}"])).map(
            lambda pair: (f"({pair[0][0]}){pair[1]}", f"(?:{pair[0][1]}){pair[1]}")
        ),
    ),
    max_leaves=6,
)


def _group(items: list[tuple[str, str]], theirs: str, pythons: str) -> tuple[str, str]:
    notations, regex = zip(*items, strict=True)
    return f"({theirs.join(notations)})", f"(?:{pythons.join(regex)})"


@given(_ITEMS, st.lists(st.text(alphabet="abc", max_size=7), min_size=1, max_size=8))
@settings(max_examples=300)
def test_regular_grammars_are_those_of_re(item: tuple[str, str], texts: list[str]) -> None:
    """Guards: automata that are joined wrongly: loops that leak into their neighbours."""
    notation, regex = item
    root = gbnf(f"root ::= {notation}")
    for text in texts:
        assert belongs(root, text) == bool(re.fullmatch(regex, text)), (notation, text)


@pytest.mark.parametrize("negated", [False, True])
def test_characters_and_their_bytes(negated: bool) -> None:
    """Guards: characters at the borders of UTF-8's lengths, surrogates, ranges that overlap."""
    borders = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    ranges = [(0x41, 0x7F), (0x60, 0x7FF), (0xD000, 0xFFFF), (0x10FFFF, 0x10FFFF)]
    written = "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)
    grammar = gbnf(f"root ::= [{'^' if negated else ''}{written}]")
    for point in {*borders, *(point + step for pair in ranges for point in pair for step in (-1, 0, 1))}:
        if 0 <= point <= 0x10FFFF and not 0xD800 <= point <= 0xDFFF:
            wanted = any(low <= point <= high for low, high in ranges) != negated
            assert belongs(grammar, chr(point)) == wanted, hex(point)


@pytest.mark.parametrize(
    ("grammar", "where"),
    [
        ("", "root"),
        ('start ::= "a"', "root"),
        ("root ::= lost", "rule root"),
        ('root ::= "a', "line 1"),
        ('root ::= "a"\nb = "c"', "line 2, column 3"),
        ('root ::= ("a"', "line 1"),
        ('root ::= "a")', "line 1, column 13"),
        ("root ::= [b-a]", "line 1"),
        ("root ::= *", "line 1"),
        ('root ::= "a"{3,2}', "line 1"),
        ('root ::= "a"{0,99999999}', "line 1"),
        ('root ::= "a"{x}', "line 1"),
        ('root ::= "\\q"', "line 1"),
        ('root ::= "\\ud800"', "line 1"),
        ('root ::= "\\U00110000"', "line 1"),
        ('root ::= "\ud800"', "surrogate"),
        ('root ::= "a"\nroot ::= "b"', "line 2"),
        ("root ::= <think>", "line 1"),
        ("root ::= " + "(" * 100_000, "line 1"),
        ("root ::= root", "rule root"),
        ('root ::= "a" root', "rule root"),
        ("root ::= a\na ::= b\nb ::= a", "rule root"),
        ("root ::= [^\\x00-\\U0010FFFF]", "rule root"),
        ('root ::= "a"' + "*" * 100_000, "line 1"),
        (
            "root ::= a0\n" + "".join(f"a{n} ::= a{n + 1}\n" for n in range(10_000)) + 'a10000 ::= "a"',
            "10,000",
        ),
    ],
    ids=lambda value: value[:30],
)
def test_grammars_that_are_refused(grammar: str, where: str) -> None:
    """Guards: what ends llama.cpp's process, or lets it run for ever; errors that do not say where."""
    with pytest.raises(UsageError, match=re.escape(where)):
        gbnf(grammar)


def _doubling(depth: int) -> str:
    rules = "".join(f'r{i} ::= r{i + 1} r{i + 1} | r{i + 1} "x"?\n' for i in range(depth))
    return f'root ::= r0\n{rules}r{depth} ::= "a"?\n'


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("grammar", "text", "wanted"),
    [
        ('root ::= root "+" "a" | "a"', "a+a+a", True),
        ('root ::= a root "x" | "y"\na ::= b\nb ::= ""', "yxx", True),
        ('root ::= a\na ::= b a | "x"\nb ::= a | ""', "xxx", True),
        ('root ::= "a" root "b" | "a" root "c" | ""', "a" * 300 + "bc" * 150, True),
        ('root ::= root root | "a" | ""', "a" * 30, True),
        ('root ::= ("a"* )* "b"', "a" * 2000 + "b", True),
        ('root ::= (("a"* "a"*)* "a"?)* "b"', "a" * 2000, False),
        ("root ::= [a-z]{0,10000}", "a" * 9000, True),
        ("root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(2000)) + 'r2000 ::= "a"', "a", True),
        ('root ::= "x" | r0\n' + "".join(f'r{i} ::= r{i + 1} "b"\n' for i in range(3000)) + 'r3000 ::= "a"',
         "a" + "b" * 3000, True),
        ("root ::= " + " | ".join(f'"{i}"' for i in range(5000)), "4999", True),
        ("root ::= " + "(" * 50 + '"a"' + ' | "b")*' * 50, "ab" * 20, True),
        ('root ::= "[" list "]"\nlist ::= "a" | "a" "," list', "[" + "a," * 9000 + "a]", True),
        ('root ::= "a" more\nmore ::= "b" more | ""', "a" + "b" * 20_000, True),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_hostile_grammars_end(grammar: str, text: str, wanted: bool) -> None:
    """Guards: left recursion, exponential ways to read a text, long chains: time, memory, Python's stack."""
    assert belongs(gbnf(grammar), text) == wanted


def test_a_grammar_that_becomes_too_complex_fails_its_text_only() -> None:
    """Guards: gigabytes of states, or minutes, in the thread that decodes for everyone."""
    grammar = "root ::= [a-z]{0,9999} [a-z]{0,9999} [a-z]{0,9999}"
    assert belongs(gbnf(grammar), "a" * 100)
    with pytest.raises(EngineError, match="became too complex"):
        read(gbnf(grammar), "a" * 9000)
    assert belongs(gbnf(grammar), "a" * 100)
    with pytest.raises(EngineError, match="became too complex"):
        read(gbnf(_doubling(40)), "aaa")


def read(grammar: CompiledGrammar, text: str) -> None:
    """Accept a text, asking for the mask at each place as a reply does whose first choice is refused."""
    constraint = Constraint(grammar)
    for byte in text.encode():
        constraint.likeliest(np.zeros(257, np.float32), 1)
        constraint.accept(byte)


@pytest.mark.timeout(60)
def test_endless_ambiguity_fails_the_text_only() -> None:
    """Guards: a grammar that is legal and takes cubic time, in the thread that decodes for everyone."""
    many = " | ".join(f"s s{i}" for i in range(80))
    rules = "".join(f's{i} ::= s "a"? s | "a"\n' for i in range(80))
    grammar = gbnf(f'root ::= s\ns ::= {many} | "a"\n{rules}')
    with pytest.raises(EngineError, match="became too complex"):
        read(grammar, "a" * 1000)


def test_branches_without_an_end_are_not_entered() -> None:
    """Guards: a reply led into a rule that can never be completed."""
    grammar = gbnf('root ::= "a" (dead | "b") | dead\ndead ::= "c" dead')
    assert permitted(grammar, b"") == [ord("a")]
    assert permitted(grammar, b"a") == [ord("b")]


def test_what_was_only_tested_leaves_no_trace() -> None:
    """Guards: a token that was only tested, or a reply beside it, moving a reply on."""
    grammar = gbnf('root ::= ("a" | "b" root "c")+')
    ours, beside = Constraint(grammar), Constraint(grammar)
    beside.accept(ord("a"))
    ours.accept(ord("b"))
    for _ in range(2):
        assert [ours.permits(byte) for byte in b"abc"] == [True, True, False]
        assert not ours.permits(END)
