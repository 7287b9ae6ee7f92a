"""Named recipes: what they mean in models of any depth, and that a recipe file says the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.tiny_gguf import MOE, MOE_KINDS, NARROW, ODD

from dsmoe_local.model.file_type import FILE_TYPES
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.layout import tensor_specs, unquantized
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.choice import choose_types
from dsmoe_quantize.policy.named_recipes import RECIPES, NamedRecipe, TypeWords
from dsmoe_quantize.policy.recipe_file import parse_recipe, render_recipe
from dsmoe_quantize.policy.recipes import KINDS, LAYER_RULES, OTHERS, group_of, recipe_for
from dsmoe_quantize.policy.types import known_words, resolve, resolve_for

BIG = PRESETS["deepseekmoe-16b"].hp
DEPTHS = (1, 2, 6, 8, 28, 62)
EVERY = [pytest.param(recipe, id=name) for name, recipe in RECIPES.items()]


def layered(types: dict[str, TypeWords]) -> NamedRecipe:
    return NamedRecipe("mine", "a test", "Q4_K_M", {**types, "": "Q4_K"})


@pytest.mark.parametrize("recipe", EVERY)
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_tensor_has_a_type_at_every_depth(recipe: NamedRecipe, depth: int) -> None:
    """Guards: a word in the table that is no type, group or rule; a layer of which a recipe says nothing."""
    assert all(
        any(kind == key or kind.startswith(f"{key}-") or not key for kind in KINDS) for key in recipe.types
    )
    for hp in (MOE, NARROW, ODD, replace(MOE, tied_embeddings=True)):
        deep = replace(hp, n_layers=depth, n_dense_layers=min(hp.n_dense_layers, depth))
        chosen = choose_types(unquantized(deep, GgmlType.BF16), deep, recipe)
        assert len(chosen) == len(tensor_specs(deep))


@pytest.mark.parametrize("recipe", EVERY)
def test_a_recipe_file_says_the_same(recipe: NamedRecipe) -> None:
    """Guards: a file from --recipe-out that makes another model than the name."""
    for depth in DEPTHS:
        found = recipe_for(recipe, depth)
        again = parse_recipe(render_recipe(found), "test")
        assert again == found
        assert found.name == recipe.name
        assert found.file_type == FILE_TYPES[recipe.closest]


def test_layers_by_depth() -> None:
    """Guards: a rule that is one layer off, or that a model of another depth takes from this one."""
    recipe = layered({"attention-value": {"Q6_K": "first-eighth,last-eighth", "Q5_K": "others"}})
    types = recipe_for(recipe, 28).types
    assert types["attention-value"][OTHERS] is GgmlType.Q5_K
    assert set(types["attention-value"]) == {OTHERS, 0, 1, 2, 24, 25, 26, 27}
    assert types["attention-value"][27] is GgmlType.Q6_K
    assert types["attention-output"] == {OTHERS: GgmlType.Q4_K}
    assert recipe_for(recipe, 6).types["attention-value"] == {OTHERS: GgmlType.Q5_K, 5: GgmlType.Q6_K}


@pytest.mark.parametrize(
    ("rule", "layers"),
    [
        ("first-eighth", "0 1 2"),
        ("last-eighth", "24 25 26 27"),
        ("every-third", "2 5 8 11 14 17 20 23 26"),
        ("more-bits", "0 1 2 5 8 11 14 17 20 23 24 25 26 27"),
    ],
)
def test_rules_of_28_layers(rule: str, layers: str) -> None:
    """Guards: another share of the layers than the word says; llama.cpp's rule is the last."""
    assert " ".join(str(at) for at in range(28) if LAYER_RULES[rule](at, 28)) == layers


def test_where_two_rules_meet() -> None:
    """Guards: a type that depends on the order of a set."""
    recipe = layered({"routed": {"Q8_0": "last-eighth", "Q5_0": "every-third", "Q4_K": "others"}})
    types = recipe_for(recipe, 6).types["routed-down"]
    assert types == {2: GgmlType.Q5_0, 5: GgmlType.Q8_0, OTHERS: GgmlType.Q4_K}


def all_of(word: str) -> dict[str, set[str]]:
    return {kind: {word} for kind in MOE_KINDS}


LARGE_TYPES = {"embedding": {"Q6_K"}, "output": {"Q6_K"}, "dense-down": {"Q8_0"}}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("q8", all_of("Q8_0")),
        (
            "q4",
            all_of("Q6_K")
            | LARGE_TYPES
            | {kind: {"Q5_K"} for kind in ("attention-output", "dense-gate-up")}
            | {kind: {"IQ4_NL"} for kind in ("shared-gate-up", "shared-down")}
            | {"routed-gate-up": {"IQ4_XS"}, "routed-down": {"Q4_0"}},
        ),
        (
            "q4-fast",
            all_of("IQ4_XS")
            | LARGE_TYPES
            | {kind: {"Q5_K"} for kind in ("attention-query-key", "attention-value", "dense-gate-up")}
            | {"routed-down": {"Q4_0"}},
        ),
        ("q4-small", all_of("Q5_K") | LARGE_TYPES | {"routed-gate-up": {"Q3_K"}, "routed-down": {"IQ4_NL"}}),
    ],
)
def test_types_of_the_16b_model(word: str, expected: dict[str, set[str]]) -> None:
    """Guards: a group that gets another type than the table says, in any layer."""
    found: dict[str, set[str]] = {}
    for choice in choose_types(unquantized(BIG, GgmlType.BF16), BIG, resolve(word)):
        group = group_of(choice.name, MOE)
        if group is not None:
            found.setdefault(group.kind, set()).add(choice.type.name)
    assert found == expected


def test_experts_that_256_divides() -> None:
    """Guards: slow types for models whose experts could have tiled products."""
    hp = replace(BIG, expert_size=1536)
    found = {
        word: {
            choice.type.name
            for choice in choose_types(unquantized(hp, GgmlType.BF16), hp, resolve(word))
            if choice.name.endswith("ffn_down_exps.weight")
        }
        for word in ("q4", "q4-fast", "q4-small")
    }
    assert found == {"q4": {"Q4_K"}, "q4-fast": {"IQ4_XS"}, "q4-small": {"Q4_K"}}


BARS = {"q4": (0.92, 0.96), "q4-fast": (0.87, 0.9), "q4-small": (0.8, 0.9)}


@pytest.mark.parametrize("word", BARS)
def test_budgets_of_the_16b_model(word: str) -> None:
    """Guards: a recipe that is larger, or reads more for a token, than it promises beside Q4_K_M."""
    size, per_token = (
        ours / theirs for ours, theirs in zip(weight_of(word), weight_of("Q4_K_M"), strict=True)
    )
    assert size <= BARS[word][0]
    assert per_token <= BARS[word][1]


def weight_of(word: str) -> tuple[float, float]:
    """Bytes of all weights, and of those that a token reads: 6 of 64 routed experts, and no embedding."""
    size = per_token = 0.0
    for choice in choose_types(unquantized(BIG, GgmlType.BF16), BIG, resolve(word)):
        size += choice.n_bytes
        share = {"_exps.weight": 6 / 64, "token_embd.weight": 0.0}
        fraction = next((part for end, part in share.items() if choice.name.endswith(end)), 1.0)
        per_token += choice.n_bytes * fraction
    return size, per_token


@pytest.mark.parametrize(
    ("word", "n_bytes"),
    [("q8", 17_409_949_696), ("q4", 9_142_943_744), ("q4-fast", 9_063_202_816), ("q4-small", 8_142_405_632)],
)
def test_bytes_of_the_16b_model(word: str, n_bytes: int) -> None:
    """Guards: a type that changes by accident: what the README says of q4."""
    chosen = choose_types(unquantized(BIG, GgmlType.BF16), BIG, resolve(word))
    assert sum(choice.n_bytes for choice in chosen) == n_bytes


def test_words_follow_from_the_table() -> None:
    """Guards: a recipe that --type does not know, or that is not said to be known."""
    assert known_words()[: len(RECIPES)] == list(RECIPES)
    for name in RECIPES:
        assert resolve_for(resolve(name.upper()), MOE).name == name
