"""Read and check the hyper-parameters and tensors of a GGUF model before native code opens the file.

llama.cpp aborts on several of the values that are refused here, and computes wrong results with others
(src/llama-model.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.constants import ExpertGatingFuncType, GGUFValueType

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.architectures import ARCHITECTURES
from dsmoe_local.model.architectures.table import REQUIRED, Parameter
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import Field, GgufFile, TensorInfo
from dsmoe_local.model.gguf_keys import Keys, shortest_float
from dsmoe_local.model.gguf_outline import NOT_WEIGHTS, architecture_of, outline_of, scales_rope
from dsmoe_local.model.gguf_split import read_parts
from dsmoe_local.model.gguf_vocabulary import check_vocabulary
from dsmoe_local.model.hyperparameters import Gating, Hyperparameters, ModelOutline, RopeScaling
from dsmoe_local.model.layout import Role, is_for_more_tokens, tensor_specs

_GATING: Mapping[Gating, ExpertGatingFuncType] = {
    Gating.SOFTMAX: ExpertGatingFuncType.SOFTMAX,
    Gating.SIGMOID: ExpertGatingFuncType.SIGMOID,
}
_NO_GATING = 0
_MAX_MTP_LAYERS = 16
_OTHERS = "chat, batch, bench and eval take any model"


class UnknownModelError(FormatError):
    """No table describes the tensors of a model, but llama.cpp may know them."""


def read_model(path: Path) -> tuple[GgufFile, Hyperparameters]:
    """Return the header and hyper-parameters of a model. `path` is its file, or the first if it is split.

    Raises FileError if it cannot be read. Raises FormatError if its structure, a value, a tensor's shape or
    the vocabulary is not what the architecture needs.
    """
    file = read_parts(path)
    hp = _described(file)
    check_vocabulary(file)
    return file, hp


def loaded_tensors(file: GgufFile, outline: ModelOutline) -> list[TensorInfo]:
    """Return the tensors of a file that llama.cpp loads."""
    return [tensor for tensor in file.tensors.values() if not is_for_more_tokens(tensor.name, outline)]


def read_any_model(path: Path) -> tuple[GgufFile, ModelOutline]:
    """Return the header and an outline of a model that llama.cpp can run, whatever its architecture.

    The outline is Hyperparameters if `read_model` accepts the file. Raises FileError if the file cannot be
    read, and FormatError if its structure, a value or the vocabulary is malformed, or if the model does not
    generate text.
    """
    file = read_parts(path)
    try:
        outline: ModelOutline = _described(file)
    except UnknownModelError:
        outline = outline_of(file)
    check_vocabulary(file)
    return file, outline


def trained_context(path: Path, n_context: int) -> int:
    """Return `n_context`, but no more tokens than the model in `path` was trained for.

    Beyond that, replies are nonsense, and the KV cache fills the memory. A model with RoPE scaling is made
    for longer contexts: then `n_context` is returned. Raises as `read_any_model` does.
    """
    file, outline = read_any_model(path)
    return n_context if scales_rope(file) else min(n_context, outline.n_context)


def _described(file: GgufFile) -> Hyperparameters:
    hp = hyperparameters_of(file)
    _check_tensors(file, hp)
    return hp


def hyperparameters_of(file: GgufFile) -> Hyperparameters:
    """Return the hyper-parameters in a file's metadata.

    Raises FormatError if one is missing or out of range.
    """
    return _Metadata(file).hyperparameters()


class _Metadata(Keys):
    """Reads hyper-parameters by the table of the file's architecture."""

    def __init__(self, file: GgufFile) -> None:
        name = architecture_of(file)
        if name not in ARCHITECTURES:
            raise UnknownModelError(
                f"this needs to know the model's tensors, and those of {safe_line(name, 40)!r} are not known",
                where=file.path,
                remedy=f"known: {', '.join(ARCHITECTURES)}; {_OTHERS}",
            )
        super().__init__(file, name)
        self.architecture = ARCHITECTURES[name]

    def gating(self, key: str, words: Mapping[object, object], default: Gating | None) -> Gating:
        """Return the router's function; `default` if there is no key, or 0."""
        accepted = {int(_GATING[gating]): gating for gating in Gating if gating in words.values()}
        number = self.integer(key, 0, 255, _NO_GATING)
        if number == _NO_GATING and default is not None:
            return default
        if number not in accepted:
            names = " or ".join(f"{number} ({gating})" for number, gating in accepted.items())
            self.refuse(f"{self.architecture.name}.{key}", number, names)
        return accepted[number]

    def refuse_other_graphs(self) -> None:
        """Refuse keys that select another graph, with which llama.cpp aborts or gives wrong results."""
        for key, accepted in self.architecture.gguf_values.items():
            value = self.file.get(f"{self.architecture.name}.{key}", accepted[0])
            if value not in accepted and key == "expert_count":
                raise UnknownModelError(
                    f"this needs to know the model's tensors, and {self.prefix!r} with experts is not known",
                    where=self.file.path,
                    remedy=_OTHERS,
                )
            if value not in accepted:
                self.refuse(f"{self.architecture.name}.{key}", value, " or ".join(map(str, accepted)))

    def hyperparameters(self) -> Hyperparameters:
        self.refuse_other_graphs()
        architecture = self.architecture
        fields: dict[str, Any] = {"n_vocab": self.vocabulary_size(), **architecture.constants}
        for parameter in architecture.parameters:
            if not parameter.is_derived:
                fields[parameter.field] = self.parameter(parameter, fields)
        most = min(_MAX_MTP_LAYERS, fields["n_layers"] - 1) if architecture.has_mtp_layers else 0
        n_mtp = self.integer("nextn_predict_layers", 0, most, 0)
        fields |= {"n_mtp_layers": n_mtp, "n_layers": fields["n_layers"] - n_mtp}
        hp = Hyperparameters(
            architecture=architecture.name,
            rope_scaling=self.rope_scaling(),
            name=safe_line(str(self.file.get("general.name", "")), 100),
            **{**fields, "tied_embeddings": "output.weight" not in self.file.tensors},
        )
        self.check(hp)
        return hp

    def parameter(self, parameter: Parameter, fields: Mapping[str, Any]) -> object:
        """Return the value of one line of the table. `fields` are those that were read before."""
        if parameter.tensor:
            return any(name.endswith(f".{parameter.tensor}") for name in self.file.tensors)
        default = parameter.default if parameter.gguf_default is None else parameter.gguf_default
        known = default(fields) if callable(default) else None if default is REQUIRED else default
        if not parameter.gguf:
            return known
        if parameter.kind is Gating:
            return self.gating(parameter.gguf, parameter.words or {}, known)
        if parameter.kind is bool:
            return self.flag(parameter.gguf, known)
        if parameter.kind is float:
            least = 0.0 if parameter.is_absent_if_0 else parameter.low
            return self.number(parameter.gguf, least, parameter.high, known) or known
        low = 0 if known == 0 else parameter.low
        return self.integer(parameter.gguf, int(low), int(parameter.high), known)

    def check(self, hp: Hyperparameters) -> None:
        """Refuse values that do not go together."""
        parameters = [each for each in self.architecture.parameters if each.gguf]
        for parameter in parameters:
            if parameter.is_derived:
                expected = getattr(hp, parameter.field)
                found = self.integer(parameter.gguf, 0, 1 << 31, expected)
                if found != expected:
                    self.refuse(f"{hp.architecture}.{parameter.gguf}", found, str(expected))
        keys = {parameter.field: parameter.gguf for parameter in parameters}
        for check in self.architecture.checks:
            if wrong := check(hp):
                field, accepted = wrong
                key = keys.get(field, field)
                self.refuse(f"{hp.architecture}.{key}", getattr(hp, field), accepted)

    def rope_scaling(self) -> RopeScaling | None:
        prefix = f"{self.architecture.name}.rope"
        old_factor = self.number("rope.scale_linear", 0.0, 1e6, 0.0)
        if old_factor not in (0.0, 1.0):
            self.refuse(f"{prefix}.scale_linear", old_factor, "the key rope.scaling.factor in its place")
        # llama.cpp reads all of these keys whatever the type is, and scales linearly if there is no type.
        factor = self.number("rope.scaling.factor", 1e-3, 1e6, 0.0)
        magnitude = self.number("rope.scaling.attn_factor", 1e-6, 1e6, 1.0)
        context = self.integer("rope.scaling.original_context_length", 1, 1 << 28, 0)
        kind = self.file.get(f"{prefix}.scaling.type", "linear" if factor else "none")
        if kind not in ("none", "linear", "yarn"):
            self.refuse(f"{prefix}.scaling.type", kind, "none, linear, yarn")
        if kind != "none" and not factor:
            self.refuse(f"{prefix}.scaling.factor", "(missing)", "a number above 0")
        if kind == "yarn" and not context:
            self.refuse(f"{prefix}.scaling.original_context_length", "(missing)", "a number above 0")
        if kind != "yarn" and magnitude != 1:
            self.refuse(f"{prefix}.scaling.attn_factor", magnitude, "1, except for yarn")
        if kind == "yarn":
            # llama.cpp's converter writes a tenth of the value for DeepSeek-V2 (pull request 17945).
            multiplier = self.number("rope.scaling.yarn_log_multiplier", 0.0, 100.0, 0.0)
            return RopeScaling("yarn", factor, context, magnitude, shortest_float(10 * multiplier))
        return RopeScaling("linear", factor) if kind == "linear" else None


def _check_tensors(file: GgufFile, hp: Hyperparameters) -> None:
    """Raise FormatError unless the file has exactly the tensors that the graph needs, in their shapes.

    It is UnknownModelError if there are others: they may replace some, which are then missing.
    """
    specs = {spec.name: spec for spec in tensor_specs(hp)}
    remedy = "the tensors do not match the file's metadata; convert the model again"
    ignored = ARCHITECTURES[hp.architecture].ignored
    for other in file.tensors.values():
        if other.name in specs or is_for_more_tokens(other.name, hp):
            continue
        if ignored is None or not ignored.fullmatch(other.name) or other.type is not GgmlType.F32:
            raise UnknownModelError(
                f"the tensor {safe_line(other.name, 60)} is not part of a {hp.architecture} model",
                where=file.path,
                remedy=remedy,
            )
    for name, spec in specs.items():
        info = file.tensors.get(name)
        if info is None:
            raise FormatError(f"the tensor {name} is missing", where=file.path, remedy=remedy)
        # llama.cpp's converter writes the vector of a shared expert's gate as a matrix of one row.
        if info.shape not in (spec.shape, (1, *spec.shape)):
            raise FormatError(
                f"the tensor {name} has the shape {info.shape}, not {spec.shape}",
                where=file.path,
                remedy=remedy,
            )
        if info.type in NOT_WEIGHTS or (spec.role is Role.NORM and info.type is not GgmlType.F32):
            raise FormatError(
                f"the tensor {name} must not have the type {info.type.name}",
                where=file.path,
                remedy=remedy,
            )


def metadata_of(hp: Hyperparameters) -> dict[str, Field]:
    """Return the metadata keys of the architecture, in the order in which they are written.

    The converter adds `general.*` and `tokenizer.*`.
    """
    prefix = hp.architecture

    def count(value: int) -> Field:
        return Field(value, GGUFValueType.UINT32)

    def number(value: float) -> Field:
        return Field(value, GGUFValueType.FLOAT32)

    fields: dict[str, Field] = {}
    for parameter in ARCHITECTURES[hp.architecture].parameters:
        value = getattr(hp, parameter.field)
        if not parameter.gguf or (parameter.omitted is not None and value == parameter.omitted):
            continue
        if parameter.kind is Gating:
            fields[parameter.gguf] = count(_GATING[value])
        elif parameter.kind is bool:
            fields[parameter.gguf] = Field(value, GGUFValueType.BOOL)
        else:
            fields[parameter.gguf] = number(value) if parameter.kind is float else count(value)
    fields |= {**_rope_fields(hp.rope_scaling), "vocab_size": count(hp.n_vocab)}
    return {f"{prefix}.{key}": field for key, field in fields.items()}


def _rope_fields(scaling: RopeScaling | None) -> Mapping[str, Field]:
    if scaling is None:
        return {"rope.scaling.type": Field("none", GGUFValueType.STRING)}
    fields = {
        "rope.scaling.type": Field(scaling.kind, GGUFValueType.STRING),
        "rope.scaling.factor": Field(scaling.factor, GGUFValueType.FLOAT32),
    }
    if scaling.kind == "yarn":
        fields |= {
            "rope.scaling.original_context_length": Field(scaling.original_context, GGUFValueType.UINT32),
            "rope.scaling.attn_factor": Field(scaling.attention_factor, GGUFValueType.FLOAT32),
        }
    if scaling.mscale_all_dim:
        multiplier = 0.1 * scaling.mscale_all_dim
        fields["rope.scaling.yarn_log_multiplier"] = Field(multiplier, GGUFValueType.FLOAT32)
    return fields
