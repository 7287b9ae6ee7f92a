"""llama.cpp's mixes as data: which tensor gets which type, in all architectures of the table.

Taken from src/llama-quant.cpp of llama.cpp (llama_tensor_get_type and what it calls). The tests compare every
mix with llama_model_quantize: names, types and bytes. Our own recipes are in `recipes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dsmoe_local.model.file_type import FILE_TYPES
from dsmoe_local.model.ggml import GgmlType, block_size
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import is_output, layer_of

_VALUE = (".attn_v.weight", ".attn_qkv.weight")
_DOWN = (".ffn_down.weight", ".ffn_down_shexp.weight", ".ffn_down_exps.weight")
_ATTENTION_OUTPUT = (".attn_output.weight",)
"""The tensors that rules apply to, by the ends of their names. llama.cpp has none for MLA's projections."""


def first_eighth(index: int, count: int) -> bool:
    """True in the first eighth of `count` layers, rounded down: in none of fewer than eight."""
    return index < count // 8


def more_bits(index: int, count: int) -> bool:
    """llama.cpp's use_more_bits: the first and the last eighth of the layers, and every third between."""
    return first_eighth(index, count) or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


@dataclass(frozen=True, slots=True)
class Position:
    """The `index` of a tensor (from 0) among the `count` tensors that a rule counts, in a model `hp`."""

    index: int
    count: int
    hp: Hyperparameters


def _more_bits(at: Position) -> bool:
    return more_bits(at.index, at.count)


def _first_eighth(at: Position) -> bool:
    return first_eighth(at.index, at.count)


def _first_sixteenth(at: Position) -> bool:
    return at.index < at.count // 16


def _first_four(at: Position) -> bool:
    return at.index < 4


def _first_two(at: Position) -> bool:
    return at.index < 2


def _always(_: Position) -> bool:
    return True


def _without_8_experts(at: Position) -> bool:
    return at.hp.n_routed_experts != 8


def _shared_by_four_heads(at: Position) -> bool:
    return at.hp.n_heads // at.hp.n_kv_heads >= 4


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors with these `names` get `type` where `applies` is true; `why` tells the user the reason.

    `imatrix` True or False: the rule holds only with or only without an importance matrix; None: always.
    """

    names: tuple[str, ...]
    applies: Callable[[Position], bool]
    type: GgmlType
    why: str
    imatrix: bool | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """One of llama.cpp's mixes, or a float type, which has no rules.

    The first rule that applies takes precedence over `base`. `with_8_experts`: in models with eight experts,
    the attention output gets Q5_K.
    """

    name: str
    base: GgmlType
    rules: tuple[Rule, ...] = ()
    with_8_experts: bool = False

    @property
    def file_type(self) -> int:
        """llama.cpp's number for files of this type."""
        return FILE_TYPES[self.name]


_MORE_BITS = (
    Rule(_VALUE, _more_bits, GgmlType.Q6_K, "more bits in this layer"),
    Rule(_DOWN, _more_bits, GgmlType.Q6_K, "more bits in this layer"),
)
_SMALL = (
    Rule(_VALUE, _first_four, GgmlType.Q5_K, "more bits in the first four layers"),
    Rule(_DOWN, _first_eighth, GgmlType.Q5_K, "more bits in the first layers"),
)
_NON_LINEAR = (
    Rule(_VALUE, _shared_by_four_heads, GgmlType.Q5_K, "shared by four heads or more"),
    Rule(_DOWN, _first_eighth, GgmlType.Q5_K, "more bits in the first layers", imatrix=False),
)
_THREE_BITS = (
    Rule(_VALUE, _first_two, GgmlType.Q5_K, "more bits in the first two layers"),
    Rule(_VALUE, _always, GgmlType.Q4_K, "more bits than the base"),
    Rule(_DOWN, _first_sixteenth, GgmlType.Q5_K, "more bits in the first layers"),
    Rule(_DOWN, _always, GgmlType.Q4_K, "more bits than the base"),
    Rule(_ATTENTION_OUTPUT, _without_8_experts, GgmlType.Q4_K, "more bits than the base"),
)
_THREE_BITS_LARGE = (
    Rule(_VALUE, _always, GgmlType.Q5_K, "more bits than the base"),
    Rule(_DOWN, _always, GgmlType.Q5_K, "more bits than the base"),
    Rule(_ATTENTION_OUTPUT, _without_8_experts, GgmlType.Q5_K, "more bits than the base"),
)


def _with_minimum(kind: GgmlType) -> tuple[Rule, ...]:
    return (Rule(_DOWN, _first_eighth, kind, "a minimum in the first layers", imatrix=True),)


_LIST = (
    Mix("Q8_0", GgmlType.Q8_0),
    Mix("Q6_K", GgmlType.Q6_K),
    Mix("Q5_K_M", GgmlType.Q5_K, _MORE_BITS),
    Mix("Q5_K_S", GgmlType.Q5_K),
    Mix("Q5_1", GgmlType.Q5_1),
    Mix("Q5_0", GgmlType.Q5_0, _with_minimum(GgmlType.Q5_1)),
    Mix("Q4_K_M", GgmlType.Q4_K, _MORE_BITS, with_8_experts=True),
    Mix("Q4_K_S", GgmlType.Q4_K, _SMALL, with_8_experts=True),
    Mix("Q4_1", GgmlType.Q4_1),
    Mix("Q4_0", GgmlType.Q4_0, _with_minimum(GgmlType.Q4_1)),
    Mix("IQ4_NL", GgmlType.IQ4_NL, _NON_LINEAR, with_8_experts=True),
    Mix("IQ4_XS", GgmlType.IQ4_XS, _NON_LINEAR, with_8_experts=True),
    Mix("Q3_K_L", GgmlType.Q3_K, _THREE_BITS_LARGE),
    Mix("Q3_K_M", GgmlType.Q3_K, _THREE_BITS, with_8_experts=True),
    Mix("Q3_K_S", GgmlType.Q3_K, with_8_experts=True),
)

MIXES: Mapping[str, Mix] = MappingProxyType({mix.name: mix for mix in _LIST})
"""The mixes by canonical name, from large to small."""

FLOAT_TYPES: Mapping[str, Mix] = MappingProxyType(
    {kind.name: Mix(kind.name, kind) for kind in (GgmlType.F32, GgmlType.F16, GgmlType.BF16)}
)
"""Every matrix in one float type; norms and routers stay as they are."""

ALIASES: Mapping[str, str] = MappingProxyType({"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"})
"""Other names that llama.cpp has for three of the mixes."""

FALLBACKS: Mapping[GgmlType, GgmlType] = MappingProxyType(
    {
        GgmlType.Q3_K: GgmlType.Q4_0,
        GgmlType.Q4_K: GgmlType.Q5_0,
        GgmlType.Q5_K: GgmlType.Q5_1,
        GgmlType.Q6_K: GgmlType.Q8_0,
        GgmlType.IQ4_XS: GgmlType.IQ4_NL,
    }
)
"""The type that llama.cpp uses where 256 does not divide the columns. If 32 does not either, it uses F16."""


class MixWalk:
    """Applies a mix to tensors, which must be given in llama.cpp's order (`walk_order`).

    The type of a tensor depends on those before it: like llama.cpp, the walk counts the value projections
    and, in models without experts, the down projections. Tensors whose type the user overrides do not count.
    """

    def __init__(self, mix: Mix, hp: Hyperparameters, names: list[str], *, imatrix: bool = False) -> None:
        """`imatrix`: an importance matrix is used, with which some rules differ."""
        self._mix = mix
        self._rules = [rule for rule in mix.rules if rule.imatrix in (None, imatrix)]
        self._hp = hp
        self._counts = {
            _VALUE: sum(name.endswith(_VALUE) for name in names),
            _DOWN: hp.n_stored_layers,
            _ATTENTION_OUTPUT: hp.n_stored_layers,
        }
        self._met = dict.fromkeys(self._counts, 0)

    def type_of(self, name: str, n_columns: int) -> tuple[GgmlType, str]:
        """Return the type of the next tensor, before any fallback, and the reason."""
        if is_output(name, self._hp):
            return self._output(n_columns), "tied embedding" if self._hp.tied_embeddings else "output"
        kind, why = self._by_rules(name)
        if name.endswith(_VALUE) and self._is_70b() and kind in (GgmlType.Q3_K, GgmlType.Q4_K):
            kind, why = GgmlType.Q5_K, "shared by eight heads"
        if self._hp.n_routed_experts == 8:
            return self._with_8_experts(name, kind, why)
        return kind, why

    def _output(self, n_columns: int) -> GgmlType:
        base = self._mix.base
        return GgmlType.Q8_0 if base is GgmlType.Q8_0 or n_columns % block_size(base) else GgmlType.Q6_K

    def _by_rules(self, name: str) -> tuple[GgmlType, str]:
        counted = next((names for names in self._counts if name.endswith(names)), None)
        if counted is None:
            return self._mix.base, ""
        index = self._met[counted]
        self._met[counted] += 1
        if counted is _DOWN and self._hp.n_routed_experts > 1:
            index = _index_of(name)
        at = Position(index, self._counts[counted], self._hp)
        for rule in self._rules:
            if rule.names is counted and rule.applies(at):
                return rule.type, rule.why
        return self._mix.base, ""

    def _with_8_experts(self, name: str, kind: GgmlType, why: str) -> tuple[GgmlType, str]:
        """Apply the rules that llama.cpp has for Mixtral, and applies to every model with eight experts."""
        if name.endswith((*_VALUE, ".attn_k.weight")):
            return GgmlType.Q8_0, "a model with 8 experts"
        if name.endswith(".attn_output.weight") and self._mix.with_8_experts:
            return GgmlType.Q5_K, "a model with 8 experts"
        return kind, why

    def _is_70b(self) -> bool:
        hp = self._hp
        return hp.architecture == "llama" and hp.n_layers == 80 and hp.n_heads != hp.n_kv_heads


def _index_of(name: str) -> int:
    """Return the layer in a tensor's name; -1, as in llama.cpp, if it has none."""
    layer = layer_of(name)
    return -1 if layer is None else layer


def walk_order(name: str) -> tuple[int, str]:
    """Return the key by which llama.cpp's loader sorts tensors."""
    return _index_of(name), name
