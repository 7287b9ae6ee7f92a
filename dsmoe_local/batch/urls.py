"""Inputs and outputs at URLs, through fsspec: s3://, gs://, hf://, https:// and others.

An input is copied to a local file before it is read. An output is uploaded when it is complete.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dsmoe_local.base import durable
from dsmoe_local.base.background import until_stopped
from dsmoe_local.base.errors import PIP, DsmoeError, FileError, MissingExtraError, UsageError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.batch.sources import reading

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_HTTP = ("http", "https")
# Stores that show an object only when it is complete, and in which a rename is a copy.
_ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf"})
# What `info` says about a version of a file. File systems differ in the names.
_VERSION_KEYS = (
    "size",
    "mtime",
    "created",
    "etag",
    "ETag",
    "LastModified",
    "last_modified",
    "updated",
    "blob_id",
)
_MISSING = frozenset({404, 410})
_DENIED = frozenset({401, 403})
_LATER = "check the address and the network, then run the same command again"
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class Url:
    """The URL of an input or an output. Its text lacks user, query and fragment, which may be secret."""

    address: str

    @property
    def name(self) -> str:
        """The last part of the path, as shown."""
        path = str(self).partition("://")[2]
        return (path.partition("/")[2] if self.is_http else path).rstrip("/").rpartition("/")[2]

    @property
    def protocol(self) -> str:
        """What stands before the colon."""
        return self.address.partition(":")[0].lower()

    @property
    def is_http(self) -> bool:
        """True if the address is one of the web."""
        return self.protocol in _HTTP

    def __str__(self) -> str:
        return _without_secrets(self.address)


def parse_location(text: str) -> Path | Url:
    """Return a path, or a URL if the text starts like one."""
    return Url(text) if _URL.match(text) else Path(text)


def expand(url: Url, output: Url | None, stop: threading.Event) -> list[Url]:
    """Return the files that match a URL with `*`, by name and without `output`; other URLs as they are.

    FileError if none does; InterruptedRunError.
    """
    if "*" not in url.address or url.is_http:
        return [url]

    def find() -> list[str]:
        system, path = _file_system(url)
        found = set(system.glob(path))
        if output and output.protocol == url.protocol:
            found.discard(_file_system(output)[1])
        return sorted(str(system.unstrip_protocol(name)) for name in found)

    with _explained(url, "read"):
        found = until_stopped(find, stop, "interrupted: the inputs were not read")
    if not found:
        raise FileError("no file matches the URL", where=str(url))
    return [Url(address) for address in found]


def download(url: Url, target: BinaryIO, folder: Path, listen: Listener, stop: threading.Event) -> None:
    """Copy the file at a URL to `target`, which lies in `folder`.

    FileError if it cannot be read, changes meanwhile, or ends early; NoSpaceError; InterruptedRunError.
    """

    def copy() -> None:
        system, path = _file_system(url)
        version = _version(system, path)
        size = version.get("size") or 0
        durable.require_space(folder, size)
        listen(Started(f"downloading {url.name}", size))
        n_bytes = 0
        with system.open(path, "rb", block_size=_CHUNK) as source:
            while chunk := source.read(_CHUNK):
                with reading(f"{url}, copied to {folder}"):
                    target.write(chunk)
                n_bytes += len(chunk)
                listen(Advanced(len(chunk)))
        with reading(f"{url}, copied to {folder}"):
            target.flush()
        if size and n_bytes != size:
            raise FileError(f"the input ends after {n_bytes:,} of {count(size, 'byte')}", where=str(url))
        if _version(system, path) != version:
            raise FileError(
                "the input changed while it was read", where=str(url), remedy="run the command again"
            )
        listen(Finished(f"downloading {url.name}"))

    with _explained(url, "read"):
        until_stopped(copy, stop, f"interrupted: {url.name} was not downloaded to its end")


def check_upload(url: Url, stop: threading.Event) -> bool:
    """Return True if there is a file at the URL of an output. Creates the folder if there are folders.

    Raises UsageError if nothing can be written there, MissingExtraError, FileError, InterruptedRunError.
    """
    if url.is_http:
        raise UsageError(
            "the output cannot be at a web address",
            where=str(url),
            remedy="name a file, or a URL such as s3://…",
        )

    def exists() -> bool:
        system, path = _file_system(url)
        if url.protocol not in _ATOMIC:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
        return bool(system.exists(path))

    with _explained(url, "reached"):
        return until_stopped(exists, stop, "interrupted: nothing was answered")


def upload(local: Path, url: Url, listen: Listener, stop: threading.Event) -> None:
    """Copy a file to a URL, where it appears as a whole, and check its size there.

    FileError if that fails; the local file stays. InterruptedRunError.
    """

    def copy() -> None:
        from fsspec.callbacks import Callback

        n_sent = 0

        def report(size: int | None, value: int, **_: object) -> None:
            nonlocal n_sent
            listen(Advanced(value - n_sent))
            n_sent = value

        callback = Callback(hooks={"report": report})
        system, path = _file_system(url)
        size = local.stat().st_size
        listen(Started(f"uploading {url.name}", size))
        if url.protocol in _ATOMIC:
            system.put_file(str(local), path, callback=callback)
        else:
            temporary = f"{path}.part"
            system.put_file(str(local), temporary, callback=callback)
            _check_size(system, temporary, size, url)
            reach("upload.sent")
            system.mv(temporary, path)
            if system.exists(temporary):
                raise FileError(
                    "an existing file could not be replaced",
                    where=str(url),
                    remedy=f"remove it, and run the same command again; {local} is complete",
                )
        _check_size(system, path, size, url)
        listen(Finished(f"uploading {url.name}"))
        listen(Note(f"uploaded to {url}: {format_size(size)}"))

    remedy = f"it is complete in {local}: copy it, or run the same command again"
    with _explained(url, "written", remedy):
        until_stopped(copy, stop, f"interrupted: {url.name} is complete here, but not uploaded")


def _check_size(system: Any, path: str, size: int, url: Url) -> None:  # noqa: ANN401 - fsspec has no types
    found = _version(system, path).get("size")
    if found != size:
        raise FileError(f"{found} of {count(size, 'byte')} arrived", where=str(url))


def _file_system(url: Url) -> tuple[Any, str]:
    """Return the file system of a URL, and the path there. Raises UsageError, MissingExtraError."""
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations, registry
    except ImportError as error:
        raise MissingExtraError("urls", "fsspec", f"{url.protocol}:// URLs") from error
    known = (*known_implementations, *registry)
    if url.protocol not in known:
        near = difflib.get_close_matches(url.protocol, known, n=1)
        raise UsageError(
            f"{url.protocol}:// is not a known kind of URL",
            where=str(url),
            remedy=f"did you mean {near[0]}://?" if near else "use https://, s3://, gs://, az:// or hf://",
        )
    try:
        found: tuple[Any, str] = url_to_fs(url.address)
    except ImportError as error:
        driver = known_implementations.get(url.protocol, {}).get("class", "").partition(".")[0]
        if url.is_http:
            raise MissingExtraError("urls", "aiohttp", f"{url.protocol}:// URLs") from error
        raise UsageError(
            f"{url.protocol}:// URLs need another package: {error}",
            where=str(url),
            remedy="" if driver in ("", "fsspec") else f"{PIP} install {driver}",
        ) from error
    return found


def _version(system: Any, path: str) -> dict[str, Any]:  # noqa: ANN401 - fsspec has no types
    """Return what identifies this version of a file."""
    system.invalidate_cache()
    info = system.info(path)
    return {key: info[key] for key in _VERSION_KEYS if info.get(key) is not None}


@contextmanager
def _explained(url: Url, verb: str, remedy: str = "") -> Iterator[None]:
    """Raise the errors of drivers, which have classes of their own, as FileError."""
    try:
        yield
    except DsmoeError:
        raise
    except Exception as error:
        found: BaseException = error
        while isinstance(found, FileNotFoundError) and found.__cause__:
            found = found.__cause__  # fsspec raises this error also if a server cannot be reached
        reason, advice = _reason(found)
        if "*" in url.address and url.is_http and advice != _LATER:
            advice = "web servers do not list files: name each file instead of using *"
        raise FileError(
            f"the URL cannot be {verb}: {reason}", where=str(url), remedy=remedy or advice
        ) from error


def _reason(error: BaseException) -> tuple[str, str]:
    """Return why a driver failed, and what to do."""
    status, host = getattr(error, "status", None), getattr(error, "host", None)
    if isinstance(error, FileNotFoundError) or status in _MISSING:
        return "there is no such file", "check the address"
    if isinstance(error, PermissionError) or status in _DENIED:
        return "access is denied", "check the address and your credentials for it"
    if isinstance(status, int):
        return f"the server answered with status {status}", _LATER
    if isinstance(error, TimeoutError):
        return "the server did not answer in time", _LATER
    if isinstance(error, OSError) and isinstance(host, str):
        return f"no connection to {safe_line(host, 60)}", _LATER
    # The messages of drivers contain whole addresses.
    told = (isinstance(error, OSError) and error.strerror) or str(error)
    text = told.partition("\n")[0] or type(error).__name__
    return safe_line(_without_secrets(text), 200), _LATER


def _without_secrets(text: str) -> str:
    """Remove users with passwords, queries and fragments from the addresses in a text."""
    return re.sub(r"(?<=\S)[?#][^\s'\"]*", "", re.sub(r"(://)[^/?#\s]*@", r"\1", text))
