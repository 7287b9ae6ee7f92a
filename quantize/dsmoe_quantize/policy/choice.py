"""Choose a type for each tensor, with the reason: by --type, overrides and fallbacks."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.model.ggml import FLOATS, GgmlType, Tensor, block_size
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import group_kind_of, is_output
from dsmoe_quantize.policy.mixes import FALLBACKS, MixWalk, walk_order
from dsmoe_quantize.policy.named_recipes import NamedRecipe
from dsmoe_quantize.policy.recipes import LayeredRecipe
from dsmoe_quantize.policy.types import ResolvedType, TypeChoice, parse_target, resolve_for

_OPTIONS = ("--tensor-type", "--output-type", "--embedding-type")


@dataclass(frozen=True, slots=True)
class Override:
    """One --tensor-type: tensors whose whole name matches the pattern get this type."""

    pattern: re.Pattern[str]
    type: GgmlType


@dataclass(frozen=True, slots=True)
class Overrides:
    """The user's options beside --type.

    If several of `tensors` match, the first one applies. `output` and `embedding` take precedence over them.
    `pure`: use only the base type of a mix, without its rules.
    """

    tensors: tuple[Override, ...] = ()
    output: GgmlType | None = None
    embedding: GgmlType | None = None
    pure: bool = False


@dataclass(frozen=True, slots=True)
class TensorChoice(Tensor):
    """A tensor of the new file: `type` is the type chosen for it, and `reason` says why.

    `source_type` is its type in the source, or in the unquantized file that a checkpoint would give. `misfit`
    says why the wanted type could not be used.
    """

    source_type: GgmlType
    reason: str = ""
    misfit: str = ""

    @classmethod
    def of(cls, tensor: Tensor, kind: GgmlType, reason: str = "", misfit: str = "") -> TensorChoice:
        """Return the choice of `kind` for a tensor of the source."""
        return cls(tensor.name, tensor.shape, kind, tensor.type, reason, misfit)

    @property
    def changes(self) -> bool:
        """True if the tensor gets another type than it has."""
        return self.type is not self.source_type

    @property
    def is_requantized(self) -> bool:
        """True if the tensor is quantized already and changes its type."""
        return self.changes and self.source_type not in FLOATS

    @property
    def is_override(self) -> bool:
        """True if an option other than --type set this tensor's type."""
        return self.reason in _OPTIONS


def label_of(choice: TypeChoice, overrides: Overrides) -> str:
    """Return the type's name for file names; of a `pure` mix it is that of its base type."""
    if overrides.pure and not isinstance(choice, NamedRecipe | LayeredRecipe):
        return choice.base.name
    return choice.name


def parse_override(text: str) -> Override:
    """Parse `REGEX=TYPE`. Raises UsageError if it is malformed."""
    pattern, equals, word = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(
            f"{safe_line(text, 60)!r} is not REGEX=TYPE",
            remedy=r"write for example --tensor-type 'blk\.\d+\.attn_v\.weight=q8_0'",
        )
    try:
        with warnings.catch_warnings():
            # Python warns about patterns whose meaning may change, such as `[[a]`.
            warnings.simplefilter("error", FutureWarning)
            return Override(re.compile(pattern), parse_target(word))
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise UsageError(f"{safe_line(pattern, 60)!r} is not a regular expression: {error}") from error


def choose_types(
    tensors: Sequence[Tensor],
    hp: Hyperparameters,
    choice: TypeChoice,
    overrides: Overrides | None = None,
    *,
    imatrix: bool = False,
) -> list[TensorChoice]:
    """Choose the type of every tensor, in the order given. `imatrix`: an importance matrix will be used.

    Norms, routers, biases and other vectors always keep their type. Raises UsageError for a --tensor-type
    that matches none of the other tensors, and for --pure with a recipe.
    """
    overrides = overrides or Overrides()
    if overrides.pure and isinstance(choice, NamedRecipe | LayeredRecipe):
        raise UsageError(
            f"{choice.name} is a recipe of several types", remedy="use --pure with one type, such as q4_k"
        )
    refuse_unmatched(tensors, overrides)
    chooser = _Chooser(tensors, hp, resolve_for(choice, hp), overrides, imatrix)
    chosen = {
        tensor.name: chooser.choose(tensor)
        for tensor in sorted(tensors, key=lambda each: walk_order(each.name))
    }
    return [chosen[tensor.name] for tensor in tensors]


def refuse_unmatched(tensors: Sequence[Tensor], overrides: Overrides) -> None:
    """Raise UsageError for a --tensor-type that matches no tensor, which is most likely a typing error."""
    found = (_first_match(overrides, tensor.name) for tensor in tensors if may_change(tensor))
    matched = {override.pattern.pattern for override in found if override}
    for override in overrides.tensors:
        if override.pattern.pattern not in matched:
            raise UsageError(
                f"--tensor-type {safe_line(override.pattern.pattern, 60)} matches no tensor that may change",
                remedy="it must match a whole name; norms and routers never change; see dsmoe inspect",
            )


def _first_match(overrides: Overrides, name: str) -> Override | None:
    """Return the first --tensor-type whose pattern matches the whole name."""
    return next((each for each in overrides.tensors if each.pattern.fullmatch(name)), None)


def fixed_types(
    tensors: Sequence[Tensor], hp: Hyperparameters, recipe: LayeredRecipe, overrides: Overrides
) -> dict[str, TensorChoice]:
    """Return the choices that no recipe affects, by name: vectors, routers, and overridden tensors."""
    chooser = _Chooser(tensors, hp, recipe, overrides, False)
    choices = (chooser.fixed(tensor) for tensor in tensors)
    return {choice.name: choice for choice in choices if choice}


def fallback_notes(choices: Sequence[TensorChoice]) -> list[str]:
    """Return one line for each kind of fallback among `choices`."""
    counts = Counter((each.misfit, each.type) for each in choices if each.misfit)
    return [
        f"{misfit}; {count(n_tensors, 'tensor')} in {kind.name} instead"
        for (misfit, kind), n_tensors in counts.items()
    ]


def misfit_of(kind: GgmlType, n_columns: int) -> str:
    """Say why rows of `n_columns` cannot have the type `kind`, whose blocks do not divide them."""
    return f"{n_columns} columns are not a multiple of {block_size(kind)}, which {kind.name} needs"


def may_change(tensor: Tensor) -> bool:
    """True if --type applies to a tensor: it is a matrix of weights other than a router."""
    is_vector = all(size == 1 for size in tensor.shape[:-1])
    return not is_vector and group_kind_of(tensor.name) is not None


class _Chooser:
    """Chooses types, for tensors that are given in llama.cpp's order."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        hp: Hyperparameters,
        choice: ResolvedType,
        overrides: Overrides,
        imatrix: bool,
    ) -> None:
        self._hp = hp
        self._choice = choice
        self._overrides = overrides
        self._walk = (
            None
            if isinstance(choice, LayeredRecipe) or choice.base in FLOATS
            else MixWalk(choice, hp, [tensor.name for tensor in tensors], imatrix=imatrix)
        )
        self._fallbacks: Mapping[GgmlType, GgmlType] = (
            choice.fallbacks if isinstance(choice, LayeredRecipe) else FALLBACKS
        )

    def choose(self, tensor: Tensor) -> TensorChoice:
        return self.fixed(tensor) or self._fitting(tensor, *self._by_type(tensor))

    def fixed(self, tensor: Tensor) -> TensorChoice | None:
        """Return the choice for a tensor that --type does not decide; None if it does."""
        if not may_change(tensor):
            return TensorChoice.of(tensor, tensor.type, "never quantized")
        overridden = self._overridden(tensor)
        return self._fitting(tensor, *overridden) if overridden else None

    def _overridden(self, tensor: Tensor) -> tuple[GgmlType, str] | None:
        override = _first_match(self._overrides, tensor.name)
        if tensor.name == "token_embd.weight" and self._overrides.embedding is not None:
            return self._overrides.embedding, "--embedding-type"
        if is_output(tensor.name, self._hp) and self._overrides.output is not None:
            return self._overrides.output, "--output-type"
        return (override.type, "--tensor-type") if override else None

    def _by_type(self, tensor: Tensor) -> tuple[GgmlType, str]:
        if isinstance(self._choice, LayeredRecipe):
            return self._choice.type_of(tensor.name, self._hp)
        if self._walk is None or self._overrides.pure:
            return self._choice.base, "--pure" if self._overrides.pure else ""
        return self._walk.type_of(tensor.name, tensor.shape[-1])

    def _fitting(self, tensor: Tensor, wanted: GgmlType, reason: str) -> TensorChoice:
        columns = tensor.shape[-1]
        if columns % block_size(wanted) == 0:
            return TensorChoice.of(tensor, wanted, reason)
        kind = self._fallbacks.get(wanted, wanted)
        if columns % block_size(kind):
            kind = GgmlType.F16
        return TensorChoice.of(tensor, kind, reason, misfit_of(wanted, columns))
