"""From budgets to files: never exceeded, used up, and no named type is better for the same size."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from gguf.constants import GGUFValueType
from support.imatrices import random_imatrix
from support.tiny_gguf import DENSE, FOUR_LAYERS, MOE, NARROW, ODD, write_tiny

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import parse_size
from dsmoe_local.model.file_type import RECIPE_KEY
from dsmoe_local.model.ggml import GgmlType, bits_per_weight
from dsmoe_local.model.gguf_file import Field, GgufFile, GgufPart, TensorInfo, read_gguf
from dsmoe_local.model.gguf_model import metadata_of, read_model
from dsmoe_local.model.gguf_writer import ARCHITECTURE_KEY
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, role_of, unquantized
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.budget import cost_model
from dsmoe_quantize.budget.cost_model import Budget, CostModel
from dsmoe_quantize.budget.error_weights import WEIGHTS
from dsmoe_quantize.budget.explanation import reasons, trade_offs
from dsmoe_quantize.budget.kernel_speeds import CPUS, is_fast, speed_of, this_cpu
from dsmoe_quantize.budget.sensitivity import Sensitivity, TensorErrors, candidates, measure
from dsmoe_quantize.budget.sensitivity_file import start
from dsmoe_quantize.policy.choice import Overrides, choose_types, may_change, parse_override
from dsmoe_quantize.policy.mixes import MIXES
from dsmoe_quantize.policy.recipe_file import parse_recipe, render_recipe
from dsmoe_quantize.policy.recipes import Group
from dsmoe_quantize.quantize import Plan, quantize_file

BIG = PRESETS["deepseekmoe-16b"].hp


def costs_of(path: Path, overrides: Overrides | None = None, cpu: str = "none") -> CostModel:
    file, hp = read_model(path)
    return CostModel(file, hp, measure(file, start(file, None, 20000)), overrides=overrides, cpu=cpu)


def shaped(hp: Hyperparameters, cpu: str = "x86-avx2") -> CostModel:
    """A model of this shape without any weights; errors fall fourfold with each bit."""
    tensors = {
        each.name: TensorInfo(each.name, each.shape, each.type, 0) for each in unquantized(hp, GgmlType.BF16)
    }
    metadata = {ARCHITECTURE_KEY: Field(hp.architecture, GGUFValueType.STRING), **metadata_of(hp)}
    file = GgufFile(metadata, tensors, 32, (GgufPart(Path("shape.gguf"), 0, (0, 0, 0)),))
    errors = {
        name: TensorErrors(
            each.n_weights,
            each.n_weights,
            float(each.n_weights),
            {kind: each.n_weights * 1.5 * 4 ** -bits_per_weight(kind) for kind in candidates(each)},
        )
        for name, each in tensors.items()
        if may_change(each)
    }
    return CostModel(file, hp, Sensitivity("", "", "", 0, errors), cpu=cpu)


def slow_weights(costs: CostModel, plan: Plan) -> float:
    """Weights that a token reads in types without fast kernels, of a model whose embedding is not its output;
    counted from the plan.
    """
    parts = {
        Role.ROUTED_EXPERT: costs.hp.n_experts_per_token / costs.hp.n_routed_experts,
        Role.EMBEDDING: 1 / costs.hp.n_vocab,
    }
    return sum(
        math.prod(each.shape) * parts.get(role, 1.0)
        for each in plan.choices
        if (role := role_of(each.name)) not in (None, Role.NORM, Role.ROUTER)
        and not is_fast(costs.cpu, each.type, each.shape)
    )


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> CostModel:
    return costs_of(
        write_tiny(tmp_path_factory.mktemp("model") / "tiny-BF16.gguf", FOUR_LAYERS), cpu="x86-avx2"
    )


@pytest.mark.parametrize("bits", [4.6, 5.0, 5.7, 7.3])
def test_files_land_below_the_target(moe: CostModel, tmp_path: Path, bits: float) -> None:
    """Guards: a header, padding or a norm that is not counted; metadata that exceed the size."""
    size = int(moe.n_weights * bits / 8) + 15000
    solved = moe.solve(Budget(size=size), "small")
    quantize_file(solved.plan, tmp_path / "out.gguf")
    real = (tmp_path / "out.gguf").stat().st_size
    assert real == solved.file_size
    assert 0.99 * size < real <= size
    file = read_gguf(tmp_path / "out.gguf")
    assert parse_recipe(file.get(RECIPE_KEY), "metadata") == solved.recipe
    assert {name: tensor.type for name, tensor in file.tensors.items()} == {
        each.name: each.type for each in solved.plan.choices
    }


def test_every_budget_holds(moe: CostModel) -> None:
    """Guards: one budget that is forgotten when another is given, or that is compared in other units."""
    for bits in (4.7, 6.0):
        alone = moe.solve(Budget(bits_per_weight=bits), "x")
        assert alone.plan.bits_per_weight <= bits
        read = int(alone.plan.n_bytes_per_token * 0.97)
        both = moe.solve(Budget(bits_per_weight=bits, bytes_per_token=read), "x")
        assert both.plan.bits_per_weight <= bits
        assert both.plan.n_bytes_per_token <= read
        assert both.total.error >= alone.bound
        assert both.total.n_slow == pytest.approx(slow_weights(moe, both.plan))
        slow = slow_weights(moe, both.plan) / moe.n_read * 0.8
        all_three = moe.solve(Budget(bits_per_weight=bits, bytes_per_token=read, slow_share=slow), "x")
        assert 0 < slow_weights(moe, all_three.plan) <= slow * moe.n_read
        assert all_three.plan.bits_per_weight <= bits
        assert all_three.plan.n_bytes_per_token <= read


def predicted_speeds(costs: CostModel, plan: Plan) -> tuple[float, float]:
    """Speeds against Q4_K_M, counted from the table of speeds: prompts leave out the output."""
    times = []
    for choices in (
        choose_types(unquantized(costs.hp, GgmlType.BF16), costs.hp, MIXES["Q4_K_M"]),
        plan.choices,
    ):
        prompt = decode = 0.0
        for each in choices:
            role = role_of(each.name)
            if role in (None, Role.NORM, Role.ROUTER, Role.EMBEDDING):
                continue
            speed = speed_of(costs.cpu, each.type, each.shape)
            assert speed is not None
            part = costs.hp.n_experts_per_token / costs.hp.n_routed_experts
            weights = math.prod(each.shape) * (part if role is Role.ROUTED_EXPERT else 1)
            decode += weights * speed.decode
            prompt += 0 if role is Role.OUTPUT else weights * speed.prompt
        times.append((prompt, decode))
    return times[0][0] / times[1][0], times[0][1] / times[1][1]


def test_prompts_are_as_fast_as_asked_for(moe: CostModel) -> None:
    """Guards: a speed that counts all experts, or the output; a budget that is not kept."""
    free = moe.solve(Budget(bits_per_weight=5.5), "x")
    speeds = moe.speeds(free.total)
    assert speeds is not None
    assert speeds == pytest.approx(predicted_speeds(moe, free.plan), rel=1e-3)
    wanted = 1.1 * speeds[0]
    solved = moe.solve(Budget(bits_per_weight=5.5, prompt_speed=wanted), "x")
    assert predicted_speeds(moe, solved.plan)[0] >= wanted * 0.999
    assert solved.total.error >= free.total.error
    with pytest.raises(UsageError, match="fits the budget") as caught:
        moe.solve(Budget(prompt_speed=9), "x")
    assert "x the speed of Q4_K_M" in caught.value.where
    unknown = CostModel(moe.file, moe.hp, moe.sensitivity, cpu="arm-dotprod")
    with pytest.raises(UsageError, match="are not known"):
        unknown.solve(Budget(prompt_speed=1), "x")


def test_totals_are_those_of_the_plan(moe: CostModel) -> None:
    """Guards: a recipe that says something else than what was solved."""
    solved = moe.solve(Budget(bits_per_weight=5.1), "x")
    again = moe.figures(solved.plan.choices)
    assert again.n_bytes == solved.total.n_bytes
    assert again.error == pytest.approx(solved.total.error)
    assert solved.total.n_slow == pytest.approx(slow_weights(moe, solved.plan))
    assert solved.plan.n_bytes_per_token == pytest.approx(again.n_bytes_per_token)
    assert not any(each.misfit for each in solved.plan.choices)


@pytest.mark.parametrize("word", ["Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q5_K_M"])
def test_no_mix_is_better(moe: CostModel, word: str) -> None:
    """Guards: a solver that misses what llama.cpp's own mixes have found, at their size and speed."""
    tensors = list(moe.file.tensors.values())
    mix = moe.figures(choose_types(tensors, moe.hp, MIXES[word]))
    budget = Budget(
        bits_per_weight=8 * mix.n_bytes / moe.n_weights, bytes_per_token=int(mix.n_bytes_per_token) + 1
    )
    assert moe.solve(budget, "x").total.error <= mix.error * 1.0001


def test_16b() -> None:
    """The shape that this is for: 279 matrices, widths that 256 does not divide, and 9.5 GB."""
    costs = shaped(BIG)
    budget = Budget(size=9_500_000_000, bytes_per_token=1_700_000_000)
    solved = costs.solve(budget, "9.5GB")
    assert 0.99 * 9.5e9 < solved.file_size <= 9.5e9 or solved.plan.n_bytes_per_token > 0.99 * 1.7e9
    assert solved.file_size <= 9.5e9
    assert solved.plan.n_bytes_per_token <= 1.7e9
    assert solved.bound <= solved.total.error <= solved.bound * 1.01
    assert len(render_recipe(solved.recipe)) < 5000
    for each in solved.plan.choices:
        if each.type in (GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K, GgmlType.IQ4_XS):
            assert each.shape[-1] % 256 == 0
    assert solved.recipe == costs.solve(budget, "9.5GB").recipe, "the same input, the same recipe"
    by_name = {each.label: each for each in trade_offs(costs, solved, budget)}
    assert by_name["Q4_K_M"].total.n_bytes / 1e9 == pytest.approx(10.84, abs=0.01)
    assert by_name["Q4_K_M"].total.n_bytes_per_token / 1e9 == pytest.approx(1.73, abs=0.01)
    assert (
        by_name["5% less"].total.error > by_name["this recipe"].total.error > by_name["5% more"].total.error
    )
    assert by_name["up to 25% slow"].slow_share <= 0.25
    by_hand = slow_weights(costs, solved.plan) / costs.n_read
    assert by_name["this recipe"].slow_share == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("hp", "dtype"), [(NARROW, "f32"), (ODD, "bf16"), (DENSE, "f16")], ids=["narrow", "odd", "dense"]
)
def test_other_shapes(tmp_path: Path, hp: Hyperparameters, dtype: str) -> None:
    """Guards: a tied embedding, columns that take no block, a model without experts."""
    costs = costs_of(
        write_tiny(
            tmp_path / "model.gguf", replace(hp, n_layers=3, n_dense_layers=min(hp.n_dense_layers, 3)), dtype
        )
    )
    solved = costs.solve(Budget(bits_per_weight=7.5), "x")
    quantize_file(solved.plan, tmp_path / "out.gguf")
    assert solved.plan.bits_per_weight <= 7.5
    for each in solved.plan.choices:
        if role_of(each.name) in (Role.NORM, Role.ROUTER):
            assert each.type is GgmlType.F32
    kinds = {each.name: each.type for each in solved.plan.choices}
    if hp is ODD:
        assert kinds["blk.1.ffn_down_exps.weight"] is GgmlType.BF16, "no block fits, and BF16 loses nothing"


def test_overrides_are_kept_and_counted(tmp_path: Path) -> None:
    """Guards: an override that the solver outweighs, or whose bytes it does not count."""
    path = write_tiny(tmp_path / "model.gguf", FOUR_LAYERS)
    overrides = Overrides(
        tensors=(parse_override(r"blk\.[12]\.attn_q\.weight=q8_0"),), output=GgmlType.F16, embedding=None
    )
    costs = costs_of(path, overrides)
    solved = costs.solve(Budget(bits_per_weight=5.2), "x")
    kinds = {each.name: each.type for each in solved.plan.choices}
    assert kinds["output.weight"] is GgmlType.F16
    assert kinds["blk.1.attn_q.weight"] is kinds["blk.2.attn_q.weight"] is GgmlType.Q8_0
    assert kinds["blk.1.attn_k.weight"] is solved.picks[Group("attention-query-key", 1)]
    assert solved.plan.bits_per_weight <= 5.2
    assert {each.why for each in reasons(costs, solved)} >= {"--tensor-type", "--output-type"}


@pytest.mark.parametrize(
    ("budget", "cpu"),
    [
        (Budget(size=10), "x86-avx2"),
        (Budget(bits_per_weight=3.0), "x86-avx2"),
        (Budget(bits_per_weight=5.0, bytes_per_token=1), "x86-avx2"),
        (Budget(bits_per_weight=8.0, slow_share=0.5), "none"),
    ],
)
def test_nothing_fits(budget: Budget, cpu: str) -> None:
    """Guards: a file that is larger than asked for; a refusal that does not say how far off it is."""
    with pytest.raises(UsageError, match="fits the budget") as caught:
        shaped(replace(BIG, n_layers=4), cpu).solve(budget, "x")
    assert "bits each" in caught.value.where


@pytest.mark.parametrize("large", [False, True])
def test_the_least_size_can_be_asked_for(large: bool, moe: CostModel) -> None:
    """Guards: "at least" without the header, which no target of that size meets; or far too much."""
    costs = shaped(replace(BIG, n_layers=4), "x86-avx2") if large else moe
    with pytest.raises(UsageError) as caught:
        costs.solve(Budget(size=10), "x")
    said = re.search(r"at least: (\S+ [KMG]?B) for a file, ", caught.value.where)
    assert said is not None
    least = parse_size(said[1])
    assert costs.solve(Budget(size=least), "x").file_size <= least
    with pytest.raises(UsageError):
        costs.solve(Budget(size=int(least * 0.98)), "x")


def test_a_size_that_is_enough_is_not_blamed(moe: CostModel) -> None:
    """Guards: a remedy for what is not wrong."""
    with pytest.raises(UsageError) as caught:
        moe.solve(Budget(size=10**12, bytes_per_token=1), "x")
    assert "for a file" not in caught.value.where
    assert "read per token" in caught.value.where


def test_budgets_that_do_not_go_together(moe: CostModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: "at least" so much said of budgets that are larger than that."""
    monkeypatch.setattr(cost_model, "solve", lambda *_, **__: None)
    with pytest.raises(UsageError, match="all budgets at once") as caught:
        moe.solve(Budget(size=10**12, bits_per_weight=8, bytes_per_token=10**9), "x")
    assert "the least of each alone" in caught.value.where
    with pytest.raises(UsageError, match="fits the budget"):
        moe.solve(Budget(size=10**12, bits_per_weight=8, bytes_per_token=1), "x")


def test_a_step_gives_what_the_recipe_gives_at_least(moe: CostModel) -> None:
    """Guards: a looser budget that is shown to give worse than the recipe, which is within it, too."""
    solved = moe.solve(Budget(bits_per_weight=5.0, slow_share=0.2), "x")
    shown = {each.label: each for each in trade_offs(moe, solved, Budget(bits_per_weight=5.0))}
    for label in ("up to 25% slow", "up to 50% slow", "5% more", "10% more"):
        assert shown[label].total.error <= solved.total.error


def test_measured_weights_count(moe: CostModel) -> None:
    """Guards: measured costs of errors that change nothing, or that apply to another group."""
    file, hp = moe.file, moe.hp
    known = measure(file, start(file, None, 20000))
    heavy = CostModel(file, hp, replace(known, weights={"routed-down.3": 500.0, "shared-down": 0.0}))
    before, after = (each.solve(Budget(bits_per_weight=5.0), "x").picks for each in (moe, heavy))
    group = Group("routed-down", 3)
    assert bits_per_weight(after[group]) > bits_per_weight(before[group])
    smallest = min(bits_per_weight(kind) for kind in moe.groups[-1].options)
    assert all(bits_per_weight(kind) < 4.6 for each, kind in after.items() if each.kind == "shared-down")
    assert smallest < 5


def test_measured_weights_of_some_kinds(moe: CostModel) -> None:
    """Guards: kinds that were measured beside others with costs of another model, a thousand times smaller:
    all bytes go to the former.
    """
    known = measure(moe.file, start(moe.file, None, 20000))
    some = ("output", "shared-down", "attention-value")
    larger = {kind: 1000 * WEIGHTS[kind] for kind in some}
    half = CostModel(moe.file, moe.hp, replace(known, weights=larger), cpu="x86-avx2")
    assert str(half.error_weights) == "measured for 3 of 11 kinds"
    budget = Budget(bits_per_weight=5.0)
    before, after = moe.solve(budget, "x"), half.solve(budget, "x")
    assert after.picks == before.picks
    assert after.total.error == pytest.approx(1000 * before.total.error)


def test_importance_changes_choices(tmp_path: Path) -> None:
    """Guards: an importance matrix that only the encoder hears of."""
    path = write_tiny(tmp_path / "model.gguf", replace(MOE, n_layers=3))
    file, hp = read_model(path)
    imatrix = random_imatrix(replace(MOE, n_layers=3))
    costs = CostModel(file, hp, measure(file, start(file, imatrix, 0), imatrix), imatrix=imatrix)
    plain = costs_of(path)
    budget = Budget(bits_per_weight=5.0)
    solved = costs.solve(budget, "x")
    assert solved.plan.imatrix is imatrix
    assert solved.total.error != plain.solve(budget, "x").total.error


def test_every_group_is_explained(moe: CostModel) -> None:
    """Guards: a group without a reason, an alternative that is none, ratios in the wrong direction."""
    solved = moe.solve(Budget(bits_per_weight=5.0), "x")
    found = reasons(moe, solved)
    assert {(each.kind, each.type) for each in found} == {
        (group.kind, kind) for group, kind in solved.picks.items()
    }
    assert sum(each.error_share or 0.0 for each in found) == pytest.approx(1)
    assert all(each.why for each in found)
    for each in found:
        assert f"{each.type.name} saves" not in each.why
        assert f"{each.type.name} costs" not in each.why
        if each.kind == "routed-down":
            assert "96 columns are not a multiple of 256" in each.why


def test_fast_kernels() -> None:
    """Guards: rows that the kernels cannot interleave; the list of this machine's kind."""
    assert is_fast("x86-avx2", GgmlType.IQ4_NL, (64, 2048, 1408))
    assert not is_fast("x86-avx2", GgmlType.IQ4_NL, (2047, 1408))
    assert is_fast("x86-avx2", GgmlType.Q4_K, (1407, 2048))
    assert not is_fast("x86-avx2", GgmlType.Q5_0, (1408, 2048))
    assert is_fast("arm-dotprod", GgmlType.Q5_K, (1408, 2048))
    assert not is_fast("none", GgmlType.Q4_0, (1408, 2048))
    assert this_cpu() in CPUS
