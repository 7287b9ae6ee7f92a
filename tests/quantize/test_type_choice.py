"""Words, overrides and our own recipes: what each tensor gets, and what a person is told about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_gguf import MOE, NARROW, ODD

from dsmoe_local.base.errors import UsageError
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import UNQUANTIZED_ROLES, role_of, unquantized
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.choice import Overrides, TensorChoice, choose_types, fallback_notes, parse_override
from dsmoe_quantize.policy.types import known_words, parse_target, resolve
from dsmoe_quantize.quantize import default_output

BIG = PRESETS["deepseekmoe-16b"].hp


def choose(hp: Hyperparameters, word: str, overrides: Overrides | None = None) -> dict[str, TensorChoice]:
    tensors = unquantized(hp, GgmlType.BF16)
    return {each.name: each for each in choose_types(tensors, hp, resolve(word), overrides)}


def gigabytes(hp: Hyperparameters, word: str) -> float:
    return sum(each.n_bytes for each in choose(hp, word).values()) / 1e9


@pytest.mark.parametrize(
    ("word", "size"),
    [
        ("Q4_K_M", 10.846),
        ("Q4_K_S", 9.932),
        ("IQ4_XS", 9.005),
        ("Q4_0", 9.278),
        ("Q8_0", 17.410),
        ("q8", 17.410),
    ],
)
def test_sizes_of_the_16b_model(word: str, size: float) -> None:
    """Published sizes of the 16B model in llama.cpp's types: a rule that differs shows as bytes."""
    # They include a header of some 5 MB.
    assert gigabytes(BIG, word) == pytest.approx(size, abs=0.01)


def test_q4_of_the_16b_model() -> None:
    """A tensor that gets another type than docs/quantization.md says."""
    chosen = choose(BIG, "q4")
    assert {
        name: chosen[name].type.name for name in chosen if not name.startswith("blk.") or ".1." in name
    } == {
        "token_embd.weight": "Q6_K",
        "output.weight": "Q6_K",
        "output_norm.weight": "F32",
        "blk.1.attn_norm.weight": "F32",
        "blk.1.attn_q.weight": "Q6_K",
        "blk.1.attn_k.weight": "Q6_K",
        "blk.1.attn_v.weight": "Q6_K",
        "blk.1.attn_output.weight": "Q5_K",
        "blk.1.ffn_norm.weight": "F32",
        "blk.1.ffn_gate_inp.weight": "F32",
        "blk.1.ffn_gate_exps.weight": "IQ4_XS",
        "blk.1.ffn_up_exps.weight": "IQ4_XS",
        "blk.1.ffn_down_exps.weight": "Q4_0",
        "blk.1.ffn_gate_shexp.weight": "IQ4_NL",
        "blk.1.ffn_up_shexp.weight": "IQ4_NL",
        "blk.1.ffn_down_shexp.weight": "IQ4_NL",
    }
    assert chosen["blk.0.ffn_up.weight"].type.name == "Q5_K"
    assert chosen["blk.0.ffn_down.weight"].type.name == "Q8_0"
    notes = "\n".join(fallback_notes(list(chosen.values())))
    assert "1408 columns" in notes
    assert "27 tensors in Q4_0" in notes
    assert "10944 columns" in notes


def test_q4_falls_back_where_256_does_not_divide() -> None:
    """A fallback that is silent, or not the recipe's own."""
    chosen = choose(NARROW, "q4")
    assert chosen["blk.1.ffn_up_exps.weight"].type is GgmlType.IQ4_NL
    assert chosen["blk.1.attn_output.weight"].type is GgmlType.Q5_1
    assert chosen["token_embd.weight"].type is GgmlType.Q8_0, "the embedding is the output here"
    notes = fallback_notes(list(chosen.values()))
    assert any("576 columns are not a multiple of 256" in note and "IQ4_NL" in note for note in notes)
    assert any("which Q6_K needs" in note and "Q8_0" in note for note in notes)


def test_no_block_fits() -> None:
    """Columns that not even 32 divides."""
    for word in ("q4", "q8", "Q4_K_M", "IQ4_XS", "Q4_0"):
        assert choose(ODD, word)["blk.1.ffn_down_exps.weight"].type is GgmlType.F16


@pytest.mark.parametrize("word", [*known_words(), *map(str.swapcase, known_words())])
def test_norms_and_routers_stay(word: str) -> None:
    """A quantized router gives garbage."""
    for name, choice in choose(MOE, word).items():
        if role_of(name) in UNQUANTIZED_ROLES:
            assert choice.type is GgmlType.F32


def test_words() -> None:
    """An alias that goes astray; our q4 taken for a type of llama.cpp's."""
    assert resolve("q4_k").name == resolve("Q4_K_M").name == "Q4_K_M"
    assert resolve("Q5_K").name == "Q5_K_M"
    assert resolve("Q4").name == "q4"
    with pytest.raises(UsageError, match="'q9' is not a type") as caught:
        resolve("q9")
    shown = f"{caught.value.where} {caught.value.remedy}"
    assert all(word in shown for word in known_words())


def test_overrides() -> None:
    """The order of precedence; a pattern that matches a part of a name."""
    overrides = Overrides(
        tensors=(
            parse_override(r"blk\.1\.attn_v\.weight=q8_0"),
            parse_override(r"blk\..*attn_v\.weight=q5_k"),
            parse_override(r"blk\..*=F16"),
            parse_override(r".*=q4_1"),
        ),
        output=GgmlType.Q5_1,
        embedding=GgmlType.BF16,
    )
    chosen = choose(MOE, "q4", overrides)
    assert chosen["blk.1.attn_v.weight"].type is GgmlType.Q8_0
    assert chosen["blk.2.attn_v.weight"].type is GgmlType.Q5_K
    assert chosen["blk.2.attn_q.weight"].type is GgmlType.F16
    assert chosen["output.weight"].type is GgmlType.Q5_1
    assert chosen["token_embd.weight"].type is GgmlType.BF16
    assert chosen["blk.2.ffn_gate_inp.weight"].type is GgmlType.F32
    assert choose(MOE, "bf16", overrides)["blk.1.attn_v.weight"].type is GgmlType.Q8_0
    tied = replace(MOE, tied_embeddings=True)
    assert choose(tied, "q4", Overrides(output=GgmlType.Q5_1))["token_embd.weight"].type is GgmlType.Q5_1


@pytest.mark.parametrize(
    "pattern", ["attn_v=q8_0", r"blk\.\d+\.ffn_gate_inp\.weight=q8_0", r"blk\.99\..*=q8_0", r".*norm.*=f16"]
)
def test_pattern_without_effect(pattern: str) -> None:
    """A typing error that is ignored."""
    with pytest.raises(UsageError, match="matches no tensor"):
        choose(MOE, "q4", Overrides(tensors=(parse_override(pattern),)))


@pytest.mark.parametrize(
    "text", ["attn_v", "=q8_0", "attn_v=", "attn_v=q9", "(=q8_0", "x=q2_k", "x=i32", "x=q4"]
)
def test_malformed_override(text: str) -> None:
    """A traceback from re, or a type that nothing can be encoded in."""
    with pytest.raises(UsageError):
        parse_override(text)


def test_pure() -> None:
    """One type for all, and no recipe."""
    kinds = Counter(choice.type.name for choice in choose(MOE, "q5_0", Overrides(pure=True)).values())
    assert set(kinds) == {"F32", "Q5_0"}
    with pytest.raises(UsageError, match="recipe"):
        choose(MOE, "q4", Overrides(pure=True))


def test_targets() -> None:
    """A type that needs an importance matrix aborts the process in ggml."""
    assert parse_target("iq4_xs") is GgmlType.IQ4_XS
    for word in ("iq2_xxs", "q8_k", "i8", "mxfp4", "nonsense"):
        with pytest.raises(UsageError):
            parse_target(word)


@pytest.mark.parametrize(
    ("source", "word", "out"),
    [
        ("/models/deepseek-moe-16b-BF16.gguf", "q4_k", "deepseek-moe-16b-Q4_K_M.gguf"),
        ("x-f16.gguf", "q4", "x-q4.gguf"),
        ("x.q8_0.gguf", "Q4", "x-q4.gguf"),
        ("plain.gguf", "BF16", "plain-BF16.gguf"),
        ("q4.gguf", "q8", "q4-q8.gguf"),
        ("-q4.gguf", "q8", "-q4-q8.gguf"),
    ],
)
def test_default_output(source: str, word: str, out: str) -> None:
    """A name that piles up types, or lands beside the source instead of here."""
    assert default_output(Path(source), resolve(word), Overrides()) == Path(out)


def test_pure_output_is_named_after_its_type() -> None:
    """A file called Q4_K_M that holds nothing but Q4_K."""
    assert default_output(Path("x-f16.gguf"), resolve("q4_k"), Overrides(pure=True)) == Path("x-Q4_K.gguf")


def test_a_pattern_python_warns_of() -> None:
    """Python's own warning, with a source path, on the user's screen."""
    with pytest.raises(UsageError, match="not a regular expression"):
        parse_override("[[a]=q8_0")
