"""Convert a local folder, or a repository, whose shards are downloaded before or during the conversion."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsmoe_convert.checkpoint import SAFETENSORS, Checkpoint, digest, match_index, read_index
from dsmoe_convert.convert import (
    Conversion,
    ConvertOptions,
    RunOptions,
    check_options,
    output_name,
    plan,
    plan_folder,
    run,
)
from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.hub import HubRepository, HubRequest, locate
from dsmoe_convert.low_disk import ShardWindow
from dsmoe_convert.safetensors_file import read_tensors
from dsmoe_convert.shards import StoredTensor
from dsmoe_convert.tokenizer import read_tokenizer
from dsmoe_local.base import durable
from dsmoe_local.base.errors import InterruptedRunError, UsageError
from dsmoe_local.base.progress import Advanced, Listener, Note
from dsmoe_local.model.config_json import checkpoint_name, read_config
from dsmoe_quantize.write.output import Summary, refuse_early
from dsmoe_quantize.write.unfinished import unfinished_files


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How to access a repository. `low_disk`: keep at most two of its shards on disk."""

    revision: str | None = None
    token: str | None = None
    endpoint: str | None = None
    low_disk: bool = False


def convert(
    source: str,
    out: Path | None,
    options: ConvertOptions | None = None,
    source_options: SourceOptions | None = None,
    run_options: RunOptions | None = None,
) -> Summary:
    """Convert `source`, a folder or a repository id, to `out` (by default a file in the current folder).

    Raises UsageError, FileError (HubError), FormatError (CheckpointError, TokenizerError), MissingExtraError,
    and the errors of `dsmoe_quantize.write.output.write_output`.
    """
    options, run_options = options or ConvertOptions(), run_options or RunOptions()
    source_options = source_options or SourceOptions()
    target = out or _early_name(source, options)
    if target is not None:
        refuse_early(target, run_options.force, split=options.split_max_size is not None)
    planned = plan_source(source, options, source_options, run_options)
    target = target or Path(planned.conversion.default_name)
    if planned.staging is None:
        return run(planned.conversion, target, run_options)
    return _run_staged(planned.conversion, planned.staging, target, run_options)


def _early_name(source: str, options: ConvertOptions) -> Path | None:
    """Return `Conversion.default_name` before anything is read; None if it depends on the weights' type."""
    if options.choice is None:
        return None
    folder = locate(source)
    name = checkpoint_name(folder) if folder is not None else HubRequest(source).name
    return Path(output_name(name, options.choice, options.overrides))


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """A planned conversion. `staging` is set if shards are downloaded during the conversion."""

    conversion: Conversion
    staging: Staging | None = None


def plan_source(
    source: str,
    options: ConvertOptions,
    source_options: SourceOptions,
    run_options: RunOptions,
    *,
    headers_only: bool = False,
) -> PlannedSource:
    """Check `source` and plan its conversion. Downloads a repository's weights if that needs them all.

    `headers_only`: download only the headers of the weights, for a dry run.
    """
    planned = _planned(source, options, source_options, run_options, headers_only)
    if run_options.stop.is_set():
        raise InterruptedRunError("interrupted", remedy="run the same command again")
    return planned


def _planned(
    source: str,
    options: ConvertOptions,
    source_options: SourceOptions,
    run_options: RunOptions,
    headers_only: bool,
) -> PlannedSource:
    folder = locate(source)
    if folder is not None:
        if source_options.revision:
            raise UsageError("--revision can only be used with a repository, not with a folder")
        if source_options.low_disk:
            run_options.listen(Note("--low-disk has no effect: the checkpoint is on disk already"))
        return PlannedSource(plan_folder(folder, options, run_options.listen, stop=run_options.stop))
    request = HubRequest(source, source_options.revision, source_options.token, source_options.endpoint)
    repository = HubRepository(request, run_options.listen, run_options.stop)
    if source_options.low_disk or (headers_only and not repository.offline):
        return _plan_staged(repository, options, run_options)
    return PlannedSource(_plan_cached(repository, options, run_options))


def _plan_cached(repository: HubRepository, options: ConvertOptions, run_options: RunOptions) -> Conversion:
    """Download the checkpoint to the cache and plan. Small files are checked before weights are fetched."""
    folder = repository.fetch_small_files()
    if repository.offline:
        return plan_folder(folder, options, run_options.listen, name=repository.name, stop=run_options.stop)
    hp = read_config(folder)
    read_tokenizer(folder, hp.n_vocab, options.pre, lambda text: None)
    check_options(hp, options)
    _, files = repository.weight_files(folder, allow_pickle=options.allow_pickle)
    repository.fetch_weights(files)
    return plan_folder(
        folder,
        options,
        run_options.listen,
        name=repository.name,
        identity=repository.identity,
        stop=run_options.stop,
    )


class Staging:
    """The folder beside the output for shards that are downloaded and deleted during the conversion.

    It is created by the first download, when the output is locked.
    """

    def __init__(self, repository: HubRepository, shards: list[str], listen: Listener) -> None:
        self.out = Path()
        self.n_output = 0
        self.window: ShardWindow
        self._shards = shards
        self._repository = repository
        self._listen = listen
        self._is_open = False

    @property
    def folder(self) -> Path:
        """The hidden folder beside the output."""
        return self.out.with_name(f".{self.out.name}.shards")

    def _open(self) -> None:
        """Create the folder, delete what an interrupted run left and is not needed, and check free space."""
        self.folder.mkdir(exist_ok=True)
        for partial in self.folder.rglob("*.incomplete"):
            partial.unlink(missing_ok=True)
        # Keep only shards that the window will ask for first.
        n_shards = self.window.n_shards
        for shard in set(self._shards) - set(self.window.sequence[:n_shards]):
            (self.folder / shard).unlink(missing_ok=True)
        largest = sorted((self._repository.sizes[shard] for shard in self._shards), reverse=True)[:n_shards]
        unfinished = unfinished_files(self.out)
        n_held = sum(path.lstat().st_blocks * 512 for path in unfinished)
        missing = self.n_output - n_held if unfinished else 0
        durable.require_space(self.out.parent, max(0, missing) + sum(largest))
        self._is_open = True

    def fetch(self, shard: str) -> tuple[Path, Mapping[str, StoredTensor]]:
        """Download a shard; see `low_disk.Fetch`."""
        if not self._is_open:
            self._open()
        number = self._shards.index(shard) + 1
        self._listen(Advanced(0, f"downloading shard {number} of {len(self._shards)}"))
        path = self._repository.fetch_to(shard, self.folder)
        return path, read_tensors(path)

    def remove(self) -> None:
        """Delete the folder with its content."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _plan_staged(
    repository: HubRepository, options: ConvertOptions, run_options: RunOptions
) -> PlannedSource:
    """Plan a conversion from the headers of remote shards."""
    if repository.offline:
        raise UsageError("the shards must be downloaded, but HF_HUB_OFFLINE is set", remedy="unset it")
    # Old versions of the library's transfer layer keep 10 GB of chunks otherwise.
    os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
    folder = repository.fetch_small_files()
    hp = read_config(folder)
    form, shards = repository.weight_files(folder, allow_pickle=options.allow_pickle)
    if form is not SAFETENSORS:
        raise CheckpointError(
            "--low-disk and --dry-run need safetensors, but the weights are pickles (.bin)",
            where=repository.name,
            remedy="convert it without --low-disk or --dry-run",
        )
    headers = {shard: repository.tensors_of(shard) for shard in shards}
    tensors = headers[shards[0]]
    if shards != [form.single]:
        tensors = match_index(read_index(folder / form.index, form.suffix), headers, folder)
    staging = Staging(repository, shards, run_options.listen)
    window = staging.window = ShardWindow(staging.fetch, run_options.stop)
    identity = {**repository.identity, "headers": digest(tensors.values())}
    checkpoint = Checkpoint(repository.name, tensors, window, identity)
    return PlannedSource(plan(checkpoint, folder, hp, options, run_options.listen), staging)


def _run_staged(conversion: Conversion, staging: Staging, out: Path, run_options: RunOptions) -> Summary:
    staging.out, staging.n_output = out.resolve(), conversion.n_bytes
    summary = run(conversion, out, run_options)
    staging.remove()
    return summary
