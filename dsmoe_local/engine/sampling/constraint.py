"""A request's grammar or JSON schema held against a model's vocabulary: which tokens may come next.

The sampled token is tested first. Only if it is refused are others looked for, by their bytes and likeliest
first: most of the vocabulary is ruled out by its first two bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np

from dsmoe_local.engine import native
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.grammar.gbnf import parse_gbnf
from dsmoe_local.engine.grammar.json_schema import parse_json_schema
from dsmoe_local.engine.grammar.matcher import Matcher, Position
from dsmoe_local.engine.grammar.network import CompiledRule, compile_grammar
from dsmoe_local.engine.sampling.likeliest import Logits, TokenIds, likeliest
from dsmoe_local.engine.types import Request

_SINGLE = 256  # stands for "no second byte" in a pair of a token's first two bytes
_BYTES = 257
_FIRST_LOOK = 256
_MAX_WORK = 500_000  # about half a second of looking for tokens, in which nobody else gets any


class Vocabulary:
    """The bytes of a model's tokens, for looking all of them through at once."""

    def __init__(self, model: native.Model) -> None:
        self.ends = np.array([i for i in range(model.n_vocab) if model.ends(i)], np.int32)
        self.pieces = [model.piece(token_id) for token_id in range(model.n_vocab)]
        for token_id in self.ends:
            self.pieces[token_id] = b""
        # Control tokens have no bytes: they would pass as nothing at all, again and again.
        self.pairs = np.array([_pair(piece) for piece in self.pieces], np.int32)


def _pair(piece: bytes) -> int:
    if not piece:
        return 256 * _BYTES
    return piece[0] * _BYTES + (piece[1] if len(piece) > 1 else _SINGLE)


_vocabularies: WeakKeyDictionary[native.Model, Vocabulary] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Language:
    """What a request's replies are held to, in a model's own tokens. Its states are made while it is used."""

    root: CompiledRule
    vocabulary: Vocabulary


def language_of(model: native.Model, request: Request) -> Language | None:
    """What holds a request's replies; None if nothing does. Raises UsageError if it cannot be read.

    Takes up to a second for a large grammar, and for the first one of a model.
    """
    if request.grammar is None and request.json_schema is None:
        return None
    vocabulary = _vocabularies.get(model)
    if vocabulary is None:
        vocabulary = _vocabularies[model] = Vocabulary(model)
    return Language(_compiled(request.grammar, request.json_schema), vocabulary)


# A batch often has one grammar for all of its lines.
@lru_cache(maxsize=16)
def _compiled(grammar: str | None, json_schema: str | None) -> CompiledRule:
    return compile_grammar(parse_json_schema(json_schema or "") if grammar is None else parse_gbnf(grammar))


class Constraint:
    """One reply under a grammar: what may follow what was accepted so far."""

    def __init__(self, language: Language) -> None:
        self._vocabulary = language.vocabulary
        self._ends = frozenset(map(int, self._vocabulary.ends))
        self._matcher = Matcher(language.root)
        self._position = self._matcher.start()
        # What the tokens tested since the last `accept` lead to.
        self._tested: dict[int, Position | None] = {}

    def permits(self, token_id: int) -> bool:
        """Whether the token may come next; a token that ends the reply may where the grammar is complete."""
        if token_id in self._ends:
            return self._position.complete
        return self._behind(token_id) is not None

    def _behind(self, token_id: int) -> Position | None:
        if token_id not in self._tested:
            piece = self._vocabulary.pieces[token_id]
            self._tested[token_id] = self._matcher.advance(self._position, piece) if piece else None
        return self._tested[token_id]

    def accept(self, token_id: int) -> None:
        """Go on behind a permitted token."""
        if token_id not in self._ends:
            position = self._behind(token_id)
            if position is None:
                raise EngineError(f"the grammar does not permit token {token_id}")
            self._position = position
        self._tested.clear()

    def likeliest(self, logits: Logits, count: int) -> TokenIds:
        """Up to `count` permitted tokens, those of the highest logits first. EngineError if there is none."""
        possible = self._possible()
        found: list[int] = []
        seen, look, most = 0, max(_FIRST_LOOK, 2 * count), self._matcher.work + _MAX_WORK
        while len(found) < count and seen < len(possible) and self._matcher.work < most:
            order = likeliest(logits[possible], look)[seen:]
            for token_id in map(int, possible[order]):
                if self.permits(token_id):
                    found.append(token_id)
                if len(found) == count or self._matcher.work >= most:
                    break
            seen, look = seen + len(order), look * 8
        if not found:
            raise EngineError(
                "the grammar permits none of the model's tokens here",
                remedy="check which characters it asks for",
            )
        return np.array(found, np.int32)

    def _possible(self) -> TokenIds:
        """The tokens whose first two bytes may follow, in ascending order."""
        allowed = np.zeros((257, _BYTES), np.bool_)
        for first in np.flatnonzero(self._position.first_bytes()):
            behind = self._matcher.advance(self._position, bytes([first]))
            if behind is not None:
                allowed[first, _SINGLE] = True
                allowed[first, :256] = behind.first_bytes()
        possible = allowed.ravel()[self._vocabulary.pairs]
        if self._position.complete:
            possible[self._vocabulary.ends] = True
        return np.flatnonzero(possible).astype(np.int32)
