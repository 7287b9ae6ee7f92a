"""GGUF to GGUF: read a model, choose types, write it again. The steps are other modules'."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base.errors import FileError
from dsmoe_local.base.progress import Listener, Note, ignore
from dsmoe_local.model.cost import read_fraction
from dsmoe_local.model.ggml import FLOATS, GgmlType, row_bytes, tensor_bytes, type_name
from dsmoe_local.model.gguf_file import Field, GgufFile, TensorInfo, identity_of
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.gguf_writer import PlannedTensor, plan_gguf
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import role_of
from dsmoe_quantize.errors import RequantizeError
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Choice, Overrides, choose_types, label_of
from dsmoe_quantize.policy.mixes import ALIASES
from dsmoe_quantize.policy.record import (
    Record,
    identity_of_output,
    importance_of,
    metadata_of_output,
    notes_on_output,
    record_of,
    refuse_foreign,
    used_imatrix,
)
from dsmoe_quantize.policy.types import SettledType, TypeChoice, known_words, settled
from dsmoe_quantize.write.encoder import Bytes, TensorJob
from dsmoe_quantize.write.output import Summary, write_output


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one tensor."""

    source: TensorInfo
    choice: Choice

    @property
    def n_bytes(self) -> int:
        """Its size in the new file."""
        return tensor_bytes(self.choice.type, self.source.shape)

    @property
    def is_second_loss(self) -> bool:
        """Whether it is quantized already and would be again."""
        return self.source.type not in FLOATS and self.choice.type is not self.source.type


@dataclass(frozen=True, slots=True)
class Plan:
    """A quantization before it is done, and what it will cost."""

    file: GgufFile
    hp: Hyperparameters
    type: SettledType
    changes: Sequence[Change]
    imatrix: Imatrix | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(change.n_bytes for change in self.changes)

    @property
    def bits_per_weight(self) -> float:
        """Average over all weights."""
        return 8 * self.n_bytes / sum(change.source.n_weights for change in self.changes)

    @property
    def choices(self) -> list[Choice]:
        """The type of every tensor."""
        return [change.choice for change in self.changes]

    @property
    def record(self) -> Record:
        """What the new file says of its types: the recipe, as overrides have changed it."""
        return record_of(self.type, self.hp, self.choices)

    @property
    def used_imatrix(self) -> Imatrix | None:
        """The importance matrix, if any tensor is encoded with it."""
        return used_imatrix(self.imatrix, [change.source for change in self.changes], self.choices)

    @property
    def metadata(self) -> dict[str, Field]:
        """What the new file says of itself."""
        return metadata_of_output(self.file.metadata, self.record.type, self.used_imatrix)

    @property
    def notes(self) -> list[str]:
        """What a person should know of it."""
        tensors = [change.source for change in self.changes]
        return list(notes_on_output(tensors, self.choices, self.record, self.imatrix, self.hp.n_layers))

    @property
    def file_size(self) -> int:
        """Bytes of the new file, header included."""
        tensors = [
            PlannedTensor(each.source.name, each.source.shape, each.choice.type) for each in self.changes
        ]
        return plan_gguf(self.metadata, tensors).size

    @property
    def n_requantized(self) -> int:
        """Tensors that are quantized already and change their type."""
        return sum(change.is_second_loss for change in self.changes)

    @property
    def n_bytes_per_token(self) -> float:
        """Weight bytes that the decoding of one token reads."""
        roles = ((change.n_bytes, role_of(change.source.name)) for change in self.changes)
        return sum(n_bytes * (read_fraction(self.hp, role) if role else 1.0) for n_bytes, role in roles)


def plan_quantization(
    source: Path,
    choice: TypeChoice,
    overrides: Overrides | None = None,
    *,
    allow_requantize: bool = False,
    imatrix: Imatrix | None = None,
) -> Plan:
    """Read `source` and choose a type for each tensor; nothing is written. With `imatrix`, weights will be
    encoded by what they count.

    Raises FileError or FormatError for the file, UsageError for overrides that cannot be met and for an
    importance matrix of another model, RequantizeError if tensors that are quantized already would be
    quantized again without `allow_requantize`.
    """
    file, hp = read_model(source)
    plan = plan_file(file, hp, choice, overrides, imatrix)
    if plan.n_requantized and not allow_requantize:
        first = next(change for change in plan.changes if change.is_second_loss)
        raise RequantizeError(
            f"{plan.n_requantized} tensors are quantized already",
            where=f"{first.source.name}: {type_name(first.source.type)} to {type_name(first.choice.type)}",
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
    """As `plan_quantization`, of a file that is read already; nobody asks whether it is quantized."""
    choice = settled(choice, hp)
    tensors = list(file.tensors.values())
    refuse_foreign(imatrix, tensors)
    chosen = choose_types(tensors, hp, choice, overrides, imatrix=imatrix is not None)
    changes = [Change(tensor, each) for tensor, each in zip(tensors, chosen, strict=True)]
    return Plan(file, hp, choice, changes, imatrix)


def quantize_file(
    plan: Plan,
    out: Path,
    *,
    threads: int = 0,
    force: bool = False,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Summary:
    """Carry out `plan`. Resumable, complete or not at all: see `write_output`, also for what it raises."""
    with opened(plan.file) as descriptor:
        jobs = jobs_of(plan, descriptor)
        for text in plan.notes:
            listen(Note(text))
        return write_output(
            out,
            plan.metadata,
            jobs,
            {
                "the source": list(plan.file.identity),
                **identity_of_output(plan.record.type, plan.choices, plan.used_imatrix),
            },
            sources=[plan.file.path],
            threads=threads,
            force=force,
            listen=listen,
            stop=stop,
        )


def jobs_of(plan: Plan, descriptor: int) -> list[TensorJob]:
    """How to make each tensor of `plan` from its source, which is open as `descriptor`."""
    return [
        TensorJob(
            each.source.name,
            each.source.shape,
            each.choice.type,
            GgufRows(plan.file.path, descriptor, each.source),
            importance_of(plan.imatrix, each.source, each.choice),
        )
        for each in plan.changes
    ]


def default_output(source: Path, choice: TypeChoice, overrides: Overrides) -> Path:
    """`<name>-<TYPE>.gguf` in the current folder; a type that the source's name ends in is replaced."""
    return output_called(source, label_of(choice, overrides))


def output_called(source: Path, label: str) -> Path:
    """As `default_output`, where what the types are called is known and they are not yet."""
    words = "|".join(map(re.escape, (*known_words(), *ALIASES)))
    name = re.sub(rf"(?<=.)[-._]({words})$", "", source.stem, flags=re.IGNORECASE)
    return Path(f"{name}-{label}.gguf")


@dataclass(frozen=True, slots=True)
class GgufRows:
    """The rows of one tensor of an open GGUF file. Reads, never maps: a mapped file counts as our memory."""

    path: Path
    descriptor: int
    info: TensorInfo

    @property
    def type(self) -> GgmlType:
        """How the rows are stored."""
        return self.info.type

    def read(self, first_row: int, n_rows: int, scratch: Bytes) -> Bytes:
        """The rows, in `scratch`. FileError if the file cannot be read or has become shorter."""
        row = row_bytes(self.info.type, self.info.shape[-1])
        rows = scratch[: n_rows * row]
        view, offset = rows.data, self.info.offset + first_row * row
        while view:
            try:
                n_read = os.preadv(self.descriptor, [view], offset)
            except OSError as error:
                raise FileError(f"cannot read the model: {error.strerror}", where=self.path) from error
            if not n_read:
                raise FileError("the model file became shorter while it was read", where=self.path)
            view, offset = view[n_read:], offset + n_read
        return rows


@contextmanager
def opened(file: GgufFile) -> Iterator[int]:
    """A descriptor of the file, to read rows from. FileError if it cannot be opened, or is another now."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY)
    except OSError as error:
        raise FileError(f"cannot read the model: {error.strerror}", where=file.path) from error
    try:
        refuse_another(file, descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def refuse_another(file: GgufFile, descriptor: int) -> None:
    """FileError if the open file is not what it was when its header was read."""
    if identity_of(os.fstat(descriptor)) != file.identity:
        raise FileError("the model file changed meanwhile", where=file.path, remedy="run again")
