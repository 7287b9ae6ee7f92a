"""A request's grammar or JSON schema held against a model's vocabulary: which tokens may come next.

The sampled token is tested first, which costs microseconds. Only if it is refused, the mask of all permitted
tokens is computed, as in llama.cpp's common/sampling.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine import native
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.grammar.compile import LIMITS, compile_grammar
from dsmoe_local.engine.sampling.likeliest import Logits, TokenIds, likeliest

_NOTHING_FITS = "NoExtension"  # how llguidance begins the error for a mask without a token


class _Pieces:
    """A vocabulary as llguidance reads it: the bytes of each token, and one more token that ends a text.

    The model's own tokens that end a reply have no bytes here; `Constraint` permits them where the grammar is
    complete.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.tokens = [*pieces, b"\xff<end>"]
        self.eos_token_id = len(pieces)
        self.bos_token_id = None
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text that a grammar forces. Our grammars force none (`no_forcing`)."""
        raise EngineError("the tokens of a forced text were asked for")


class Vocabulary:
    """A model's tokens, from the bytes that each adds to a text and the ids of those that end a reply.

    `silent` are the tokens without bytes, the ends included.
    """

    def __init__(self, pieces: Sequence[bytes], ends: Sequence[int]) -> None:
        self.n_tokens = len(pieces)
        self.ends = np.array(ends, np.int32)
        texts = list(pieces)
        for token_id in ends:
            texts[token_id] = b""
        self.silent = frozenset(token_id for token_id, piece in enumerate(texts) if not piece)
        self.tokenizer = LLTokenizer(TokenizerWrapper(_Pieces(texts)))


_vocabularies: WeakKeyDictionary[native.Model, Vocabulary] = WeakKeyDictionary()


def vocabulary_of(model: native.Model) -> Vocabulary:
    """The model's vocabulary, made once: 0.2 s for 50,000 tokens."""
    vocabulary = _vocabularies.get(model)
    if vocabulary is None:
        ids = range(model.n_vocab)
        pieces = [model.piece(token_id) for token_id in ids]
        vocabulary = Vocabulary(pieces, [token_id for token_id in ids if model.ends(token_id)])
        _vocabularies[model] = vocabulary
    return vocabulary


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar compiled for a vocabulary. `matcher` is copied for each reply."""

    vocabulary: Vocabulary
    matcher: LLMatcher


# A batch often has one grammar for all of its lines; copies of a matcher share the states of its lexer. Few
# are kept: each may take `LIMITS`.
@lru_cache(maxsize=4)
def compiled(vocabulary: Vocabulary, grammar: str | None, json_schema: str | None) -> CompiledGrammar:
    """Compile a grammar or a JSON schema for a vocabulary. UsageError if it cannot be enforced."""
    text = compile_grammar(grammar=grammar, json_schema=json_schema)
    matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise UsageError(f"the grammar is too complex: {safe_line(matcher.get_error(), 200)}")
    if json_schema is not None and matcher.is_accepting():
        raise UsageError("the JSON schema permits an empty text", remedy="check its $ref: one names itself")
    return CompiledGrammar(vocabulary, matcher)


class Constraint:
    """One reply under a grammar: what may follow what was accepted so far."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._vocabulary = grammar.vocabulary
        self._matcher = grammar.matcher.deep_copy()

    def permits(self, token_id: int) -> bool:
        """Whether the token may come next; a token that ends the reply may where the grammar is complete."""
        if token_id in self._vocabulary.silent:
            return token_id in self._vocabulary.ends and self._matcher.is_accepting()
        return self._matcher.validate_tokens([token_id]) == 1

    def accept(self, token_id: int) -> None:
        """Go on behind a permitted token. EngineError if it is not, or if the grammar became too complex."""
        if token_id in self._vocabulary.ends:
            return
        if not self._matcher.consume_token(token_id):
            raise self._failure()

    def likeliest(self, logits: Logits, count: int) -> TokenIds:
        """Up to `count` permitted tokens, those of the highest logits first. EngineError if there is none."""
        permitted = self._permitted()
        if not len(permitted):
            raise EngineError(
                "the grammar permits none of the model's tokens here",
                remedy="check which characters it asks for",
            )
        return permitted[likeliest(logits[permitted], count)]

    def _permitted(self) -> TokenIds:
        """All permitted tokens, in ascending order."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            if self._matcher.get_error().startswith(_NOTHING_FITS):
                return np.empty(0, np.int32)
            raise self._failure()
        allowed = np.unpackbits(mask, count=self._vocabulary.n_tokens, bitorder="little")
        if self._matcher.is_accepting():
            allowed[self._vocabulary.ends] = 1
        return np.flatnonzero(allowed).astype(np.int32)

    def _failure(self) -> EngineError:
        # Copies share the states of the lexer, and so its limit: the next request begins with none.
        compiled.cache_clear()
        reason = safe_line(self._matcher.get_error(), 200)
        return EngineError(
            f"the reply cannot be held to its grammar any longer: {reason}",
            remedy="write the grammar without ambiguity, above all in repetitions of repetitions",
        )
