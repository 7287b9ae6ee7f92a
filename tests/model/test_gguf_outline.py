"""Models of any architecture: an outline of those that can run; a short refusal of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.other_models import OTHERS, write_other
from support.raw_gguf import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    Q8_0,
    STRING,
    UINT32,
    KeyValue,
    RawGguf,
    Tensor,
    tiny_model,
)

from dsmoe_local.base.errors import FormatError
from dsmoe_local.model.cost import activated_weights, bytes_per_token, kv_bytes_per_token, parameters
from dsmoe_local.model.gguf_model import UnknownModelError, read_any_model, read_model
from dsmoe_local.model.gguf_outline import scales_rope
from dsmoe_local.model.hyperparameters import Hyperparameters, ModelOutline


def renamed(architecture: str, model: RawGguf | None = None) -> RawGguf:
    """The tiny model as if it were of another architecture."""
    values = [
        replace(each, key=str(each.key).replace("deepseek.", f"{architecture}."))
        for each in (model or tiny_model()).values
    ]
    return replace(tiny_model(), values=values).with_value(
        KeyValue("general.architecture", STRING, architecture)
    )


OTHER = renamed("other")


def number(key: str, value: float, kind: int = UINT32) -> RawGguf:
    return OTHER.with_value(KeyValue(f"other.{key}", kind, value))


@pytest.mark.parametrize("name", OTHERS)
def test_outlines(name: str, tmp_path: Path) -> None:
    """Guards: a model that cannot be run because no table describes it, or is described by a wrong one."""
    path = write_other(tmp_path / "model.gguf", name)
    file, outline = read_any_model(path)
    kind = OTHERS[name]
    assert (outline.architecture, outline.n_layers, outline.n_context) == (
        kind.architecture,
        len(kind.layers),
        256,
    )
    assert outline.tied_embeddings == kind.tied
    assert outline.is_moe == ("expert_count" in kind.keys)
    assert outline.n_vocab == len(file.get("tokenizer.ggml.tokens"))
    if name == "llama with biases":
        assert isinstance(outline, Hyperparameters)
        return
    assert type(outline) is ModelOutline
    with pytest.raises(UnknownModelError, match=r"needs to know the model's tensors|is not part of a"):
        read_model(path)


@pytest.mark.parametrize(
    ("name", "columns"),
    [("qwen2", 2 * 3 * 2 * 16), ("lfm2", 2 * 2 * 16), ("mamba", 0), ("deepseek2 with fused experts", 3 * 72)],
)
def test_the_size_of_the_cache(name: str, columns: int, tmp_path: Path) -> None:
    """Guards: a plan of memory for layers that have no cache, or for heads of another width."""
    outline = read_any_model(write_other(tmp_path / "model.gguf", name))[1]
    assert kv_bytes_per_token(outline) == 2 * columns


def test_costs_are_those_of_a_table(tmp_path: Path) -> None:
    """Guards: other figures in `dsmoe bench` for the same tensors because no table describes them."""
    file, hp = read_model(tiny_model().write(tmp_path / "known.gguf"))
    other, outline = read_any_model(OTHER.write(tmp_path / "other.gguf"))
    known, unknown = file.tensors.values(), other.tensors.values()
    assert activated_weights(outline, unknown) == activated_weights(hp, known) == parameters(hp).activated
    assert bytes_per_token(outline, unknown) == bytes_per_token(hp, known)
    assert kv_bytes_per_token(outline) == kv_bytes_per_token(hp)


def test_layers_for_more_tokens_are_not_read(tmp_path: Path) -> None:
    """Guards: layers for multi-token prediction that count as layers of the model."""
    file, outline = read_any_model(number("nextn_predict_layers", 1).write(tmp_path / "model.gguf"))
    assert outline.n_layers == 1
    first = [each for each in file.tensors.values() if not each.name.startswith("blk.1.")]
    assert bytes_per_token(outline, file.tensors.values()) == bytes_per_token(outline, first)


NOT_RUN = {
    "an embedding model": renamed("bert"),
    "causal by hand": number("attention.causal", 0, BOOL),
    "pooled outputs": number("pooling_type", 1),
    "outputs of another width": number("embedding_length_out", 8),
    "classes": OTHER.with_value(KeyValue("other.classifier.output_labels", ARRAY, ["a"], STRING)),
    "an encoder": renamed("t5"),
    "a diffusion model": renamed("llada"),
    "a draft model": renamed("eagle3"),
    "speech": renamed("qwen3tts"),
    "images": renamed("clip"),
    "a part for images": OTHER.with_value(KeyValue("general.type", STRING, "mmproj")),
    "an adapter": OTHER.with_value(KeyValue("general.type", STRING, "adapter")),
}
MALFORMED = {
    "no weights": replace(OTHER, tensors=[]),
    "no architecture": OTHER.without("general.architecture"),
    "an architecture that is a number": OTHER.with_value(KeyValue("general.architecture", UINT32, 1)),
    "no layers": OTHER.without("other.block_count"),
    "0 layers": number("block_count", 0),
    "513 layers": number("block_count", 513),
    "only layers for more tokens": number("nextn_predict_layers", 2),
    "no context": OTHER.without("other.context_length"),
    "no width": OTHER.without("other.embedding_length"),
    "513 experts": number("expert_count", 513),
    "no experts used": OTHER.without("other.expert_used_count"),
    "more used than there are": number("expert_used_count", 5),
    "more used than there are, in one layer": OTHER.with_value(
        KeyValue("other.expert_used_count", ARRAY, [1, 5], UINT32)
    ),
    "a list that is too short": OTHER.with_value(
        KeyValue("other.attention.head_count_kv", ARRAY, [1], INT32)
    ),
    "negative heads": OTHER.with_value(KeyValue("other.attention.head_count", ARRAY, [4, -1], INT32)),
    "heads that are text": OTHER.with_value(KeyValue("other.attention.head_count", STRING, "4")),
    "groups that do not divide the experts": number("expert_group_count", 3),
    "groups of which none is used": number("expert_group_count", 2),
    "groups without experts": number("expert_count", 0).with_value(
        KeyValue("other.expert_group_count", UINT32, 2)
    ),
    "unknown rotary scaling": OTHER.with_value(KeyValue("other.rope.scaling.type", STRING, "dynamic")),
    "a number that is none": number("attention.layer_norm_rms_epsilon", float("nan"), FLOAT32),
    "a norm in blocks": OTHER.with_tensor(Tensor("blk.1.ffn_norm.weight", (64,), kind=Q8_0)),
    "integer weights": OTHER.with_tensor(Tensor("blk.0.attn_q.weight", (64, 64), kind=24)),
    "no tokenizer": OTHER.with_value(KeyValue("tokenizer.ggml.model", STRING, "none")),
    "no tokens": OTHER.without("tokenizer.ggml.tokens"),
}


@pytest.mark.parametrize("name", [*NOT_RUN, *MALFORMED])
def test_refusals(name: str, tmp_path: Path) -> None:
    """Guards llama.cpp against models that it aborts on, and users against nonsense in place of text."""
    path = {**NOT_RUN, **MALFORMED}[name].write(tmp_path / "bad.gguf")
    with pytest.raises(FormatError) as refused:
        read_any_model(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 3
    assert ("a model that generates text" in str(refused.value)) == (name in NOT_RUN)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({}, False),
        ({"type": "none"}, False),
        ({"type": "yarn", "factor": 4.0}, True),
        ({"factor": 2.0}, True),
        ({"type": "none", "factor": 2.0}, False),
        ({"type": "longrope"}, True),
    ],
)
def test_scaled_positions(scaling: dict[str, str | float], expected: bool, tmp_path: Path) -> None:
    """Guards: a context that is cut although the model is made for a longer one."""
    model = OTHER
    for key, value in scaling.items():
        kind = STRING if isinstance(value, str) else FLOAT32
        model = model.with_value(KeyValue(f"other.rope.scaling.{key}", kind, value))
    assert scales_rope(read_any_model(model.write(tmp_path / "model.gguf"))[0]) is expected


def test_a_malformed_file_of_a_known_architecture(tmp_path: Path) -> None:
    """Guards: a file that its table refuses, run because another reading lets it pass."""
    path = (
        tiny_model().with_value(KeyValue("deepseek.expert_gating_func", UINT32, 2)).write(tmp_path / "x.gguf")
    )
    for read in (read_model, read_any_model):
        with pytest.raises(FormatError, match="expert_gating_func"):
            read(path)
