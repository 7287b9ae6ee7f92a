"""Checkpoint to GGUF in one pass: plan every tensor, then let the streaming encoder fetch and write them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsmoe_convert.checkpoint import Checkpoint, check_tensors, main_type, open_checkpoint
from dsmoe_convert.metadata import general_fields, license_of
from dsmoe_convert.rows import rows_of, source_position
from dsmoe_convert.stored import DTYPES
from dsmoe_convert.tokenizer import read_tokenizer
from dsmoe_local.base.progress import Listener, Note, ignore
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.config_json import read_config
from dsmoe_local.model.ggml import GgmlType, tensor_bytes
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.gguf_model import metadata_of
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, TensorSpec, tensor_specs
from dsmoe_quantize.errors import WeightError
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Choice, Overrides, choose_types, label_of
from dsmoe_quantize.policy.recipes import LayeredRecipe
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
from dsmoe_quantize.policy.types import SettledType, TypeChoice, resolve, resolve_float, settled
from dsmoe_quantize.write.encoder import TensorJob
from dsmoe_quantize.write.output import Summary, write_output

_ALWAYS_F32 = (Role.NORM, Role.ROUTER)


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What decides the content of the file. `type` None keeps the checkpoint's own, but for a `recipe`; `pre`
    None recognises. With an `imatrix`, weights are encoded by what they count.
    """

    type: str | None = None
    overrides: Overrides = field(default_factory=Overrides)
    pre: str | None = None
    allow_pickle: bool = False
    recipe: LayeredRecipe | None = None
    imatrix: Imatrix | None = None

    @property
    def choice(self) -> TypeChoice | None:
        """The type asked for. UsageError if `type` is none."""
        return self.recipe or (None if self.type is None else resolve(self.type))


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How the work is done; nothing here changes a byte of the file."""

    threads: int = 0
    force: bool = False
    listen: Listener = ignore
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the layout and the type it has in an unquantized file. What choose_types looks at."""

    spec: TensorSpec
    type: GgmlType

    @property
    def name(self) -> str:
        """The GGUF name."""
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first."""
        return self.spec.shape


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that is checked and ready to run. `choices` has a type for each of `tensors`, `record` is
    what the file says of them.
    """

    checkpoint: Checkpoint
    hp: Hyperparameters
    choice: SettledType
    tensors: Sequence[PlannedTensor]
    choices: Sequence[Choice]
    record: Record
    metadata: Mapping[str, Field]
    overrides: Overrides
    imatrix: Imatrix | None = None

    @property
    def used_imatrix(self) -> Imatrix | None:
        """The importance matrix, if any tensor is encoded with it."""
        return used_imatrix(self.imatrix, self.tensors, self.choices)

    @property
    def notes(self) -> list[str]:
        """What a person should know of it."""
        return list(notes_on_output(self.tensors, self.choices, self.record, self.imatrix, self.hp.n_layers))

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights in the file."""
        pairs = zip(self.tensors, self.choices, strict=True)
        return sum(tensor_bytes(choice.type, tensor.shape) for tensor, choice in pairs)

    @property
    def default_name(self) -> str:
        """The output's name when the user gives none."""
        return output_name(self.checkpoint.name, self.choice, self.overrides)


def output_name(name: str, choice: TypeChoice, overrides: Overrides) -> str:
    """The default name of the output of the checkpoint called `name`."""
    return f"{name}-{label_of(choice, overrides)}.gguf"


def plan_folder(
    folder: Path,
    options: ConvertOptions,
    listen: Listener = ignore,
    *,
    name: str = "",
    identity: Mapping[str, object] | None = None,
    stop: threading.Event | None = None,
) -> Conversion:
    """Read and check everything about the checkpoint in `folder` but its weights.

    `name` and `identity` replace those that follow from the folder. Raises FileError, FormatError
    (CheckpointError, TokenizerError) or UsageError.
    """
    hp = read_config(folder)
    checkpoint = open_checkpoint(folder, allow_pickle=options.allow_pickle, stop=stop)
    checkpoint = replace(checkpoint, name=name or checkpoint.name, identity=identity or checkpoint.identity)
    return plan(checkpoint, folder, hp, options, listen)


def plan(
    checkpoint: Checkpoint, folder: Path, hp: Hyperparameters, options: ConvertOptions, listen: Listener
) -> Conversion:
    """Plan the conversion of a checkpoint whose configuration and tokenizer are in `folder`."""

    def note(text: str) -> None:
        listen(Note(safe_line(text)))

    check_tensors(checkpoint.tensors, hp, checkpoint.name)
    specs = tensor_specs(hp)
    own = main_type(checkpoint.tensors, specs)
    planned = [PlannedTensor(spec, GgmlType.F32 if spec.role in _ALWAYS_F32 else own) for spec in specs]
    _note_mixed(checkpoint, planned, note)
    choice, choices = _chosen(planned, hp, options, own)
    metadata = {
        **general_fields(hp, safe_line(checkpoint.name), license_of(folder)),
        **metadata_of(hp),
        **read_tokenizer(folder, hp.n_vocab, options.pre, note),
    }
    record = record_of(choice, hp, choices)
    used = used_imatrix(options.imatrix, planned, choices)
    metadata = metadata_of_output(metadata, record.type, used)
    return Conversion(
        checkpoint, hp, choice, planned, choices, record, metadata, options.overrides, options.imatrix
    )


def check_options(hp: Hyperparameters, options: ConvertOptions) -> None:
    """Raise what `plan` would about types and the importance matrix, before any weight is there."""
    planned = [PlannedTensor(spec, GgmlType.BF16) for spec in tensor_specs(hp)]
    _chosen(planned, hp, options, GgmlType.BF16)


def _chosen(
    planned: Sequence[PlannedTensor], hp: Hyperparameters, options: ConvertOptions, own: GgmlType
) -> tuple[SettledType, list[Choice]]:
    """The types of tensors that are stored in `own`. UsageError."""
    refuse_foreign(options.imatrix, planned)
    choice = settled(options.choice or resolve_float(own), hp)
    return choice, choose_types(planned, hp, choice, options.overrides, imatrix=options.imatrix is not None)


def run(conversion: Conversion, out: Path, run_options: RunOptions) -> Summary:
    """Write the file. See write_output for what survives an interruption and what it raises."""
    specs = tensor_specs(conversion.hp)
    jobs = [
        TensorJob(
            tensor.name,
            tensor.shape,
            chosen.type,
            rows_of(conversion.checkpoint, tensor.spec),
            importance_of(conversion.imatrix, tensor, chosen),
        )
        for tensor, chosen in zip(conversion.tensors, conversion.choices, strict=True)
    ]
    for text in conversion.notes:
        run_options.listen(Note(text))
    sources = {spec.name: [conversion.checkpoint.tensors[name] for name in spec.sources] for spec in specs}

    def arrange(left: Sequence[TensorJob]) -> Sequence[TensorJob]:
        by_name = {job.name: job for job in left}
        order = conversion.checkpoint.shards.arrange({name: sources[name] for name in by_name})
        return [by_name[name] for name in order]

    try:
        return write_output(
            out,
            conversion.metadata,
            jobs,
            {
                "the checkpoint": conversion.checkpoint.identity,
                **identity_of_output(conversion.record.type, conversion.choices, conversion.used_imatrix),
            },
            sources=conversion.checkpoint.files,
            threads=run_options.threads,
            force=run_options.force,
            arrange=arrange,
            journaled=conversion.checkpoint.shards.release,
            listen=run_options.listen,
            stop=run_options.stop,
        )
    except WeightError as error:
        raise _in_checkpoint_terms(error, specs) from error
    finally:
        conversion.checkpoint.shards.close()


def convert_folder(
    folder: Path, out: Path, options: ConvertOptions | None = None, run_options: RunOptions | None = None
) -> Summary:
    """Convert the checkpoint in `folder` to the file `out`. Raises what `plan_folder` and `run` raise."""
    run_options = run_options or RunOptions()
    planned = plan_folder(folder, options or ConvertOptions(), run_options.listen, stop=run_options.stop)
    return run(planned, out, run_options)


def _note_mixed(
    checkpoint: Checkpoint, planned: Sequence[PlannedTensor], note: Callable[[str], None]
) -> None:
    """Say so where matrices are stored in another float type than most."""
    others = [
        tensor.name
        for tensor in planned
        if tensor.spec.role not in _ALWAYS_F32
        and any(
            DTYPES[checkpoint.tensors[source].dtype].ggml is not tensor.type for source in tensor.spec.sources
        )
    ]
    if others:
        note(f"{len(others)} matrices have another float type than most, the first is {others[0]}")


def _in_checkpoint_terms(error: WeightError, specs: Sequence[TensorSpec]) -> WeightError:
    spec = next(spec for spec in specs if spec.name == error.tensor)
    name, index = source_position(spec, error.index)
    return WeightError(error.what, tensor=name, index=index, remedy=error.remedy)
