"""GGUF to GGUF: read a model, choose types, write it again."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from gguf.constants import GGUFValueType

from dsmoe_local.base.durable import read_into
from dsmoe_local.base.errors import FileError, file_errors
from dsmoe_local.base.progress import Listener, Note, ignore
from dsmoe_local.model.cost import bytes_per_token
from dsmoe_local.model.file_type import CALIBRATION_KEY
from dsmoe_local.model.ggml import GgmlType, row_bytes
from dsmoe_local.model.gguf_file import Field, GgufFile, TensorInfo, identity_of
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.gguf_writer import plan_gguf
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.split_name import model_stem
from dsmoe_quantize.errors import RequantizeError
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Overrides, label_of
from dsmoe_quantize.policy.mixes import ALIASES
from dsmoe_quantize.policy.plan import TypePlan, plan_types
from dsmoe_quantize.policy.types import TypeChoice, known_words
from dsmoe_quantize.write.encoder import Bytes, RowSource, TensorJob
from dsmoe_quantize.write.output import Summary, write_output

NONE_ENCODED: Mapping[str, RowSource] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Plan(TypePlan):
    """The plan to quantize `file`: the types of all tensors, and the size of the result.

    `calibration` is what the metadata says about calibrated weights; "" if they are not calibrated.
    """

    file: GgufFile = field(kw_only=True)
    calibration: str = field(default="", kw_only=True)

    @property
    def metadata(self) -> dict[str, Field]:
        """The metadata of the new file."""
        metadata = self.metadata_of(self.file.metadata)
        if self.calibration:
            metadata[CALIBRATION_KEY] = Field(self.calibration, GGUFValueType.STRING)
        return metadata

    @property
    def file_size(self) -> int:
        """Bytes of the new file, header included."""
        return plan_gguf(self.metadata, self.choices).size

    @property
    def n_requantized(self) -> int:
        """Number of tensors that are quantized already and change their type."""
        return sum(choice.is_requantized for choice in self.choices)

    @property
    def n_bytes_per_token(self) -> float:
        """Bytes of weights that are read to decode one token."""
        return bytes_per_token(self.hp, self.choices)


def plan_quantization(
    source: Path,
    choice: TypeChoice,
    overrides: Overrides | None = None,
    *,
    allow_requantize: bool = False,
    imatrix: Imatrix | None = None,
) -> Plan:
    """Read `source` and choose a type for each tensor; nothing is written.

    With `imatrix`, weights will be encoded by their importance.

    Raises FileError or FormatError for the file, UsageError for overrides that match nothing and for an
    importance matrix of another model, RequantizeError if quantized tensors would be quantized again without
    `allow_requantize`.
    """
    file, hp = read_model(source)
    plan = plan_file(file, hp, choice, overrides, imatrix)
    if plan.n_requantized and not allow_requantize:
        first = next(choice for choice in plan.choices if choice.is_requantized)
        raise RequantizeError(
            f"{plan.n_requantized} tensors are quantized already",
            where=f"{first.name}: {first.source_type.name} to {first.type.name}",
            remedy="start from the unquantized file, or lose quality twice with --allow-requantize",
        )
    return plan


def plan_file(
    file: GgufFile,
    hp: Hyperparameters,
    choice: TypeChoice,
    overrides: Overrides | None = None,
    imatrix: Imatrix | None = None,
) -> Plan:
    """Like `plan_quantization`, for a file whose header was read. It may be quantized already."""
    types = plan_types(list(file.tensors.values()), hp, choice, overrides, imatrix)
    return Plan(hp, types.type, types.choices, imatrix, file=file)


def quantize_file(
    plan: Plan,
    out: Path,
    *,
    encoded: Mapping[str, RowSource] = NONE_ENCODED,
    split_max_size: int | None = None,
    threads: int = 0,
    force: bool = False,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Summary:
    """Write the file that `plan` describes to `out`. See `write_output` for splits, resuming and errors.

    `encoded` has the tensors that are encoded already, in their new types, by name.
    """
    with opened(plan.file) as source:
        jobs = jobs_of(plan, source, encoded)
        for text in plan.notes:
            listen(Note(text))
        return write_output(
            out,
            plan.metadata,
            jobs,
            {
                "the source": [part.identity for part in plan.file.parts],
                **plan.fingerprint,
                "the calibration": plan.calibration or None,
            },
            sources=[part.path for part in plan.file.parts],
            split_max_size=split_max_size,
            threads=threads,
            force=force,
            listen=listen,
            stop=stop,
        )


def jobs_of(plan: Plan, source: OpenGguf, encoded: Mapping[str, RowSource] = NONE_ENCODED) -> list[TensorJob]:
    """Return the job for each tensor of `plan`, whose source is open; see `quantize_file` for `encoded`."""
    return [
        TensorJob(choice.name, choice.shape, choice.type, encoded[choice.name])
        if choice.name in encoded
        else TensorJob(
            choice.name,
            choice.shape,
            choice.type,
            source.rows(plan.file.tensors[choice.name]),
            plan.importance_of(choice),
        )
        for choice in plan.choices
    ]


def default_output(source: Path, choice: TypeChoice, overrides: Overrides) -> Path:
    """Return `<name>-<TYPE>.gguf`, in the current folder. A type at the end of `<name>` is removed."""
    return output_called(source, label_of(choice, overrides))


def output_called(source: Path, label: str) -> Path:
    """Like `default_output`, for a recipe that is not solved yet and is called `label`."""
    words = "|".join(map(re.escape, (*known_words(), *ALIASES)))
    name = re.sub(rf"(?<=.)[-._]({words})$", "", model_stem(source), flags=re.IGNORECASE)
    return Path(f"{name}-{label}.gguf")


@dataclass(frozen=True, slots=True)
class GgufRows:
    """The rows of one tensor of an open GGUF file. They are not mapped: mapped pages count as memory."""

    path: Path
    descriptor: int
    info: TensorInfo

    @property
    def type(self) -> GgmlType:
        """The type that the rows are stored in."""
        return self.info.type

    def read(self, first_row: int, n_rows: int, scratch: Bytes) -> Bytes:
        """Read rows into `scratch`. Raises FileError if the file cannot be read or was truncated."""
        row = row_bytes(self.info.type, self.info.shape[-1])
        rows = scratch[: n_rows * row]
        try:
            read_into(rows.data, self.descriptor, self.info.offset + first_row * row)
        except OSError as error:
            raise FileError(f"cannot read the model: {error.strerror}", where=self.path) from error
        except EOFError as error:
            raise FileError("the model file was truncated while it was read", where=self.path) from error
        return rows


@dataclass(frozen=True, slots=True)
class OpenGguf:
    """A model whose files are open. `descriptors` are in the order of its parts."""

    file: GgufFile
    descriptors: tuple[int, ...]

    def rows(self, info: TensorInfo) -> GgufRows:
        """Return the source of a tensor's rows."""
        return GgufRows(self.file.parts[info.part].path, self.descriptors[info.part], info)

    def refuse_changed(self) -> None:
        """Raise FileError if a file has changed since its header was read."""
        for part, descriptor in zip(self.file.parts, self.descriptors, strict=True):
            if identity_of(os.fstat(descriptor)) != part.identity:
                raise FileError(
                    "the model file changed while it was in use", where=part.path, remedy="run again"
                )


@contextmanager
def opened(file: GgufFile) -> Iterator[OpenGguf]:
    """Open all files of a model to read rows. Raises FileError if one cannot be opened, or has changed."""
    with ExitStack() as stack:
        descriptors = []
        for part in file.parts:
            with file_errors("cannot read the model", part.path):
                descriptors.append(os.open(part.path, os.O_RDONLY))
            stack.callback(os.close, descriptors[-1])
        source = OpenGguf(file, tuple(descriptors))
        source.refuse_changed()
        yield source
