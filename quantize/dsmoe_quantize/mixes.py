"""llama.cpp's mixes as data: which tensor gets which type, for the architectures deepseek and llama.

Read from src/llama-quant.cpp of llama.cpp (llama_tensor_get_type and what it calls); the tests hold every mix
against llama_model_quantize, names, types and bytes. What is ours is in `recipes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from dsmoe_local.model.ggml import GgmlType, block_size
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import layer_of
from dsmoe_quantize.layer_rules import LAYER_RULES


class Category(Enum):
    """llama.cpp's grouping of tensors by name: an expert's projection counts like a dense one."""

    OUTPUT = auto()
    EMBEDDING = auto()
    ATTENTION_V = auto()
    ATTENTION_K = auto()
    ATTENTION_OUTPUT = auto()
    FFN_DOWN = auto()
    OTHER = auto()


_CATEGORIES = (
    (re.compile(r"^output\.weight$"), Category.OUTPUT),
    (re.compile(r"^token_embd\.weight$"), Category.EMBEDDING),
    (re.compile(r"attn_v\.weight"), Category.ATTENTION_V),
    (re.compile(r"attn_k\.weight"), Category.ATTENTION_K),
    (re.compile(r"attn_output\.weight"), Category.ATTENTION_OUTPUT),
    (re.compile(r"ffn_down"), Category.FFN_DOWN),
)


def category_of(name: str) -> Category:
    """The category of a GGUF tensor's name."""
    return next((category for pattern, category in _CATEGORIES if pattern.search(name)), Category.OTHER)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a tensor stands among those of its category: the `index`-th of `count`, in a model `hp`."""

    index: int
    count: int
    hp: Hyperparameters


def _more_bits(at: Position) -> bool:
    return LAYER_RULES["more-bits"](at.index, at.count)


def _first_eighth(at: Position) -> bool:
    return LAYER_RULES["first-eighth"](at.index, at.count)


def _first_four(at: Position) -> bool:
    return at.index < 4


def _shared_by_four_heads(at: Position) -> bool:
    return at.hp.n_heads // at.hp.n_kv_heads >= 4


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors of `category` get `type` where the condition holds; `why` says so to a person. `imatrix`: only
    with an importance matrix, or only without; None: in both cases.
    """

    category: Category
    applies: Callable[[Position], bool]
    type: GgmlType
    why: str
    imatrix: bool | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """One of llama.cpp's mixes. The first rule that applies wins over `base`."""

    name: str
    file_type: int
    base: GgmlType
    rules: tuple[Rule, ...] = ()
    with_8_experts: bool = False


_MORE_BITS = (
    Rule(Category.ATTENTION_V, _more_bits, GgmlType.Q6_K, "more bits in this layer"),
    Rule(Category.FFN_DOWN, _more_bits, GgmlType.Q6_K, "more bits in this layer"),
)
_SMALL = (
    Rule(Category.ATTENTION_V, _first_four, GgmlType.Q5_K, "more bits in the first four layers"),
    Rule(Category.FFN_DOWN, _first_eighth, GgmlType.Q5_K, "more bits in the first layers"),
)
_NON_LINEAR = (
    Rule(Category.ATTENTION_V, _shared_by_four_heads, GgmlType.Q5_K, "shared by four heads or more"),
    Rule(Category.FFN_DOWN, _first_eighth, GgmlType.Q5_K, "more bits in the first layers", imatrix=False),
)


def _with_minimum(kind: GgmlType) -> tuple[Rule, ...]:
    return (Rule(Category.FFN_DOWN, _first_eighth, kind, "a minimum in the first layers", imatrix=True),)


_LIST = (
    Mix("Q8_0", 7, GgmlType.Q8_0),
    Mix("Q6_K", 18, GgmlType.Q6_K),
    Mix("Q5_K_M", 17, GgmlType.Q5_K, _MORE_BITS),
    Mix("Q5_K_S", 16, GgmlType.Q5_K),
    Mix("Q5_1", 9, GgmlType.Q5_1),
    Mix("Q5_0", 8, GgmlType.Q5_0, _with_minimum(GgmlType.Q5_1)),
    Mix("Q4_K_M", 15, GgmlType.Q4_K, _MORE_BITS, with_8_experts=True),
    Mix("Q4_K_S", 14, GgmlType.Q4_K, _SMALL, with_8_experts=True),
    Mix("Q4_1", 3, GgmlType.Q4_1),
    Mix("Q4_0", 2, GgmlType.Q4_0, _with_minimum(GgmlType.Q4_1)),
    Mix("IQ4_NL", 25, GgmlType.IQ4_NL, _NON_LINEAR, with_8_experts=True),
    Mix("IQ4_XS", 30, GgmlType.IQ4_XS, _NON_LINEAR, with_8_experts=True),
)

MIXES: Mapping[str, Mix] = MappingProxyType({mix.name: mix for mix in _LIST})
"""By canonical name, from large to small."""

ALIASES: Mapping[str, str] = MappingProxyType({"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"})
"""llama.cpp's other names for two of them."""

FALLBACKS: Mapping[GgmlType, GgmlType] = MappingProxyType(
    {
        GgmlType.Q4_K: GgmlType.Q5_0,
        GgmlType.Q5_K: GgmlType.Q5_1,
        GgmlType.Q6_K: GgmlType.Q8_0,
        GgmlType.IQ4_XS: GgmlType.IQ4_NL,
    }
)
"""What llama.cpp takes where 256 does not divide the columns. Where 32 does not either, it takes F16."""


class MixWalk:
    """Applies a mix to one tensor after another, which must come in llama.cpp's order (`walk_order`).

    llama.cpp counts values and, in models without experts, down projections as it meets them, and leaves out
    those whose type the user sets: so the walk has a memory.
    """

    def __init__(self, mix: Mix, hp: Hyperparameters, names: list[str], *, imatrix: bool = False) -> None:
        """`imatrix`: there is an importance matrix, with which some rules differ."""
        self._mix = mix
        self._rules = [rule for rule in mix.rules if rule.imatrix in (None, imatrix)]
        self._hp = hp
        categories = [category_of(name) for name in names]
        self._tied = Category.OUTPUT not in categories
        self._counts = {
            Category.ATTENTION_V: categories.count(Category.ATTENTION_V),
            Category.FFN_DOWN: hp.n_layers,
        }
        self._met = dict.fromkeys(self._counts, 0)

    def type_of(self, name: str, n_columns: int) -> tuple[GgmlType, str]:
        """The type of the next tensor, before any fallback, and why it is that."""
        category = category_of(name)
        if category is Category.OUTPUT or (category is Category.EMBEDDING and self._tied):
            return self._output(n_columns, "output" if category is Category.OUTPUT else "tied embedding")
        kind, why = self._by_rules(category, self._position(name, category))
        if category is Category.ATTENTION_V and self._is_70b() and kind is GgmlType.Q4_K:
            kind, why = GgmlType.Q5_K, "shared by eight heads"
        if self._hp.n_routed_experts == 8:
            return self._with_8_experts(category, kind, why)
        return kind, why

    def _output(self, n_columns: int, why: str) -> tuple[GgmlType, str]:
        base = self._mix.base
        if base is GgmlType.Q8_0 or n_columns % block_size(base):
            return GgmlType.Q8_0, why
        return GgmlType.Q6_K, why

    def _position(self, name: str, category: Category) -> Position:
        count = self._counts.get(category, 0)
        index = self._met.get(category, 0)
        if category in self._met:
            self._met[category] += 1
        if category is Category.FFN_DOWN and self._hp.n_routed_experts > 1:
            index = _index_of(name)
        return Position(index, count, self._hp)

    def _by_rules(self, category: Category, at: Position) -> tuple[GgmlType, str]:
        for rule in self._rules:
            if rule.category is category and rule.applies(at):
                return rule.type, rule.why
        return self._mix.base, ""

    def _with_8_experts(self, category: Category, kind: GgmlType, why: str) -> tuple[GgmlType, str]:
        """Rules that llama.cpp made for one model and applies to every model with eight experts."""
        if category in (Category.ATTENTION_V, Category.ATTENTION_K):
            return GgmlType.Q8_0, "a model with 8 experts"
        if category is Category.ATTENTION_OUTPUT and self._mix.with_8_experts:
            return GgmlType.Q5_K, "a model with 8 experts"
        return kind, why

    def _is_70b(self) -> bool:
        hp = self._hp
        return hp.architecture == "llama" and hp.n_layers == 80 and hp.n_heads != hp.n_kv_heads


def _index_of(name: str) -> int:
    """The layer in a tensor's name; -1, as in llama.cpp, if it belongs to none."""
    layer = layer_of(name)
    return -1 if layer is None else layer


def walk_order(name: str) -> tuple[int, str]:
    """The sort key of llama.cpp's loader."""
    return _index_of(name), name
