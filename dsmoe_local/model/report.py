"""The report on a model that `dsmoe inspect` shows, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model import config_json
from dsmoe_local.model.cost import (
    PAPER_TOKENS,
    Share,
    activated_weights,
    flops,
    kv_bytes_per_token,
    parameters,
    shares,
)
from dsmoe_local.model.file_type import calibration_of, file_type_name, imatrix_name
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.gguf_model import loaded_tensors, read_any_model
from dsmoe_local.model.hyperparameters import Hyperparameters, ModelOutline
from dsmoe_local.model.json_object import load_json
from dsmoe_local.model.layout import tensor_specs, unquantized
from dsmoe_local.model.presets import PRESETS, matching_preset

_SHAPE = (
    "n_layers",
    "n_dense_layers",
    "hidden_size",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "value_dim",
    "query_rank",
    "kv_rank",
    "ffn_size",
    "n_routed_experts",
    "n_shared_experts",
    "n_experts_per_token",
    "expert_size",
    "shared_expert_size",
    "gating",
    "n_expert_groups",
    "n_groups_per_token",
    "n_vocab",
    "n_context",
)
"""Fields of Hyperparameters in the JSON report; null if no table describes the model."""

COMPARED_WITH = ("deepseek-7b", "llama2-7b")
_CHECKPOINT_TYPES = {"float32": GgmlType.F32, "float16": GgmlType.F16, "bfloat16": GgmlType.BF16}


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """A file's vocabulary. `template` is the chat template as stored; None if there is none."""

    model: str
    pre: str
    n_tokens: int
    bos: str
    eos: str
    adds_bos: bool
    template: str | None


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model.

    FLOPs are for a sequence of 4,096 tokens. For models of arXiv 2401.06066, recognized by their dimensions,
    `flops_paper` are FLOPs with the paper's nominal widths, and `ratios` those relative to other models of
    the paper. `type` is the name of the file's type, and `imatrix` that of the importance matrix it was made
    with, if any. `calibration` says how its weights were calibrated, if they were. `assumed_type` is the type
    of the weights if there is no GGUF file. `flops` is None if no table describes the model.
    """

    source: str
    outline: ModelOutline
    n_parameters: int
    n_activated: int
    flops: float | None
    flops_paper: float | None
    ratios: Mapping[str, float]
    shares: tuple[Share, ...]
    kv_bytes_per_token: int
    tokenizer: TokenizerReport | None
    assumed_type: GgmlType | None
    type: str = ""
    imatrix: str = ""
    calibration: str = ""

    @property
    def n_bytes(self) -> int:
        """Size of all weights."""
        return sum(share.n_bytes for share in self.shares)

    @property
    def n_bytes_per_token(self) -> float:
        """Bytes of weights that are read to decode one token."""
        return sum(share.n_bytes_per_token for share in self.shares)


def report_on(target: str) -> ModelReport:
    """Return the report on a GGUF file, a folder with a config.json, or a preset.

    Raises UsageError if `target` is none of these. Raises FileError and FormatError if it cannot be read.
    """
    path = Path(target)
    if path.is_file():
        return _report_on_file(path)
    if path.is_dir():
        return _report_on_folder(path)
    preset = PRESETS.get(target.lower())
    if preset is not None:
        return _report(target.lower(), preset.hp, GgmlType.BF16)
    raise UsageError(
        f"no file, folder or preset is called {safe_line(target)!r}",
        remedy=f"presets: {', '.join(PRESETS)}",
    )


def _report_on_file(path: Path) -> ModelReport:
    if path.name == config_json.FILE_NAME:
        return _report_on_folder(path.parent)
    file, outline = read_any_model(path)
    if isinstance(outline, Hyperparameters):
        return _report(str(path), outline, GgmlType.F32, file)
    tensors = loaded_tensors(file, outline)
    return ModelReport(
        source=str(path),
        outline=outline,
        n_parameters=sum(tensor.n_weights for tensor in tensors),
        n_activated=activated_weights(outline, tensors),
        flops=None,
        flops_paper=None,
        ratios={},
        shares=tuple(shares(outline, tensors)),
        kv_bytes_per_token=kv_bytes_per_token(outline),
        tokenizer=_tokenizer(file),
        assumed_type=None,
        type=file_type_name(file),
        imatrix=imatrix_name(file),
        calibration=calibration_of(file),
    )


def _report_on_folder(folder: Path) -> ModelReport:
    if not (folder / config_json.FILE_NAME).is_file():
        raise FileError(
            f"the folder has no {config_json.FILE_NAME}",
            where=folder,
            remedy="name a GGUF file or the folder of a Hugging Face checkpoint",
        )
    hp = config_json.read_config(folder)
    values = load_json(folder / config_json.FILE_NAME)
    kind = _CHECKPOINT_TYPES.get(str(values.get("torch_dtype", values.get("dtype"))), GgmlType.BF16)
    return _report(str(folder), hp, kind)


def _report(source: str, hp: Hyperparameters, assumed: GgmlType, file: GgufFile | None = None) -> ModelReport:
    """Make the report. `assumed` is the type of the weights if there is no file."""
    counted = parameters(hp)
    nominal, ratios = _paper_flops(hp)
    tensors = [file.tensors[spec.name] for spec in tensor_specs(hp)] if file else unquantized(hp, assumed)
    return ModelReport(
        source=source,
        outline=hp,
        n_parameters=counted.total,
        n_activated=counted.activated,
        flops=flops(hp, PAPER_TOKENS),
        flops_paper=nominal,
        ratios=ratios,
        shares=tuple(shares(hp, tensors)),
        kv_bytes_per_token=kv_bytes_per_token(hp),
        tokenizer=None if file is None else _tokenizer(file),
        assumed_type=None if file else assumed,
        type=file_type_name(file) if file else "",
        imatrix=imatrix_name(file) if file else "",
        calibration=calibration_of(file) if file else "",
    )


def _paper_flops(hp: Hyperparameters) -> tuple[float | None, Mapping[str, float]]:
    """Return FLOPs by the formula of the paper, and relative to its dense models. Other models have none."""
    preset = matching_preset(hp)
    if preset is None or preset.ffn_factor is None:
        return None, {}
    nominal = flops(hp, PAPER_TOKENS, preset.ffn_factor)
    others = {name: PRESETS[name] for name in COMPARED_WITH}
    return nominal, {
        name: nominal / flops(other.hp, PAPER_TOKENS, other.ffn_factor) for name, other in others.items()
    }


def _tokenizer(file: GgufFile) -> TokenizerReport:
    tokens: list[str] = file.get("tokenizer.ggml.tokens", [])

    def token(name: str) -> str:
        number = file.get(f"tokenizer.ggml.{name}_token_id")
        # llama.cpp ignores ids that are not tokens.
        return safe_line(tokens[number], 60) if number is not None and number < len(tokens) else ""

    template = file.get("tokenizer.chat_template")
    return TokenizerReport(
        model=safe_line(str(file.get("tokenizer.ggml.model", "")), 40),
        pre=safe_line(str(file.get("tokenizer.ggml.pre", "")), 40),
        n_tokens=len(tokens),
        bos=token("bos"),
        eos=token("eos"),
        adds_bos=bool(file.get("tokenizer.ggml.add_bos_token", False)),
        template=template if isinstance(template, str) else None,
    )


def as_json(report: ModelReport) -> dict[str, Any]:
    """Return the report as a JSON object with plain numbers."""
    hp = report.outline
    return {
        "source": report.source,
        "name": hp.name,
        "architecture": hp.architecture,
        **{key: getattr(hp, key, None) for key in _SHAPE},
        "parameters": {"total": report.n_parameters, "activated": report.n_activated},
        "flops_4k": report.flops,
        "flops_4k_paper": report.flops_paper,
        "flops_ratio": dict(report.ratios),
        "type": report.type or None,
        "imatrix": report.imatrix or None,
        "calibration": report.calibration or None,
        "bytes": report.n_bytes,
        "bits_per_weight": 8 * report.n_bytes / report.n_parameters,
        "bytes_read_per_token": report.n_bytes_per_token,
        "kv_bytes_per_token": report.kv_bytes_per_token,
        "assumed_type": None if report.assumed_type is None else report.assumed_type.name,
        "roles": {
            str(share.role): {
                "parameters": share.n_weights,
                "bytes": share.n_bytes,
                "bits_per_weight": 8 * share.n_bytes / share.n_weights,
                "bytes_read_per_token": share.n_bytes_per_token,
                "types": {kind.name: n_bytes for kind, n_bytes in share.types.items()},
            }
            for share in report.shares
        },
        "tokenizer": None
        if report.tokenizer is None
        else {
            "model": report.tokenizer.model,
            "pre": report.tokenizer.pre,
            "n_tokens": report.tokenizer.n_tokens,
            "bos": report.tokenizer.bos,
            "eos": report.tokenizer.eos,
            "adds_bos": report.tokenizer.adds_bos,
            "chat_template": report.tokenizer.template,
        },
    }
