"""Download from a model repository on a Hugging Face hub.

Everything goes through huggingface_hub, so HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and the shared cache work as
in other programs. Only files that are needed are downloaded. Messages never contain a token.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from dsmoe_convert.checkpoint import PICKLE, SAFETENSORS, Form, check_pickle, read_index
from dsmoe_convert.errors import HubError
from dsmoe_convert.shards import StoredTensor
from dsmoe_local.base.background import until_stopped
from dsmoe_local.base.errors import DsmoeError, FileError, InterruptedRunError, UsageError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.config_json import FILE_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

_TOKENIZERS = ("tokenizer.json", "tiktoken.model")
_OPTIONAL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
)
_TEMPLATE = re.compile(r"additional_chat_templates/[\w-]+\.jinja", re.ASCII)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve|raw)/([^/?#]+)(?:/([^?#]*?))?)?/?(?:[?#].*)?"
)
_INTERRUPTED = "interrupted while downloading"
_PATIENCE = 1.0  # seconds to wait for a download to end after an interruption


@dataclass(frozen=True, slots=True)
class HubRequest:
    """A repository as the user names it. `endpoint` None means the library's default."""

    repository: str
    revision: str | None = None
    token: str | None = None
    endpoint: str | None = None

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repository.partition("/")[2]


def is_repository(text: str) -> bool:
    """True if `text` has the form OWNER/NAME."""
    return _REPOSITORY.fullmatch(text) is not None and ".." not in text


def parse_address(text: str) -> tuple[str, str | None, str]:
    """Return the repository, the revision and the file that the address of a page on the hub names.

    Revision and file may be missing: None and "". Any other text is returned as the repository.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return text, None, ""
    repository, revision, file = match.groups(default="")
    return repository, unquote(revision) or None, unquote(file)


def locate(source: str) -> Path | None:
    """Return the local folder that `source` names; None if it is a repository id.

    Raises FileError for a folder without a checkpoint, UsageError for anything else.
    """
    path = Path(source)
    with suppress(RuntimeError):  # ~NAME of an unknown user
        path = path.expanduser()
    if path.is_dir():
        if not (path / FILE_NAME).exists():
            is_gguf = any(path.glob("*.gguf"))
            raise FileError(
                f"{safe_line(source, 60)} is not a checkpoint: it has no {FILE_NAME}",
                remedy="it has GGUF files: to quantize one, use dsmoe-quantize"
                if is_gguf
                else f"name the folder with {FILE_NAME} and the weights",
            )
        return path
    if path.exists():
        raise UsageError(
            f"{safe_line(source, 60)} is a file",
            remedy="to quantize a GGUF file, use dsmoe-quantize"
            if path.suffix == ".gguf"
            else "name the folder with config.json and the weights",
        )
    if is_repository(source):
        return None
    raise UsageError(
        f"{safe_line(source, 60)!r} is neither a folder nor a repository id",
        remedy="a repository id is OWNER/NAME, as in deepseek-ai/deepseek-moe-16b-chat",
    )


@dataclass(frozen=True, slots=True)
class Digest:
    """The digest of a file in hex digits: the SHA-256 of a large file, the git blob id (SHA-1) of others."""

    text: str
    is_sha256: bool

    def start(self, n_bytes: int) -> Any:  # noqa: ANN401 - hashlib's objects have no public type
        """Return a hash object for the content of a file of `n_bytes`."""
        if self.is_sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % n_bytes, usedforsecurity=False)


class HubRepository:
    """One revision of a repository, pinned to its commit. All errors of the hub become HubError."""

    def __init__(self, request: HubRequest, listen: Listener, stop: threading.Event) -> None:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors

        # Its warnings are about retries and outdated files. Failures reach the user as our errors.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self._request = request
        self._hub = huggingface_hub
        self._listen = listen
        self._stop = stop
        self.offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE)
        self.sizes: Mapping[str, int] = {}
        self.digests: Mapping[str, Digest] = {}
        self.commit = ""
        if not self.offline:
            info = self._call(
                lambda: self._api.model_info(
                    request.repository, revision=request.revision, files_metadata=True
                )
            )
            self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            self.digests = {
                file.rfilename: Digest(file.lfs.sha256 if file.lfs else file.blob_id or "", bool(file.lfs))
                for file in info.siblings or ()
            }
            self.commit = info.sha or ""

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self._request.name

    @property
    def max_bytes(self) -> int:
        """The size of the largest file that `fetch_into` can download."""
        return int(self._hub.constants.MAX_HTTP_DOWNLOAD_SIZE)

    @property
    def identity(self) -> dict[str, Any]:
        """The values that decide the content of all files."""
        return {"repository": self._request.repository, "commit": self.commit}

    @property
    def _api(self) -> HfApi:
        return self._hub.HfApi(endpoint=self._request.endpoint, token=self._request.token)

    def fetch_small_files(self) -> Path:
        """Download configuration, tokenizer, index and model card to the cache. Return their folder."""
        if self.offline:
            return self._fetch("config.json").parent
        tokenizer = next((name for name in _TOKENIZERS if name in self.sizes), _TOKENIZERS[0])
        missing = [name for name in ("config.json", tokenizer) if name not in self.sizes]
        if missing:
            raise HubError(
                f"the repository has no {missing[0]}",
                where=self._request.repository,
                remedy="name the repository of the original Hugging Face checkpoint",
            )
        for form in (SAFETENSORS, PICKLE):
            if form.single not in self.sizes and form.index in self.sizes:
                self._fetch(form.index)
        templates = [name for name in self.sizes if _TEMPLATE.fullmatch(name)]
        for name in ("config.json", tokenizer, *_OPTIONAL, *templates):
            if name in self.sizes:
                self._fetch(name)
        # By the revision that the user gave: the cache then records its commit, for offline use.
        folder = self._fetch("config.json", revision=self._request.revision).parent
        if folder.name != self.commit:
            raise HubError("the repository changed while it was read", where=self._place, remedy="run again")
        return folder

    def weight_files(self, folder: Path, *, allow_pickle: bool) -> tuple[Form, list[str]]:
        """Return the format of the weights and the names of their files. `folder` has the index."""
        for form in (SAFETENSORS, PICKLE):
            if form.single in self.sizes or form.index in self.sizes:
                if form is PICKLE:
                    check_pickle(self._request.repository, allowed=allow_pickle)
                if form.single in self.sizes:
                    return form, [form.single]
                shards = sorted(set(read_index(folder / form.index, form.suffix).values()))
                missing = [shard for shard in shards if shard not in self.sizes]
                if missing:
                    raise HubError(
                        f"the index names {safe_line(missing[0], 60)}, which the repository does not have",
                        where=self._request.repository,
                        remedy="check the repository's page",
                    )
                return form, shards
        raise HubError(
            "the repository has no weights in safetensors or .bin files",
            where=self._request.repository,
            remedy="name the repository of the original Hugging Face checkpoint",
        )

    def fetch_weights(self, files: list[str]) -> None:
        """Download the weights that the cache lacks."""
        here = [name for name in files if self._is_cached(name)]
        total, done = (sum(self.sizes[name] for name in names) for names in (files, here))
        self._listen(Started("downloading", total, done))
        for name in files:
            if name not in here:
                self._fetch(name, report=True)
        self._listen(Finished("downloading"))

    def fetch_to(self, name: str, folder: Path) -> Path:
        """Download one file to `folder`, without the cache."""
        return self._fetch(name, local_dir=folder)

    def fetch_into(self, name: str, path: Path) -> None:
        """Download one file to `path`, and continue with what it has already.

        `hf_hub_download` starts over after an interruption since version 2 of the library.
        """
        file_download = importlib.import_module("huggingface_hub.file_download")
        url = self._hub.hf_hub_url(
            self._request.repository, name, revision=self.commit, endpoint=self._request.endpoint
        )
        download = file_download.http_get
        options = self._progress(download, name)

        def work() -> None:
            with path.open("ab") as file:
                if file.tell() > self.sizes[name]:
                    file.truncate(0)
                download(
                    url,
                    file,
                    resume_size=file.tell(),
                    headers=self._hub.utils.build_hf_headers(token=self._request.token),
                    expected_size=self.sizes[name],
                    **options,
                )

        self._call(work)

    def tensors_of(self, name: str) -> dict[str, StoredTensor]:
        """Return the tensors of a remote safetensors file. Offsets count from the start of its data."""
        header = self._call(
            lambda: self._api.parse_safetensors_file_metadata(
                self._request.repository, name, revision=self.commit
            )
        )
        return {
            tensor: StoredTensor(tensor, info.dtype, tuple(info.shape), name, begin, end - begin)
            for tensor, info in header.tensors.items()
            for begin, end in (info.data_offsets,)
        }

    def _is_cached(self, name: str) -> bool:
        found = self._hub.try_to_load_from_cache(self._request.repository, name, revision=self.commit)
        return isinstance(found, str)

    def _fetch(
        self, name: str, *, revision: str | None = "", local_dir: Path | None = None, report: bool = False
    ) -> Path:
        """Download one file and return its path. `revision` "" means the pinned commit."""
        if revision == "":
            revision = self.commit or self._request.revision
        download = self._hub.hf_hub_download
        options = {"local_dir": local_dir, **self._progress(download, name, report=report)}
        path = self._call(
            lambda: download(
                self._request.repository,
                name,
                revision=revision,
                token=self._request.token,
                endpoint=self._request.endpoint,
                local_files_only=self.offline,
                **options,
            )
        )
        return Path(path)

    def _progress(self, download: Callable[..., Any], name: str, *, report: bool = True) -> dict[str, Any]:
        """Return the option of a function of the library that reports progress and ends early."""
        # Versions before 1.0 lack this parameter. Then there is no progress, and no early end.
        if "tqdm_class" not in inspect.signature(download).parameters:
            return {}
        return {"tqdm_class": _progress_class(self._listen if report else None, self._stop, name)}

    def _call(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, without waiting for the library after an interruption."""
        try:
            return until_stopped(work, self._stop, _INTERRUPTED, _PATIENCE)
        except DsmoeError:
            raise
        except Exception as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> HubError:
        """Return our error for an exception of the library. More specific ones are first in the table."""
        for name, what, remedy in _ERRORS:
            kind = getattr(self._hub.errors, name, None)
            if kind is not None and isinstance(error, kind):
                return HubError(what, where=self._place, remedy=remedy)
        text = next(iter(str(error).strip().splitlines()), "")
        for secret in filter(None, (self._request.token, self._hub.get_token())):
            text = text.replace(secret, "***")
        return HubError(
            f"the download failed: {safe_line(f'{type(error).__name__}: {text}', 90)}",
            where=self._place,
            remedy="check the network, then run the same command to continue",
        )

    @property
    def _place(self) -> str:
        revision = f" at {safe_line(self._request.revision, 40)}" if self._request.revision else ""
        return f"{self._request.repository}{revision}"


# The library's exceptions, each with our message and remedy.
_ERRORS = (
    (
        "GatedRepoError",
        "access to this repository must be granted",
        "accept the terms on its page, then set HF_TOKEN or use --token",
    ),
    (
        "RepositoryNotFoundError",
        "the repository does not exist, or is private",
        "check the name; for a private one set HF_TOKEN or use --token",
    ),
    ("RevisionNotFoundError", "the repository has no such revision", "check --revision"),
    (
        "OfflineModeIsEnabled",
        "the hub cannot be used: HF_HUB_OFFLINE is set",
        "unset it, or use a repository that is in the cache",
    ),
    (
        "LocalEntryNotFoundError",
        "the file is not in the cache, and the hub cannot be reached",
        "check the network, and whether HF_HUB_OFFLINE is set",
    ),
    ("EntryNotFoundError", "a file is missing in the repository", "check the repository's page"),
)


def _progress_class(listen: Listener | None, stop: threading.Event, name: str) -> type[Any]:
    """Return a progress bar that draws nothing: it emits events, and raises when the download must stop."""
    bar: Any = importlib.import_module("tqdm").tqdm

    def start(self: Any, *args: Any, **options: Any) -> None:  # noqa: ANN401 - tqdm's signature
        options.pop("name", None)
        bar.__init__(self, *args, **(options | {"disable": True}))

    def update(self: Any, n: float | None = 1) -> None:  # noqa: ANN401 - tqdm's signature
        if stop.is_set():
            raise InterruptedRunError(_INTERRUPTED)
        if listen is not None and n:
            listen(Advanced(int(n), name))

    return type("Events", (bar,), {"__init__": start, "update": update})
