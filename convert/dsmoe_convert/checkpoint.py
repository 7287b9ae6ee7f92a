"""Open the checkpoint in a folder: which tensors it has, and where they are. `shards` reads their data.

Weights are in one or several safetensors files, or `.bin` files if allowed. The index is not trusted: it
may only name files in its own folder, and every tensor must be in the file it names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import threading
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_convert import pickle_bin, safetensors_file
from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.fp8 import Scales, split_scales
from dsmoe_convert.shards import DTYPES, LocalShards, ShardSource, StoredTensor
from dsmoe_local.base.errors import MissingExtraError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.architectures import ARCHITECTURES
from dsmoe_local.model.config_json import checkpoint_name
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.json_object import load_json
from dsmoe_local.model.layout import TensorSpec, tensor_specs

_MAX_INDEX = 256 << 20
_READ_BESIDE = ("config.json", "tokenizer.json")
_MTP_PROJECTION = "eh_proj.weight"
"""A tensor that only layers for multi-token prediction have."""
_MISSING_REMEDY = "use the model's own config.json; if it is, download the weights again"
_LM_HEAD = "lm_head.weight"

Reader = Callable[[Path, threading.Event | None], Mapping[str, StoredTensor]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of a model. `identity` changes when any shard changes.

    `files` are the files on disk that a conversion reads. `scales` are those of FP8 weights; `with_scales`
    finds them among the tensors.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    shards: ShardSource
    identity: Mapping[str, object]
    files: tuple[Path, ...] = ()
    scales: Scales | None = None

    def read_for(self, names: Iterable[str]) -> list[StoredTensor]:
        """Return the weights of these names and their scales, if they have any."""
        found = [self.tensors[name] for name in names]
        scales = self.scales.tensors if self.scales else {}
        return found + [scales[tensor.name] for tensor in found if tensor.name in scales]


@dataclass(frozen=True, slots=True)
class Form:
    """A file format of weights: the names of a single file and of an index, and the parser of the files."""

    single: str
    index: str
    suffix: str
    read: Reader


SAFETENSORS = Form(
    "model.safetensors", "model.safetensors.index.json", ".safetensors", safetensors_file.read_tensors
)
PICKLE = Form("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", pickle_bin.read_tensors)


def open_checkpoint(
    folder: Path, *, allow_pickle: bool = False, stop: threading.Event | None = None
) -> Checkpoint:
    """Open the checkpoint in `folder`; read and check its headers.

    Raises FileError if a file cannot be read; CheckpointError if a file is malformed, missing or not
    supported; MissingExtraError for `.bin` files without torch; InterruptedRunError if `stop` is set.
    """
    form = find_form(folder, allow_pickle=allow_pickle)
    if (folder / form.single).exists():
        tensors = dict(form.read(folder / form.single, stop))
    else:
        weight_map = read_index(folder / form.index, form.suffix)
        shards = {
            shard: form.read(_existing(folder / shard), stop) for shard in sorted(set(weight_map.values()))
        }
        tensors = match_index(weight_map, shards, folder)
    names = sorted({tensor.shard for tensor in tensors.values()})
    files = tuple(folder / name for name in (*names, *_READ_BESIDE) if (folder / name).exists())
    identity = {
        "shards": {name: _state(folder / name) for name in names},
        "headers": digest(tensors.values()),
    }
    return Checkpoint(checkpoint_name(folder), tensors, LocalShards(folder), identity, files)


def find_form(folder: Path, *, allow_pickle: bool) -> Form:
    """Return the format of the weights in `folder`. safetensors take precedence over pickles.

    Raises CheckpointError if there are no weights, and the errors of `check_pickle`.
    """
    for form in (SAFETENSORS, PICKLE):
        if (folder / form.single).exists() or (folder / form.index).exists():
            if form is PICKLE:
                check_pickle(folder, allowed=allow_pickle)
            return form
    for form in (SAFETENSORS, PICKLE):
        if any(folder.glob(f"*-of-*{form.suffix}")):
            raise CheckpointError(
                f"{form.index} is missing, which lists the tensors of the shards",
                where=folder,
                remedy="download it into this folder",
            )
    raise CheckpointError(
        "the folder has no weights",
        where=folder,
        remedy=f"expected {SAFETENSORS.single}, {SAFETENSORS.index} or {PICKLE.single}",
    )


def check_pickle(where: str | Path, *, allowed: bool) -> None:
    """Raise CheckpointError unless `.bin` weights are `allowed`, MissingExtraError if torch is missing."""
    if not allowed:
        raise CheckpointError(
            "the weights are pickles (.bin), which can contain code",
            where=where,
            remedy="use a safetensors version, or --allow-pickle if you trust the source",
        )
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("pickle", "torch", ".bin files")


def read_index(path: Path, suffix: str) -> dict[str, str]:
    """Return the weight_map of an index, from tensor to shard.

    Raises CheckpointError for paths to other folders.
    """
    weight_map = load_json(path, _MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", where=path, remedy="download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_file_name(shard, suffix):
            raise CheckpointError(
                f"the index names an invalid shard: {safe_line(json.dumps(shard), 50)}",
                where=f"{path}: {safe_line(name, 80)}",
                remedy=f"accepted: names of {suffix} files in the same folder",
            )
    return weight_map


def match_index(
    weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, StoredTensor]], folder: Path
) -> dict[str, StoredTensor]:
    """Return where each tensor of the index is in its shard.

    Raises CheckpointError if index and shards differ.
    """
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"a tensor of the index is missing in {safe_line(shard, 50)}",
                where=safe_line(name, 100),
                remedy=f"download it again: {folder / shard}",
            )
    for shard, stored in shards.items():
        for name in stored:
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{safe_line(shard, 50)} has a tensor that the index does not list for it",
                    where=f"{folder}: {safe_line(name, 80)}",
                    remedy="download the index and the shard again",
                )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def with_scales(checkpoint: Checkpoint, block: tuple[int, int] | None) -> Checkpoint:
    """Return the checkpoint with the scales separated from the weights; see `fp8.split_scales`."""
    tensors, scales = split_scales(checkpoint.tensors, block, checkpoint.name)
    if scales is None:
        return checkpoint
    identity = {**checkpoint.identity, "block": scales.block}
    return replace(checkpoint, tensors=tensors, scales=scales, identity=identity)


def check_tensors(tensors: Mapping[str, StoredTensor], hp: Hyperparameters, where: str) -> None:
    """Raise CheckpointError unless `tensors` are exactly those of a model with these hyper-parameters."""
    specs = specs_of(tensors, hp)
    expected = {source: spec.source_shape for spec in specs for source in spec.sources}
    missing = [name for name in expected if name not in tensors]
    _refuse_some(missing, "missing from the checkpoint", where, _MISSING_REMEDY)
    extra = [name for name in tensors if name not in expected and not _may_ignore(name, hp, tensors)]
    what = f"not part of a {hp.architecture} model with this config.json"
    _refuse_some(extra, what, where, "use the model's own config.json")
    for name, shape in expected.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{safe_line(name, 60)} has the shape {list(stored.shape)[:4]}, not {list(shape)}",
                where=where,
                remedy="the weights do not match config.json; use the model's own config.json",
            )
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{safe_line(name, 60)} is stored as {safe_line(stored.dtype, 20)}",
                where=where,
                remedy=f"accepted: {', '.join(DTYPES)}",
            )
    _refuse_mixed_experts(tensors, specs, where)


def specs_of(tensors: Mapping[str, StoredTensor], hp: Hyperparameters) -> tuple[TensorSpec, ...]:
    """Return the tensors of a model with the sources that this checkpoint has: its experts may be fused."""
    return tuple(
        spec.from_fused() if spec.fused and spec.fused[0] in tensors else spec for spec in tensor_specs(hp)
    )


def _refuse_mixed_experts(
    tensors: Mapping[str, StoredTensor], specs: Iterable[TensorSpec], where: str
) -> None:
    """Refuse experts of a layer that differ in type: they become one tensor."""
    for spec in specs:
        main = tensors[spec.sources[0]].dtype
        for stored in (tensors[source] for source in spec.sources):
            if stored.dtype != main:
                raise CheckpointError(
                    f"{safe_line(stored.name, 60)} is stored as {stored.dtype}",
                    where=where,
                    remedy=f"expert 0 of its layer is stored as {main}; all experts must have one type",
                )


def main_type(tensors: Mapping[str, StoredTensor], specs: Iterable[TensorSpec]) -> GgmlType:
    """Return the checkpoint's own type: the float type of most of its bytes."""
    sizes: dict[str, int] = {}
    for spec in specs:
        for stored in (tensors[source] for source in spec.sources):
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.n_bytes
    return DTYPES[max(sizes, key=lambda dtype: sizes[dtype])].ggml


def digest(tensors: Iterable[StoredTensor]) -> str:
    """Return a hash of everything in the headers: names, types, shapes and offsets."""
    state = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        state.update(
            f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0{tensor.shard}\0{tensor.offset}\n".encode()
        )
    return state.hexdigest()


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(
            f"the shard {safe_line(path.name, 60)} is missing", where=path.parent, remedy="download it again"
        )
    return path


def _is_file_name(text: str, suffix: str) -> bool:
    return (
        text.endswith(suffix)
        and text == Path(text).name
        and not text.startswith(".")
        and "\\" not in text
        and text.isprintable()
    )


def _may_ignore(name: str, hp: Hyperparameters, names: Container[str]) -> bool:
    # Training frameworks may save a copy of a tied embedding as the output.
    if name == _LM_HEAD and hp.tied_embeddings:
        return True
    architecture = ARCHITECTURES[hp.architecture]
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None and hp.n_layers <= int(layer[1]) < hp.n_stored_layers:
        return f"{layer[0]}{_MTP_PROJECTION}" in names
    return architecture.ignored_sources is not None and bool(architecture.ignored_sources.fullmatch(name))


def _refuse_some(names: list[str], what: str, where: str, remedy: str) -> None:
    """Raise CheckpointError with the first name and the number of the others, unless there are none."""
    if names:
        more = f" and {len(names) - 1} more tensors are" if len(names) > 1 else " is"
        raise CheckpointError(f"{safe_line(names[0], 60)}{more} {what}", where=where, remedy=remedy)
