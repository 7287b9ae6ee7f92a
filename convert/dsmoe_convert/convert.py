"""Convert a checkpoint to GGUF in one pass: plan all tensors, then encode and write them as they are read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsmoe_convert.checkpoint import (
    Checkpoint,
    check_tensors,
    main_type,
    open_checkpoint,
    specs_of,
    with_scales,
)
from dsmoe_convert.metadata import general_fields, license_of
from dsmoe_convert.rows import rows_of, source_position
from dsmoe_convert.shards import DTYPES
from dsmoe_convert.tokenizer import read_tokenizer
from dsmoe_local.base.progress import Listener, Note, ignore
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.config_json import read_config, read_weight_block
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.gguf_model import metadata_of
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import UNQUANTIZED_ROLES, TensorSpec, unquantized
from dsmoe_quantize.errors import WeightError
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Overrides, label_of
from dsmoe_quantize.policy.plan import TypePlan, plan_types
from dsmoe_quantize.policy.recipes import LayeredRecipe
from dsmoe_quantize.policy.types import TypeChoice, resolve, resolve_float
from dsmoe_quantize.write.encoder import TensorJob
from dsmoe_quantize.write.output import Summary, write_output


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The options that decide the content of the file.

    Without `type` and `recipe` the weights keep the checkpoint's type. `pre` names the pre-tokenizer; None:
    recognise it. With an `imatrix`, weights are encoded by their importance. A file that would exceed
    `split_max_size` bytes is split into several.
    """

    type: str | None = None
    overrides: Overrides = field(default_factory=Overrides)
    pre: str | None = None
    allow_pickle: bool = False
    recipe: LayeredRecipe | None = None
    imatrix: Imatrix | None = None
    split_max_size: int | None = None

    @property
    def choice(self) -> TypeChoice | None:
        """The type asked for; None: the checkpoint's own. Raises UsageError if `type` is unknown."""
        return self.recipe or (None if self.type is None else resolve(self.type))


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options that have no effect on the content of the file."""

    threads: int = 0
    force: bool = False
    listen: Listener = ignore
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Conversion(TypePlan):
    """A conversion that was checked and is ready to run. `metadata` is that of the new file."""

    checkpoint: Checkpoint = field(kw_only=True)
    metadata: Mapping[str, Field] = field(kw_only=True)
    overrides: Overrides = field(kw_only=True)
    split_max_size: int | None = None

    @property
    def default_name(self) -> str:
        """The output's name if the user gives none."""
        return output_name(self.checkpoint.name, self.type, self.overrides)


def output_name(name: str, choice: TypeChoice, overrides: Overrides) -> str:
    """Return the default name of the output for a checkpoint called `name`."""
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
    """Read and check everything in the checkpoint in `folder` except its weights.

    `name` and `identity` replace those of the folder. Raises FileError, FormatError (CheckpointError,
    TokenizerError) or UsageError.
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

    checkpoint = with_scales(checkpoint, read_weight_block(folder))
    check_tensors(checkpoint.tensors, hp, checkpoint.name)
    # Layers for multi-token prediction are left out of the file.
    hp = replace(hp, n_mtp_layers=0)
    specs = specs_of(checkpoint.tensors, hp)
    own = main_type(checkpoint.tensors, specs)
    _note_mixed(checkpoint, specs, own, note)
    types = _types(hp, options, own)
    metadata = {
        **general_fields(hp, safe_line(checkpoint.name), license_of(folder)),
        **metadata_of(hp),
        **read_tokenizer(folder, hp.n_vocab, options.pre, note),
    }
    return Conversion(
        hp,
        types.type,
        types.choices,
        options.imatrix,
        checkpoint=checkpoint,
        metadata=types.metadata_of(metadata),
        overrides=options.overrides,
        split_max_size=options.split_max_size,
    )


def check_options(hp: Hyperparameters, options: ConvertOptions) -> None:
    """Raise the errors of `plan` that concern types and the importance matrix. Needs no weights."""
    _types(hp, options, GgmlType.BF16)


def _types(hp: Hyperparameters, options: ConvertOptions, own: GgmlType) -> TypePlan:
    """Choose the types of tensors that are stored in the type `own`. Raises UsageError."""
    choice = options.choice or resolve_float(own)
    return plan_types(unquantized(hp, own), hp, choice, options.overrides, options.imatrix)


def run(conversion: Conversion, out: Path, run_options: RunOptions) -> Summary:
    """Write the file. `write_output` describes interruptions and errors."""
    specs = specs_of(conversion.checkpoint.tensors, conversion.hp)
    jobs = [
        TensorJob(
            choice.name,
            choice.shape,
            choice.type,
            rows_of(conversion.checkpoint, spec),
            conversion.importance_of(choice),
        )
        for spec, choice in zip(specs, conversion.choices, strict=True)
    ]
    for text in conversion.notes:
        run_options.listen(Note(text))
    sources = {spec.name: conversion.checkpoint.read_for(spec.sources) for spec in specs}

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
                **conversion.fingerprint,
            },
            sources=conversion.checkpoint.files,
            split_max_size=conversion.split_max_size,
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
    """Convert the checkpoint in `folder` to the file `out`. Raises the errors of `plan_folder` and `run`."""
    run_options = run_options or RunOptions()
    planned = plan_folder(folder, options or ConvertOptions(), run_options.listen, stop=run_options.stop)
    return run(planned, out, run_options)


def _note_mixed(
    checkpoint: Checkpoint, specs: Sequence[TensorSpec], own: GgmlType, note: Callable[[str], None]
) -> None:
    """Tell the user if some matrices have another float type than most."""
    others = [
        spec.name
        for spec in specs
        if spec.role not in UNQUANTIZED_ROLES
        and any(DTYPES[checkpoint.tensors[source].dtype].ggml is not own for source in spec.sources)
    ]
    if others:
        note(f"{len(others)} matrices have another float type than most, the first is {others[0]}")


def _in_checkpoint_terms(error: WeightError, specs: Sequence[TensorSpec]) -> WeightError:
    spec = next((spec for spec in specs if spec.name == error.tensor), None)
    if spec is None:
        return error  # about a scale of the checkpoint
    name, index = source_position(spec, error.index)
    return WeightError(error.what, tensor=name, index=index, remedy=error.remedy)
