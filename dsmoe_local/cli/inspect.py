"""`dsmoe inspect`: the shape and the costs of a model, as tables or JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe_local.base.sizes import format_count, format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import find_model, model_argument, model_option
from dsmoe_local.cli.options import json_option
from dsmoe_local.cli.output import console, facts, plain_table, print_json

if TYPE_CHECKING:
    from rich.console import JustifyMethod, RenderableType
    from rich.table import Table

    from dsmoe_local.model.cost import Share
    from dsmoe_local.model.hyperparameters import Hyperparameters
    from dsmoe_local.model.report import ModelReport

_COLUMNS = {
    "role": 0,
    "weights": 54,
    "size": 0,
    "bits": 54,
    "read/token": 0,
    "of all reads": 76,
    "types": 76,
}
"""The columns of the table of roles, and the least width of the terminal for each."""
_SIZE_COLUMNS = {"type": 0, "size": 0, "bits": 54, "read/token": 0, "fallback": 54}
_FIGURES = ("weights", "size", "bits", "read/token", "fallback")

_COMPARED = {"deepseek-7b": "DeepSeek 7B", "llama2-7b": "LLaMA2 7B"}
_SIZED = ("q8", "q4", "q4-fast", "q4-small", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
"""The types for which the size of a file is shown, if it is not one already."""


@define_command(
    "inspect",
    ("dsmoe inspect model.gguf", "Describe a file."),
    ("dsmoe inspect moonlight-16b-a3b", "Describe a published model."),
)
@model_argument("target", "[MODEL|FOLDER|PRESET]", required=False)
@model_option
@json_option()
def command(target: str | None, named_model: str | None, as_json: bool) -> None:
    """Show the shape of a model, the size of its parts, and what a token costs.

    MODEL is a GGUF file, or a name that `dsmoe models` lists. FOLDER holds a Hugging Face checkpoint, or its
    config.json only. PRESET is a published model: deepseek-v2-lite, moonlight-16b-a3b, deepseek-v3, kimi-k2,
    glm-4.7-flash, glm-4.5-air, qwen1.5-moe-a2.7b, qwen3-30b-a3b, qwen3-235b-a22b, ling-mini-2.0 or
    olmoe-1b-7b; or one of the DeepSeekMoE paper: deepseekmoe-2b, deepseekmoe-16b, deepseekmoe-145b,
    deepseekmoe-142b-half, gshard-137b, deepseek-7b, deepseek-67b or llama2-7b.
    """
    from dsmoe_local.model import report as reports
    from dsmoe_local.model.config_json import FILE_NAME
    from dsmoe_local.model.presets import PRESETS

    if target is not None and (
        target.lower() in PRESETS or Path(target).name == FILE_NAME or (Path(target) / FILE_NAME).is_file()
    ):
        report = reports.report_on(target)
    else:
        report = reports.report_on(str(find_model(target, named_model, PRESETS)))
    if as_json:
        print_json({**reports.as_json(report), "sizes": _sizes_as_json(report)}, indent=2)
        return
    out = console()
    for part in _parts(report, out.width):
        out.print(part)


def _parts(report: ModelReport, width: int) -> list[RenderableType]:
    from rich.text import Text

    name = report.outline.name
    title = Text.assemble((safe_line(name or report.source, 80), "bold"))
    if name and name != report.source:
        title.append(f"  {safe_line(report.source, 120)}", style="dim")
    parts: list[RenderableType] = [title, _facts(report), _role_table(report, width)]
    if report.assumed_type is not None:
        parts.append(Text(f"No weights were read: sizes are for {report.assumed_type.name}.", style="dim"))
        parts.append(_size_table(report, width))
        if width >= _SIZE_COLUMNS["fallback"]:
            parts.append(Text("fallback: weights whose rows the type's blocks do not divide", style="dim"))
    return parts


@dataclass(frozen=True, slots=True)
class _Size:
    """Bytes of a model in one type, and of what a token reads. `fallback`: share of weights in others."""

    type: str
    n_bytes: int
    n_bytes_per_token: float
    fallback: float


def _sizes(report: ModelReport) -> Iterator[_Size]:
    """Yield the sizes of a file that is to be made of a checkpoint."""
    from dsmoe_local.model.cost import bytes_per_token
    from dsmoe_local.model.hyperparameters import Hyperparameters
    from dsmoe_local.model.layout import unquantized
    from dsmoe_quantize.policy.plan import plan_types
    from dsmoe_quantize.policy.types import resolve

    hp = report.outline
    if report.assumed_type is None or not isinstance(hp, Hyperparameters):
        return
    tensors = unquantized(hp, report.assumed_type)
    for word in _SIZED:
        plan = plan_types(tensors, hp, resolve(word))
        fallbacks = sum(choice.n_weights for choice in plan.choices if choice.misfit)
        n_bytes = bytes_per_token(hp, plan.choices)
        yield _Size(word, plan.n_bytes, n_bytes, fallbacks / report.n_parameters)


def _sizes_as_json(report: ModelReport) -> dict[str, object]:
    return {
        size.type: {
            "bytes": size.n_bytes,
            "bits_per_weight": 8 * size.n_bytes / report.n_parameters,
            "bytes_read_per_token": size.n_bytes_per_token,
            "fallback": size.fallback,
        }
        for size in _sizes(report)
    }


def _size_table(report: ModelReport, width: int) -> Table:
    rows = [
        (
            size.type,
            format_size(size.n_bytes),
            _bits(size.n_bytes, report.n_parameters),
            format_size(size.n_bytes_per_token),
            f"{size.fallback:.0%}" if size.fallback else "",
        )
        for size in _sizes(report)
    ]
    return _table(_SIZE_COLUMNS, [rows], width)


def _facts(report: ModelReport) -> Table:
    from dsmoe_local.model.hyperparameters import Hyperparameters

    hp = report.outline
    layers = f"{hp.n_layers} layers"
    if hp.n_mtp_layers:
        layers += f" ({hp.n_mtp_layers} for multi-token prediction not counted)"
    architecture = f"{safe_line(hp.architecture, 40)}, {layers}"
    if isinstance(hp, Hyperparameters):
        rows = [
            ("architecture", f"{architecture}, {hp.hidden_size} wide, {_heads(hp)}"),
            ("experts", _experts(hp)),
            *([("router", _router(hp))] if hp.is_moe else []),
        ]
    else:
        rows = [
            ("architecture", f"{architecture}; it can chat, batch, bench and eval only"),
            ("experts", f"{hp.n_experts_per_token} of {hp.n_routed_experts}" if hp.is_moe else "none"),
        ]
    rows += [
        ("parameters", _parameters(report)),
        *([] if report.flops is None else [("FLOPs per 4K tokens", _flops(report, report.flops))]),
        ("weights", _weights(report)),
        ("read per token", f"{format_size(report.n_bytes_per_token)} of weights"),
        ("KV cache (F16)", _kv(report)),
    ]
    if report.tokenizer is not None:
        tokenizer = report.tokenizer
        start = f", starts with {tokenizer.bos}" if tokenizer.adds_bos else ", no start token"
        kind = "/".join(filter(None, (tokenizer.model, tokenizer.pre)))
        rows.append(("tokenizer", f"{kind}, {tokenizer.n_tokens:,} tokens{start}, ends with {tokenizer.eos}"))
        template = tokenizer.template
        shown = "none: a base model" if template is None else f"{len(template)} characters"
        rows.append(("chat template", shown))
    return facts(rows)


def _weights(report: ModelReport) -> str:
    size = f"{format_size(report.n_bytes)}, {_bits(report.n_bytes, report.n_parameters)} bits each"
    parts = [
        size,
        report.type,
        report.imatrix and f"importance matrix {report.imatrix}",
        report.calibration and f"calibrated ({report.calibration})",
    ]
    return ", ".join(filter(None, parts))


def _heads(hp: Hyperparameters) -> str:
    heads = f"{hp.n_heads} heads of {hp.head_dim}"
    if hp.is_mla:
        return f"{heads}, MLA with {hp.kv_rank} + {hp.rotary_dim} cached values"
    return heads if hp.n_kv_heads == hp.n_heads else f"{heads}, {hp.n_kv_heads} for keys and values"


def _experts(hp: Hyperparameters) -> str:
    from dsmoe_local.model.layout import has_shared_gate

    if not hp.is_moe:
        return f"none: a dense FFN of {hp.ffn_size} in every layer"
    dense = {0: "", 1: "; layer 0 dense"}.get(hp.n_dense_layers, f"; layers 0-{hp.n_dense_layers - 1} dense")
    if dense:
        dense += f" ({hp.ffn_size})"
    shared = f"{hp.n_shared_experts} shared" if hp.n_shared_experts else ""
    if shared and hp.shared_expert_size != hp.expert_size:
        shared += f" ({hp.shared_expert_size} wide)"
    if has_shared_gate(hp):
        shared += " behind a gate"
    routed = f"{hp.n_experts_per_token} of {hp.n_routed_experts} routed, {hp.expert_size} wide"
    return f"{' + '.join(filter(None, (shared, routed)))}{dense}"


def _router(hp: Hyperparameters) -> str:
    parts = [hp.gating.value]
    if hp.has_expert_bias:
        parts.append("a bias for the choice")
    if hp.n_expert_groups > 1:
        parts.append(f"from the best {hp.n_groups_per_token} of {hp.n_expert_groups} groups")
    if hp.normalized_weights:
        parts.append("weights normalized")
    if hp.routed_scaling_factor != 1:
        parts.append(f"times {hp.routed_scaling_factor:g}")
    return ", ".join(parts)


def _parameters(report: ModelReport) -> str:
    total, activated = report.n_parameters, report.n_activated
    if total == activated:
        return f"{format_count(total)}, all of them used by every token"
    share = activated / total
    return f"{format_count(total)} in total, {format_count(activated)} active per token ({share:.0%})"


def _flops(report: ModelReport, counted: float) -> str:
    ratios = ", ".join(f"{ratio:.1%} of {_COMPARED[name]}" for name, ratio in report.ratios.items())
    real = f"{counted / 1e12:.1f}T"
    if report.flops_paper is None:
        return real
    return f"{real} ({report.flops_paper / 1e12:.1f}T as the paper counts): {ratios}"


def _kv(report: ModelReport) -> str:
    context = report.outline.n_context
    per_token = report.kv_bytes_per_token
    return f"{format_size(per_token)} per token, {format_size(per_token * context)} for all {context:,}"


def _types(share: Share) -> str:
    if len(share.types) == 1:
        return next(iter(share.types)).name
    return ", ".join(f"{kind.name} {n_bytes / share.n_bytes:.0%}" for kind, n_bytes in share.types.items())


def _bits(n_bytes: int, n_weights: int) -> str:
    return f"{8 * n_bytes / n_weights:.2f}"


def _role_table(report: ModelReport, width: int) -> Table:
    read = report.n_bytes_per_token
    rows = [
        (
            str(share.role),
            format_count(share.n_weights),
            format_size(share.n_bytes),
            _bits(share.n_bytes, share.n_weights),
            format_size(share.n_bytes_per_token),
            f"{share.n_bytes_per_token / read:4.0%} {'▇' * round(share.n_bytes_per_token / read * 10)}",
            _types(share),
        )
        for share in report.shares
    ]
    total = (
        "all",
        format_count(report.n_parameters),
        format_size(report.n_bytes),
        _bits(report.n_bytes, report.n_parameters),
        format_size(read),
        "",
        "",
    )
    return _table(_COLUMNS, [rows, [total]], width)


def _table(columns: Mapping[str, int], sections: Sequence[Sequence[tuple[str, ...]]], width: int) -> Table:
    """Return a table of sections of rows, with those columns that a terminal of `width` has room for."""
    table = plain_table()
    shown = [index for index, least in enumerate(columns.values()) if width >= least]
    for heading in (tuple(columns)[index] for index in shown):
        justify: JustifyMethod = "right" if heading in _FIGURES else "left"
        table.add_column(heading, justify=justify, no_wrap=heading != "types")
    for rows in sections:
        for row in rows:
            table.add_row(*(row[index] for index in shown))
        table.add_section()
    return table
