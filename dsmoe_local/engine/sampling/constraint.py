"""Applies a grammar or JSON schema to a model's vocabulary, to find the tokens that may come next.

The sampled token is tested first, which takes microseconds. Only if it is not permitted, the mask of all
permitted tokens is computed, as in llama.cpp's common/sampling.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from dsmoe_local.engine.tools.calls import Tools
from dsmoe_local.engine.tools.formats import ToolFormat
from dsmoe_local.engine.tools.grammar import compile_tools

_EMPTY_MASK = "NoExtension"  # the start of llguidance's error for a mask without a token


class _Pieces:
    """A tokenizer for llguidance: the bytes of each token, and an extra end token.

    The model's own end tokens have no bytes here. `Constraint` permits them when the grammar is complete.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.tokens = [*pieces, b"\xff<end>"]
        self.eos_token_id = len(pieces)
        self.bos_token_id = None
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        """Tokenize a text that a grammar forces. Never called, since all grammars set `no_forcing`."""
        raise EngineError("llguidance asked for the tokens of a forced text")


class Vocabulary:
    """A model's tokens. `ends` are the ids of end tokens, `silent` those of all tokens without bytes."""

    def __init__(self, pieces: Sequence[bytes], ends: Sequence[int]) -> None:
        self.n_tokens = len(pieces)
        self.ends = np.array(ends, np.int32)
        texts = list(pieces)
        for token_id in ends:
            texts[token_id] = b""
        self.silent = frozenset(token_id for token_id, piece in enumerate(texts) if not piece)
        self.tokenizer = LLTokenizer(TokenizerWrapper(_Pieces(texts)))


_vocabularies: WeakKeyDictionary[native.Model, dict[bool, Vocabulary]] = WeakKeyDictionary()


def vocabulary_of(model: native.Model, markers: Mapping[int, bytes] | None = None) -> Vocabulary:
    """Return the model's vocabulary. `markers` are the bytes of control tokens that a grammar may contain.

    It is cached: creating it takes 0.2 s for 50,000 tokens.
    """
    cached = _vocabularies.setdefault(model, {})
    vocabulary = cached.get(bool(markers))
    if vocabulary is None:
        ids = range(model.n_vocab)
        pieces = [(markers or {}).get(token_id) or model.piece(token_id) for token_id in ids]
        vocabulary = Vocabulary(pieces, [token_id for token_id in ids if model.ends(token_id)])
        cached[bool(markers)] = vocabulary
    return vocabulary


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar compiled for a vocabulary. `matcher` is copied for each reply."""

    vocabulary: Vocabulary
    matcher: LLMatcher


# All requests of a batch often have the same grammar, and copies of a matcher share its lexer states. Only a
# few are cached, since each may take as much memory as `LIMITS` allows.
@lru_cache(maxsize=4)
def compiled(
    vocabulary: Vocabulary,
    grammar: str | None,
    json_schema: str | None,
    tools: tuple[ToolFormat, Tools] | None = None,
) -> CompiledGrammar:
    """Compile a grammar, a JSON schema or tools for a vocabulary.

    Raises UsageError if they cannot be enforced.
    """
    if tools is None:
        text = compile_grammar(grammar=grammar, json_schema=json_schema)
    else:
        text = compile_tools(*tools, json_schema)
    matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise UsageError(
            f"the grammar is too complex: {safe_line(matcher.get_error(), 200)}",
            remedy="use smaller repetitions and fewer rules",
        )
    if json_schema is not None and matcher.is_accepting():
        raise UsageError(
            "the JSON schema permits an empty text", remedy="check for a $ref that refers to itself"
        )
    return CompiledGrammar(vocabulary, matcher)


class Constraint:
    """The state of a grammar in one reply."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._vocabulary = grammar.vocabulary
        self._matcher = grammar.matcher.deep_copy()

    def permits(self, token_id: int) -> bool:
        """Return True if the token may come next. An end token may if the grammar is complete."""
        if token_id in self._vocabulary.silent:
            return token_id in self._vocabulary.ends and self._matcher.is_accepting()
        return self._matcher.validate_tokens([token_id]) == 1

    def accept(self, token_id: int) -> None:
        """Advance by a token. Raises EngineError if it is not permitted or the grammar is too complex."""
        if token_id in self._vocabulary.ends:
            return
        if not self._matcher.consume_token(token_id):
            raise self._failure()

    def likeliest(self, logits: Logits, count: int) -> TokenIds:
        """Return up to `count` permitted tokens, the likeliest first. Raises EngineError if none is."""
        permitted = self._permitted()
        if not len(permitted):
            raise EngineError(
                "the grammar permits none of the model's tokens here",
                remedy="check which characters it requires",
            )
        return permitted[likeliest(logits[permitted], count)]

    def _permitted(self) -> TokenIds:
        """Return all permitted tokens in ascending order."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            if self._matcher.get_error().startswith(_EMPTY_MASK):
                return np.empty(0, np.int32)
            raise self._failure()
        allowed = np.unpackbits(mask, count=self._vocabulary.n_tokens, bitorder="little")
        if self._matcher.is_accepting():
            allowed[self._vocabulary.ends] = 1
        return np.flatnonzero(allowed).astype(np.int32)

    def _failure(self) -> EngineError:
        # Copies of a matcher share the lexer states and their limit, so the next request needs a new matcher.
        compiled.cache_clear()
        reason = safe_line(self._matcher.get_error(), 200)
        return EngineError(
            f"the grammar became too complex for this reply: {reason}",
            remedy="write the grammar without ambiguity, especially without nested repetitions",
        )
