"""GGUF to GGUF: read a model, choose types, write it again. The steps are other modules'."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from dsmoe_local.base.errors import FileError
from dsmoe_local.base.progress import Listener, Note, ignore
from dsmoe_local.model.cost import read_fraction
from dsmoe_local.model.ggml import FLOATS, GgmlType, row_bytes, tensor_bytes, type_name
from dsmoe_local.model.gguf_file import Field, GgufFile, TensorInfo, identity_of
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.gguf_writer import PlannedTensor, plan_gguf
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import role_of
from dsmoe_quantize.choose import Choice, Wishes, choose_types, fallback_notes, label_of
from dsmoe_quantize.encode import Bytes, TensorJob
from dsmoe_quantize.errors import RequantizeError
from dsmoe_quantize.imatrix import Imatrix, metadata_of_use
from dsmoe_quantize.mixes import ALIASES
from dsmoe_quantize.output import Summary, write_output
from dsmoe_quantize.recipe_file import render_recipe
from dsmoe_quantize.recipes import RECIPE_KEY, LayeredRecipe
from dsmoe_quantize.types import TypeChoice, known_words, metadata_with_type


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
    type: TypeChoice
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
    def metadata(self) -> dict[str, Field]:
        """What the new file says of itself."""
        metadata = metadata_with_type(self.file.metadata, self.type)
        if isinstance(self.type, LayeredRecipe):
            metadata[RECIPE_KEY] = Field(render_recipe(self.type), GGUFValueType.STRING)
        return metadata | (metadata_of_use(self.imatrix) if self.imatrix else {})

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
    wishes: Wishes | None = None,
    *,
    allow_requantize: bool = False,
    imatrix: Imatrix | None = None,
) -> Plan:
    """Read `source` and choose a type for each tensor; nothing is written. With `imatrix`, weights will be
    encoded by what they count.

    Raises FileError or FormatError for the file, UsageError for wishes that cannot be met and for an
    importance matrix of another model, RequantizeError if tensors that are quantized already would be
    quantized again without `allow_requantize`.
    """
    file, hp = read_model(source)
    plan = plan_file(file, hp, choice, wishes, imatrix)
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
    wishes: Wishes | None = None,
    imatrix: Imatrix | None = None,
) -> Plan:
    """As `plan_quantization`, of a file that is read already; nobody asks whether it is quantized."""
    tensors = list(file.tensors.values())
    if imatrix is not None:
        for tensor in tensors:
            imatrix.importance(tensor.name, tensor.shape)
    chosen = choose_types(tensors, hp, choice, wishes, imatrix=imatrix is not None)
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
    path = plan.file.path
    for text in fallback_notes([change.choice for change in plan.changes]):
        listen(Note(text))
    with opened(plan.file) as descriptor:
        jobs = [
            TensorJob(
                each.source.name,
                each.source.shape,
                each.choice.type,
                GgufRows(path, descriptor, each.source),
                _importance(plan, each),
            )
            for each in plan.changes
        ]
        for text in _notes_of_importance(plan, jobs):
            listen(Note(text))
        return write_output(
            out,
            plan.metadata,
            jobs,
            _fingerprint(plan),
            sources=[path],
            threads=threads,
            force=force,
            listen=listen,
            stop=stop,
        )


def default_output(source: Path, choice: TypeChoice, wishes: Wishes) -> Path:
    """`<name>-<TYPE>.gguf` in the current folder; a type that the source's name ends in is replaced."""
    words = "|".join(map(re.escape, (*known_words(), *ALIASES)))
    name = re.sub(rf"[-._]({words})$", "", source.stem, flags=re.IGNORECASE)
    return Path(f"{name}-{label_of(choice, wishes)}.gguf")


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


def _importance(plan: Plan, change: Change) -> NDArray[np.float32] | None:
    """What the columns of a tensor count that is encoded anew."""
    if plan.imatrix is None or change.choice.type in FLOATS or change.choice.type is change.source.type:
        return None
    return plan.imatrix.importance(change.source.name, change.source.shape)


def _notes_of_importance(plan: Plan, jobs: Sequence[TensorJob]) -> Iterator[str]:
    """What a matrix does not know of tensors that are encoded: the output and the embedding often."""
    if plan.imatrix is None:
        return
    blind = [
        job.name
        for job in jobs
        if job.importance is None and job.target not in FLOATS and job.target is not job.source.type
    ]
    if blind:
        more = f" and {len(blind) - 3} more" if len(blind) > 3 else ""
        yield f"the importance matrix says nothing of {', '.join(blind[:3])}{more}"


@contextmanager
def opened(file: GgufFile) -> Iterator[int]:
    """A descriptor of the file, to read rows from. FileError if it cannot be opened, or is another now."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY)
    except OSError as error:
        raise FileError(f"cannot read the model: {error.strerror}", where=file.path) from error
    try:
        if identity_of(os.fstat(descriptor)) != file.identity:
            raise FileError("the model file changed meanwhile", where=file.path, remedy="run again")
        yield descriptor
    finally:
        os.close(descriptor)


def _fingerprint(plan: Plan) -> dict[str, object]:
    """What decides the bytes of the output."""
    types = "\n".join(f"{each.source.name} {type_name(each.choice.type)}" for each in plan.changes)
    recipe = render_recipe(plan.type) if isinstance(plan.type, LayeredRecipe) else ""
    return {
        "the source": list(plan.file.identity),
        "the type": plan.type.name,
        "the tensors' types": hashlib.sha256(types.encode()).hexdigest(),
        "the recipe": hashlib.sha256(recipe.encode()).hexdigest() if recipe else None,
        "the importance matrix": plan.imatrix.digest() if plan.imatrix else None,
    }
