"""Download a GGUF model from a hub: choose one of a repository, verify its digest, and give it its name.

A file has a hidden temporary name until it is complete and verified. An interrupted download is continued.
The first file of a split model gets its name last, so the model appears when all of it is there.
"""

from __future__ import annotations

import os
import re
import shlex
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsmoe_convert.errors import HubError
from dsmoe_convert.hub import HubRepository, HubRequest, is_repository, parse_address
from dsmoe_local.base.durable import locked, make_folders, publish, replace, require_space, sync
from dsmoe_local.base.errors import FileError, InterruptedRunError, UsageError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.discovery import unfinished_downloads, unfinished_path
from dsmoe_local.model.split_name import SplitName, model_stem

PREFERRED = (
    "q4_k_m",
    "q4",
    "ud-q4_k_xl",
    "q4_k_xl",
    "mxfp4_moe",
    "mxfp4",
    "q4_k_s",
    "iq4_nl",
    "iq4_xs",
    "q4_0",
)
"""Types of about 4 bits, the best first: the default is the first that a repository has."""

_TYPE = re.compile(
    r"(?<![^-._])((?:UD-)?I?Q\d\w*(?:-fast|-small)?|TQ\d_\d|BF16|FP?16|FP?32|MXFP4\w*|NVFP4)(?![^-.])",
    re.IGNORECASE | re.ASCII,
)
_NAME = re.compile(r"[^\W.][\w.-]{0,150}")
_NOT_MODELS = ("mmproj", "imatrix")
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class HubModel:
    """A GGUF model in a repository: its files in order, their size in bytes, and the type that names tell."""

    files: tuple[str, ...]
    n_bytes: int

    @property
    def name(self) -> str:
        """The name of the model, as `dsmoe models` lists it."""
        return model_stem(Path(self.files[0]))

    @property
    def type(self) -> str:
        """The last word of the name that is a type; empty if there is none."""
        return next(reversed(_TYPE.findall(self.name)), "")


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model in the models folder. `is_new` is False if it was there already."""

    path: Path
    is_new: bool


def parse_source(text: str) -> tuple[str, str | None, str]:
    """Return the repository, the revision and the type or name in OWNER/REPO[:TYPE].

    The address of a page of the repository works, too, or that of a file.
    """
    short, revision, file = parse_address(text)
    repository, _, wanted = short.partition(":")
    if not is_repository(repository):
        raise UsageError(
            f"{safe_line(text, 80)!r} is not a repository",
            remedy="name it OWNER/REPO or OWNER/REPO:TYPE, as on huggingface.co",
        )
    return repository, revision, wanted or (model_stem(Path(file)) if file else "")


def pull(
    request: HubRequest,
    wanted: str,
    folder: Path,
    listen: Listener,
    stop: threading.Event,
    *,
    name: str = "",
    force: bool = False,
) -> Pulled:
    """Download a model of a repository to `folder`. `wanted` is its type or its name; "" means about 4 bits.

    `name` is the name that it gets, if not that of the repository's file. `force` replaces a file of the same
    name with other content. Raises UsageError, HubError, NoSpaceError, LockedError, FileError,
    InterruptedRunError.
    """
    if name and not _NAME.fullmatch(name):
        raise UsageError(
            f"{safe_line(name, 80)!r} cannot be the name of a model",
            remedy="use letters, digits, and the characters - . _ with no . in front",
        )
    repository = HubRepository(request, listen, stop)
    if repository.offline:
        raise HubError(
            "the hub cannot be used: HF_HUB_OFFLINE is set", where=request.repository, remedy="unset it"
        )
    model = choose(models_of(repository.sizes), wanted, request.repository)
    _refuse_large(repository, request.repository, model, folder)
    _check_digests(repository, request.repository, model)
    make_folders(folder)
    return _Pull(repository, model, folder, name or model.name, listen, stop, force).run()


def models_of(sizes: Mapping[str, int]) -> list[HubModel]:
    """Return the complete GGUF models among the files of a repository, the smallest first."""
    found = []
    for name in sizes:
        path = Path(name)
        split = SplitName.of(path)
        files = tuple(map(str, split.paths)) if split and split.number == 1 else (name,)
        is_model = (
            path.suffix == ".gguf"
            and not any(word in path.name.casefold() for word in _NOT_MODELS)
            and (split is None or split.number == 1)
            and sizes.keys() >= set(files)
        )
        if is_model:
            found.append(HubModel(files, sum(sizes[file] for file in files)))
    return sorted(found, key=lambda model: model.n_bytes)


def choose(models: list[HubModel], wanted: str, repository: str) -> HubModel:
    """Return the model with the type or name `wanted`; "" means the default. Errors list what there is."""
    if not models:
        raise HubError(
            "the repository has no GGUF model",
            where=repository,
            remedy=f"if it has a checkpoint, convert that: dsmoe convert {repository} --type q4",
        )
    word = wanted.casefold().removesuffix(".gguf")
    if word:
        exact = [model for model in models if word in (model.type.casefold(), model.name.casefold())]
        found = exact or [model for model in models if f"ud-{word}" == model.type.casefold()]
        what = f"the repository has no model {safe_line(wanted, 60)!r}"
    else:
        types = {model.type.casefold() for model in models}
        best = next((each for each in PREFERRED if each in types), None)
        found = models if len(models) == 1 else [m for m in models if m.type.casefold() == best]
        what = "the repository has several models, and none of about 4 bits"
    if len(found) == 1:
        return found[0]
    if found:
        what = f"the repository has {len(found)} models of that type"
    shown = found or models
    names = [model.name if found or not model.type else model.type for model in shown]
    listed = (f"{name} ({format_size(each.n_bytes)})" for name, each in zip(names, shown, strict=True))
    raise UsageError(
        what,
        where=safe_line(f"it has {', '.join(listed)}", 380),
        remedy=f"name one of them: dsmoe pull {shlex.quote(f'{repository}:{safe_line(names[0], 80)}')}",
    )


def _refuse_large(repository: HubRepository, name: str, model: HubModel, folder: Path) -> None:
    """Raise HubError if a file is too large for HTTP: the hub sends it in its own protocol only."""
    for file in model.files:
        if repository.sizes[file] > repository.max_bytes:
            command = ["hf", "download", name, file, "--local-dir", str(folder)]
            raise HubError(
                f"the hub does not send files of {format_size(repository.sizes[file])} over HTTP",
                where=f"{name}: {safe_line(file, 100)}",
                remedy=f"use the hub's own program: {shlex.join(command)}",
            )


def _check_digests(repository: HubRepository, name: str, model: HubModel) -> None:
    """Raise HubError if the hub does not tell a digest of each file."""
    for file in model.files:
        digest = repository.digests[file]
        n_digits = 64 if digest.is_sha256 else 40
        if not re.fullmatch(rf"[0-9a-f]{{{n_digits}}}", digest.text):
            raise HubError(
                "the hub has no valid digest of a file, so that a download cannot be verified",
                where=f"{name}: {safe_line(file, 100)}",
                remedy="check HF_ENDPOINT, or use another hub",
            )


def _final(folder: Path, name: str, file: Path) -> Path:
    """Return the path of a file of the model with this name."""
    split = SplitName.of(file)
    return (
        folder / f"{name}.gguf"
        if split is None
        else SplitName(folder, name, 0, split.count).path(split.number)
    )


class _Pull:
    """One download of a model to `folder`."""

    def __init__(
        self,
        repository: HubRepository,
        model: HubModel,
        folder: Path,
        name: str,
        listen: Listener,
        stop: threading.Event,
        force: bool,
    ) -> None:
        self._repository = repository
        self._listen = listen
        self._stop = stop
        self._force = force
        self._finals = {file: _final(folder, name, Path(file)) for file in model.files}
        self._first = self._finals[model.files[0]]

    def run(self) -> Pulled:
        """Download what is missing. A file that is there already must have the same content."""
        with locked(self._first):
            missing = [name for name, final in self._finals.items() if not self._is_here(name, final)]
            if not missing:
                return Pulled(self._first, is_new=False)
            self._remove_outdated()
            self._download(missing)
            for name in missing:
                self._verify(name)
            reach("pull.verified")
            for name in reversed(missing):
                self._publish(name)
        return Pulled(self._first, is_new=True)

    def _is_here(self, name: str, final: Path) -> bool:
        """True if the file is there. FileError if another one has its name, unless that is replaced."""
        if not final.exists():
            if os.path.lexists(final) and not self._force:
                raise FileError(
                    "a link of that name is there, to a file that is missing",
                    where=final,
                    remedy="--force replaces it",
                )
            return False
        same_size = final.stat().st_size == self._repository.sizes[name]
        if same_size and self._digest(name, final) == self._repository.digests[name].text:
            return True
        if self._force:
            return False
        raise FileError(
            "a file of that name is there, with other content than in the repository",
            where=final,
            remedy="--as NAME gives the download another name; --force replaces the file",
        )

    def _part(self, name: str) -> Path:
        return unfinished_path(self._finals[name], self._repository.digests[name].text)

    def _remove_outdated(self) -> None:
        """Delete unfinished downloads of another content, which nobody would continue."""
        wanted = set(map(self._part, self._finals))
        for path in unfinished_downloads(self._first.parent).get(self._first, []):
            if path not in wanted:
                path.unlink(missing_ok=True)

    def _download(self, names: list[str]) -> None:
        sizes = self._repository.sizes
        parts = {name: self._part(name) for name in names}
        total = sum(sizes[name] for name in names)
        done = sum(min(part.stat().st_size, sizes[name]) for name, part in parts.items() if part.exists())
        require_space(
            self._first.parent,
            total - done,
            "free some space, or choose a folder on another disk: DSMOE_MODELS_FOLDER=…",
        )
        self._listen(Started("downloading", total, done))
        for name, part in parts.items():
            self._repository.fetch_into(name, part)
            reach("pull.downloaded")
        self._listen(Finished("downloading"))

    def _verify(self, name: str) -> None:
        """Compare the content of a download with its digest, and sync it."""
        part = self._part(name)
        if self._digest(name, part) != self._repository.digests[name].text:
            part.unlink()
            raise HubError(
                "the download is damaged: its digest is not the one in the repository",
                where=safe_line(name, 200),
                remedy="it is deleted; run the same command to download it again",
            )
        with part.open("rb") as file:
            sync(file.fileno())

    def _digest(self, name: str, path: Path) -> str:
        """Return the digest of a file's content, of the kind that the repository has for it."""
        n_bytes = path.stat().st_size
        digest = self._repository.digests[name].start(n_bytes)
        self._listen(Started("verifying", n_bytes))
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                if self._stop.is_set():
                    raise InterruptedRunError("interrupted", remedy="run the same command again to continue")
                digest.update(block)
                self._listen(Advanced(len(block), path.name.removeprefix(".")))
        self._listen(Finished("verifying"))
        return str(digest.hexdigest())

    def _publish(self, name: str) -> None:
        (replace if self._force else publish)(self._part(name), self._finals[name])
        if self._finals[name] != self._first:
            reach("pull.renamed")
