"""Recipes, budgets and costs of errors for every architecture: other attention, layers that are not run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.imatrices import random_imatrix
from support.mix_models import MIX_MODELS
from support.tiny_gguf import MOE, MOE_KINDS, write_tiny

from dsmoe_local.evaluate.error_cost_groups import trials_of
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import unquantized
from dsmoe_quantize.budget.cost_model import Budget, CostModel
from dsmoe_quantize.budget.explanation import reasons, stated_reasons, trade_offs
from dsmoe_quantize.budget.sensitivity import measure
from dsmoe_quantize.budget.sensitivity_file import start
from dsmoe_quantize.policy.choice import Overrides, choose_types, may_change, parse_override
from dsmoe_quantize.policy.named_recipes import RECIPES
from dsmoe_quantize.policy.plan import plan_types
from dsmoe_quantize.policy.recipe_file import parse_recipe, render_recipe
from dsmoe_quantize.policy.recipes import Group, LayeredRecipe, group_of, recipe_for
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_file

OF_16B = "\n".join(
    [
        'format = 1\nname = "mine"\n[types]',
        *(f'{kind} = "Q5_K"' for kind in MOE_KINDS),
        'attention-value = "Q6_K"',
    ]
).replace('attention-value = "Q5_K"\n', "")
Q8_0 = GgmlType.Q8_0
LITE = MIX_MODELS["deepseek2 lite"]


@pytest.fixture(scope="module", params=MIX_MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    hp = MIX_MODELS[request.param]
    # Depth costs the solver most; a model without a query rank needs 27 layers.
    shallow = hp if hp is LITE else replace(hp, n_layers=3, n_dense_layers=min(1, hp.n_dense_layers))
    return write_tiny(tmp_path_factory.mktemp("model") / "m.gguf", shallow)


@pytest.mark.parametrize("word", RECIPES)
def test_every_matrix_has_its_type(model: Path, word: str) -> None:
    """A matrix that a recipe leaves out; a reason that counts a tensor twice."""
    file, hp = read_model(model)
    plan = plan_file(file, hp, resolve(word))
    for choice in plan.choices:
        assert choice.changes == may_change(choice)
    stated = stated_reasons(plan)
    assert sum(each.n_bytes for each in stated) == sum(
        choice.n_bytes for choice in plan.choices if may_change(choice)
    )


def test_a_recipe_of_the_first_architecture_applies(model: Path) -> None:
    """A recipe made before there were more kinds of groups, refused or applied to some tensors only."""
    file, hp = read_model(model)
    recipe = parse_recipe(OF_16B, "test")
    for choice in plan_file(file, hp, recipe).choices:
        if choice.name.endswith(("attn_v.weight", "attn_qkv.weight", "attn_v_b.weight")):
            expected = GgmlType.Q6_K
        else:
            expected = GgmlType.Q5_K
        assert not may_change(choice) or choice.misfit or choice.type is expected, choice.name


@pytest.mark.parametrize("with_matrix", [False, True])
def test_budgets_hold(model: Path, with_matrix: bool) -> None:
    """A group whose tensors share no type; heads with the importance of others."""
    file, hp = read_model(model)
    imatrix = random_imatrix(hp) if with_matrix else None
    known = measure(file, start(file, imatrix, 2000), imatrix)
    costs = CostModel(file, hp, known, imatrix=imatrix)
    assert all(each.options for each in costs.groups)
    solved = costs.solve(Budget(bits_per_weight=6.0), "mine", quick=True)
    assert solved.plan.bits_per_weight <= 6.0
    again = parse_recipe(render_recipe(solved.recipe), "test")
    assert [each.type for each in plan_file(file, hp, again).choices] == [
        each.type for each in solved.plan.choices
    ]
    assert {each.kind for each in reasons(costs, solved)} == {each.group.kind for each in costs.groups}
    assert {"this recipe", *RECIPES} <= {
        line.label for line in trade_offs(costs, solved, Budget(bits_per_weight=6.0))
    }


def test_every_matrix_is_tried_once(model: Path) -> None:
    """A matrix whose errors are never measured, or that two groups change."""
    file, hp = read_model(model)
    known = measure(file, start(file, None, 2000))
    expected = sorted(
        tensor.name for tensor in file.tensors.values() if may_change(tensor) and tensor.shape[-1] % 32 == 0
    )
    for by_layer in (False, True):
        trials = trials_of(file, hp, known, (Q8_0,), by_layer=by_layer)
        choices = [choice for trial in trials if trial.plans for choice in trial.plans[Q8_0].choices]
        assert sorted(choice.name for choice in choices if choice.changes) == expected


def chosen(hp: Hyperparameters, *overrides: str) -> dict[str, GgmlType]:
    given = Overrides(tensors=tuple(parse_override(text) for text in overrides))
    tensors = unquantized(hp, GgmlType.BF16)
    plan = plan_types(tensors, hp, resolve("q4"), given)
    recorded = plan.record.type
    assert isinstance(recorded, LayeredRecipe)
    again = choose_types(tensors, hp, parse_recipe(render_recipe(recorded), "test"))
    assert [each.type for each in again] == [each.type for each in plan.choices]
    return {each.name: each.type for each in plan.choices}


def test_overridden_queries_change_nothing_else() -> None:
    """A recipe in a file whose compressed keys follow the queries that an option changed."""
    types = chosen(LITE, r"blk\.\d+\.attn_q\.weight=q8_0")
    assert types["blk.3.attn_q.weight"] is Q8_0
    assert types["blk.3.attn_kv_a_mqa.weight"] is GgmlType.Q6_K
    assert chosen(LITE, r".*attn_k_b.*=f16")["blk.3.attn_k_b.weight"] is GgmlType.F16


def test_layers_for_multi_token_prediction_follow_the_last(tmp_path: Path) -> None:
    """A layer of its own in recipes, that no solver can weigh and no token reads."""
    hp = MIX_MODELS["glm4moe"]
    with_layer, without = (
        plan_file(*read_model(write_tiny(tmp_path / f"{each.n_mtp_layers}.gguf", each)), resolve("q4"))
        for each in (hp, replace(hp, n_mtp_layers=0))
    )
    first, last = hp.n_layers, hp.n_layers - 1
    assert group_of(f"blk.{first}.attn_v.weight", with_layer.hp) == Group("attention-value", last)
    assert with_layer.n_bytes > without.n_bytes
    assert with_layer.n_bytes_per_token == without.n_bytes_per_token


def test_recipes_of_the_16b_stay_as_they_are() -> None:
    """More words in the metadata of files that do not need them."""
    for recipe in RECIPES.values():
        text = render_recipe(recipe_for(recipe, MOE.n_layers))
        assert not re.search(r"latent|key-up|query-key-value", text)
