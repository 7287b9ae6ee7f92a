"""What each type costs in each group of tensors, in bytes, speed and error, and the best recipe for a budget.

Errors are predicted KL divergences in nats: the sum over tensors of the relative squared error
(`sensitivity`) times its cost in the group (`error_weights`). They serve to compare recipes of one model;
`dsmoe eval --against` measures how far a file really is from its source.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size, round_up
from dsmoe_local.model.cost import read_fraction
from dsmoe_local.model.ggml import FLOATS, GgmlType, Tensor, padded, tensor_bytes
from dsmoe_local.model.gguf_file import GgufFile, TensorInfo
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import is_output
from dsmoe_quantize.budget.error_weights import error_weights
from dsmoe_quantize.budget.kernel_speeds import SPEEDS, is_fast, speed_of
from dsmoe_quantize.budget.sensitivity import Sensitivity
from dsmoe_quantize.budget.solver import Option, Problem, Solution, solve
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Overrides, TensorChoice, choose_types, fixed_types
from dsmoe_quantize.policy.mixes import MIXES
from dsmoe_quantize.policy.recipe_file import closest_mix
from dsmoe_quantize.policy.recipes import RECIPE_FALLBACKS, Group, LayeredRecipe, condensed, group_of
from dsmoe_quantize.quantize import Plan, plan_file

SPEED_BASE = "Q4_K_M"
"""The mix to whose speed predicted speeds are relative."""

_N_COSTS = 4
"""The number of costs that budgets may limit, in the order of `_costs`."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits of a file, at least one of which is set. None means unlimited.

    `size` is in bytes with the header, `bits_per_weight` is without it. `bytes_per_token` are the weights
    read to decode one token. `slow_share` is the share (0 to 1) of the weights read that have no fast kernel.
    `prompt_speed` is the least speed of prompts, as predicted by `CostModel.speeds`.
    """

    size: int | None = None
    bits_per_weight: float | None = None
    bytes_per_token: int | None = None
    slow_share: float | None = None
    prompt_speed: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """The costs of some tensors.

    They are the bytes in the file with padding, the bytes read per token, the number of weights read per
    token that have no fast kernel, the predicted error, and the time of the products for one token of a
    prompt and of a reply, in picoseconds; 0 if the processor's speed is unknown.
    """

    n_bytes: int = 0
    n_bytes_per_token: float = 0.0
    n_slow: float = 0.0
    error: float = 0.0
    prompt: float = 0.0
    decode: float = 0.0

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.n_bytes + other.n_bytes,
            self.n_bytes_per_token + other.n_bytes_per_token,
            self.n_slow + other.n_slow,
            self.error + other.error,
            self.prompt + other.prompt,
            self.decode + other.decode,
        )


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """A group whose type is free, its tensors, and the costs of each type that fits, smallest first."""

    group: Group
    tensors: tuple[TensorInfo, ...]
    options: Mapping[GgmlType, Figures]


@dataclass(frozen=True, slots=True)
class Solved:
    """A recipe for a budget. `picks` has the type of each free group, `total` the costs of all tensors.

    `prices` are the error that one more byte of size, byte per token, slow weight, or picosecond of a prompt
    would save. No recipe has an error below `bound`.
    """

    plan: Plan
    recipe: LayeredRecipe
    picks: Mapping[Group, GgmlType]
    total: Figures
    file_size: int
    prices: tuple[float, ...]
    bound: float
    is_optimal: bool


class CostModel:
    """The costs of all types in a model's groups, on one kind of processor. `solve` finds the best recipe."""

    def __init__(
        self,
        file: GgufFile,
        hp: Hyperparameters,
        sensitivity: Sensitivity,
        *,
        overrides: Overrides | None = None,
        imatrix: Imatrix | None = None,
        cpu: str = "none",
    ) -> None:
        self.file = file
        self.hp = hp
        self.cpu = cpu
        self.overrides = overrides or Overrides()
        self.imatrix = imatrix
        self.sensitivity = sensitivity
        self._alignment = file.alignment
        self._energies = self._energies_of_groups()
        self.error_weights = error_weights(self._energies.keys(), sensitivity.weights)
        base = LayeredRecipe("base", "F16", {}, RECIPE_FALLBACKS)
        tensors = list(file.tensors.values())
        self.fixed_types = fixed_types(tensors, hp, base, self.overrides)
        self.fixed = self.figures(self.fixed_types.values())
        self.groups = self._groups(tensors)
        self.n_weights = sum(tensor.n_weights for tensor in tensors)
        self.n_read = sum(tensor.n_weights * read_fraction(hp, tensor.name) for tensor in tensors)

    def figures(self, choices: Iterable[TensorChoice]) -> Figures:
        """Return the costs of tensors in the types chosen. Raises KeyError if one was not measured."""
        each = (self._figures(self.file.tensors[choice.name], choice.type) for choice in choices)
        return sum(each, Figures())

    def solve(
        self,
        budget: Budget,
        name: str,
        about: Mapping[str, str | int | float] | None = None,
        *,
        quick: bool = False,
    ) -> Solved:
        """Return the recipe with the least predicted error within `budget`; `quick` stops within 0.5% of it.

        Raises UsageError if nothing fits.
        """
        header = 0
        while True:
            solved = self._solve(budget, header, name, about or {}, quick)
            if budget.size is None or solved.file_size <= budget.size:
                return solved
            # The header contains the recipe, so its size is known only now.
            header += solved.file_size - budget.size

    def _energies_of_groups(self) -> dict[Group, float]:
        energies: dict[Group, float] = {}
        for name, measured in self.sensitivity.tensors.items():
            group = group_of(name, self.hp)
            if group is not None:
                energy = measured.energy * measured.n_weights / measured.n_tried
                energies[group] = energies.get(group, 0.0) + energy
        return energies

    def _figures(self, tensor: TensorInfo, kind: GgmlType) -> Figures:
        n_bytes = tensor_bytes(kind, tensor.shape)
        fraction = read_fraction(self.hp, tensor.name)
        is_matrix = tensor.name in self.sensitivity.tensors
        slow = is_matrix and not is_fast(self.cpu, kind, tensor.shape)
        prompt, decode = self._times(tensor, kind) if is_matrix else (0.0, 0.0)
        return Figures(
            padded(n_bytes, self._alignment),
            n_bytes * fraction,
            tensor.n_weights * fraction if slow else 0.0,
            self._error(tensor, kind) if is_matrix else 0.0,
            prompt,
            decode,
        )

    def _times(self, tensor: Tensor, kind: GgmlType) -> tuple[float, float]:
        """Return `Figures.prompt` and `Figures.decode` of a matrix."""
        speed = speed_of(self.cpu, kind, tensor.shape)
        n_read = tensor.n_weights * read_fraction(self.hp, tensor.name)
        # The output is computed only for the last token of a prompt.
        n_of_prompt = 0.0 if is_output(tensor.name, self.hp) else n_read
        return (n_of_prompt * speed.prompt, n_read * speed.decode) if speed else (0.0, 0.0)

    @cached_property
    def _base_times(self) -> tuple[float, float]:
        """The times of Q4_K_M."""
        tensors = list(self.file.tensors.values())
        chosen = choose_types(tensors, self.hp, MIXES[SPEED_BASE])
        times = [self._times(each, each.type) for each in chosen if each.name in self.sensitivity.tensors]
        return sum(prompt for prompt, _ in times), sum(decode for _, decode in times)

    def speeds(self, total: Figures) -> tuple[float, float] | None:
        """Return the predicted speeds of prompts and of decoding, in multiples of those of Q4_K_M.

        Only the products with weights are counted. None if the processor's speed is unknown.
        """
        if not (total.prompt and total.decode):
            return None
        prompt, decode = self._base_times
        return prompt / total.prompt, decode / total.decode

    def _error(self, tensor: TensorInfo, kind: GgmlType) -> float:
        measured = self.sensitivity.tensors[tensor.name]
        group = group_of(tensor.name, self.hp)
        assert group is not None  # only tensors in groups are measured
        weight, energy = self.error_weights.of[group], self._energies[group]
        # Float types have almost no error, and are measured only where no block type fits.
        if not energy or (kind in FLOATS and kind not in measured.errors):
            return 0.0
        return weight * measured.errors[kind] * measured.n_weights / measured.n_tried / energy

    def _groups(self, tensors: Sequence[TensorInfo]) -> list[GroupOptions]:
        members: dict[Group, list[TensorInfo]] = {}
        for tensor in tensors:
            group = group_of(tensor.name, self.hp)
            if group is not None and tensor.name not in self.fixed_types:
                members.setdefault(group, []).append(tensor)
        return [self._options(group, each) for group, each in members.items()]

    def _options(self, group: Group, tensors: list[TensorInfo]) -> GroupOptions:
        measured = [self.sensitivity.tensors[tensor.name].errors for tensor in tensors]
        shared = [kind for kind in measured[0] if all(kind in errors for errors in measured)]
        found = {kind: sum((self._figures(tensor, kind) for tensor in tensors), Figures()) for kind in shared}
        ordered = sorted(found.items(), key=lambda item: (item[1].n_bytes, item[1].error, item[0]))
        return GroupOptions(group, tuple(tensors), dict(ordered))

    def _limits(self, budget: Budget, header: int) -> list[float | None]:
        """Return what the budgets leave for the free groups, in the order of `_costs`."""
        sizes = [budget.size - header] if budget.size is not None else []
        if budget.bits_per_weight is not None:
            sizes.append(int(budget.bits_per_weight * self.n_weights / 8))
        return [
            min(sizes) - self.fixed.n_bytes if sizes else None,
            None if budget.bytes_per_token is None else budget.bytes_per_token - self.fixed.n_bytes_per_token,
            None if budget.slow_share is None else budget.slow_share * self.n_read - self.fixed.n_slow,
            None if budget.prompt_speed is None else self._prompt_limit(budget) - self.fixed.prompt,
        ]

    def _prompt_limit(self, budget: Budget) -> float:
        """Return the longest time of a prompt. UsageError if the processor's speed is unknown."""
        assert budget.prompt_speed is not None
        if self.cpu not in SPEEDS:
            raise UsageError(
                f"speeds of prompts are not known for the processor {self.cpu}",
                remedy=f"leave out --min-prompt-speed, or add --cpu {', '.join(SPEEDS)}",
            )
        return self._base_times[0] / budget.prompt_speed

    def _solve(
        self, budget: Budget, header: int, name: str, about: Mapping[str, str | int | float], quick: bool
    ) -> Solved:
        limits = self._limits(budget, header)
        used = [at for at, limit in enumerate(limits) if limit is not None]
        tables = [list(each.options) for each in self.groups]
        problem = Problem(
            [
                [Option(figures.error, _costs(figures, used)) for figures in each.options.values()]
                for each in self.groups
            ],
            tuple(int(limit) for limit in limits if limit is not None),
        )
        solution = solve(problem, quick=quick) if min(problem.limits, default=0) >= 0 else None
        if solution is None:
            raise self._infeasible(budget, name, about)
        picks = {
            each.group: table[at] for each, table, at in zip(self.groups, tables, solution.picks, strict=True)
        }
        return self._solved(picks, solution, used, name, about)

    def _solved(
        self,
        picks: Mapping[Group, GgmlType],
        solution: Solution,
        used: Sequence[int],
        name: str,
        about: Mapping[str, str | int | float],
    ) -> Solved:
        total = sum((each.options[picks[each.group]] for each in self.groups), self.fixed)
        recipe = self._recipe(picks, name, {**about, **_about_error(total.error)})
        plan = self._plan(recipe)
        prices = dict(zip(used, solution.prices, strict=True))
        return Solved(
            plan,
            recipe,
            picks,
            total,
            plan.file_size,
            tuple(prices.get(at, 0.0) for at in range(_N_COSTS)),
            solution.bound + self.fixed.error,
            solution.is_optimal,
        )

    def _infeasible(self, budget: Budget, name: str, about: Mapping[str, str | int | float]) -> UsageError:
        """Return the error for a budget that nothing fits.

        It gives the least value of each budget, or says that each fits alone but not all together.
        """
        least = self.fixed
        for each in self.groups:
            every = each.options.values()
            least += Figures(
                min(figures.n_bytes for figures in every),
                min(figures.n_bytes_per_token for figures in every),
                min(figures.n_slow for figures in every),
                prompt=min(figures.prompt for figures in every),
                decode=min(figures.decode for figures in every),
            )
        # Rounded up, so that the figures shown are feasible.
        bits = math.ceil(800 * least.n_bytes / self.n_weights) / 100
        what = [f"{format_size(round_up(least.n_bytes))} of weights ({bits:.2f} bits each)"]
        fits = self.fits(least, budget)
        if budget.size is not None:
            picks = {each.group: next(iter(each.options)) for each in self.groups}
            # The header contains the error: one with all its digits makes it as long as in a written file.
            smallest = self._plan(self._recipe(picks, name, {**about, **_about_error(1.2345e-4)})).file_size
            if smallest > budget.size:
                what.insert(0, f"{format_size(round_up(smallest))} for a file")
                fits = False
        if budget.bytes_per_token is not None:
            what.append(f"{format_size(round_up(least.n_bytes_per_token))} read per token")
        if budget.slow_share is not None:
            percent = math.ceil(round(100 * least.n_slow / self.n_read, 6))
            what.append(f"{percent}% of the weights read without fast kernels")
        if budget.prompt_speed is not None and (speeds := self.speeds(least)):
            what.append(f"prompts at {math.floor(100 * speeds[0]) / 100:.2f} x the speed of {SPEED_BASE}")
        if fits:
            return UsageError(
                "no choice of types was found that fits all budgets at once",
                where=f"the least of each alone: {', '.join(what)}",
                remedy="allow more of one of them",
            )
        return UsageError(
            "no choice of types fits the budget", where=f"at least: {', '.join(what)}", remedy="allow more"
        )

    def fits(self, total: Figures, budget: Budget) -> bool:
        """True if the costs of all tensors are within each budget other than the file's size."""
        pairs = (
            (8 * total.n_bytes / self.n_weights, budget.bits_per_weight),
            (total.n_bytes_per_token, budget.bytes_per_token),
            (total.n_slow, None if budget.slow_share is None else budget.slow_share * self.n_read),
            (total.prompt, None if budget.prompt_speed is None else self._prompt_limit(budget)),
        )
        return all(limit is None or value <= limit for value, limit in pairs)

    def _recipe(
        self, picks: Mapping[Group, GgmlType], name: str, about: Mapping[str, str | int | float]
    ) -> LayeredRecipe:
        weights: Counter[GgmlType] = Counter()
        for each in self.groups:
            weights[picks[each.group]] += sum(tensor.n_weights for tensor in each.tensors)
        closest = closest_mix([max(weights, key=lambda kind: (weights[kind], -kind))]) if weights else "F16"
        types = _layered(picks)
        return LayeredRecipe(name, closest, types, RECIPE_FALLBACKS, about)

    def _plan(self, recipe: LayeredRecipe) -> Plan:
        return plan_file(self.file, self.hp, recipe, self.overrides, self.imatrix)


def _about_error(error: float) -> dict[str, float]:
    """Return what a recipe notes about its predicted error."""
    return {"predicted_error": float(f"{error:.4g}")}


def _costs(figures: Figures, used: Sequence[int]) -> tuple[int, ...]:
    """Return whole bytes, weights and picoseconds, rounded up, so that sums are never too small."""
    every = (figures.n_bytes, figures.n_bytes_per_token, figures.n_slow, figures.prompt)
    return tuple(-int(-every[at] // 1) for at in used)


def _layered(picks: Mapping[Group, GgmlType]) -> dict[str, dict[int | None, GgmlType]]:
    """Return picks in the form of a recipe's types."""
    kinds: dict[str, dict[int | None, GgmlType]] = {}
    for group, kind in sorted(picks.items(), key=lambda item: (item[0].kind, item[0].layer or 0)):
        kinds.setdefault(group.kind, {})[group.layer] = kind
    return {name: condensed(layers) for name, layers in kinds.items()}
