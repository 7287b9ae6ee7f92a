"""Inputs and outputs at URLs: fsspec's memory:// and file://, and an HTTP server on loopback."""

from __future__ import annotations

import errno
import importlib
import io
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet
from support.batches import GREEDY, answer, batch, by_id, records, run_batch, write_lines
from support.fake_engine import FakeEngine
from support.kills import Job, points_of

from dsmoe_local.base.errors import (
    DsmoeError,
    FileError,
    FormatError,
    InterruptedRunError,
    MissingExtraError,
    NoSpaceError,
    UsageError,
)
from dsmoe_local.base.progress import Event, Note, ignore
from dsmoe_local.base.sizes import format_size
from dsmoe_local.batch.input_form import InputForm, parse_template
from dsmoe_local.batch.job import BatchOptions
from dsmoe_local.batch.urls import Url, download, parse_location

LINES = [{"id": str(n), "prompt": f"p{n}"} for n in range(12)]
_REGISTRY = importlib.import_module("fsspec.registry")
CONTENT = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)


@pytest.fixture(autouse=True)
def memory() -> Iterator[MemoryFileSystem]:
    """fsspec's files in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@dataclass
class Web:
    """Files by path. `version` gives the ETags, the last one again and again. `ranges` allows parts of files,
    `sized` tells how large they are.

    The last `lost` bytes are not sent. `on_get` is called before the content.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    version: list[str] = field(default_factory=lambda: ["1"])
    ranges: bool = True
    sized: bool = True
    lost: int = 0
    on_get: Any = lambda: None
    url: str = ""


@contextmanager
def serving(web: Web) -> Iterator[Web]:
    """Run a server while the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            content = web.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            begin, end = 0, len(content)
            if web.ranges and "Range" in self.headers:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                begin, end = int(first), min(int(last) + 1 if last else end, end)
            self.send_response(206 if end - begin < len(content) else 200)
            if web.sized:
                self.send_header("Content-Length", str(end - begin))
            else:
                self.send_header("Connection", "close")
            self.send_header("ETag", web.version.pop(0) if len(web.version) > 1 else web.version[0])
            if web.ranges:
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            self.end_headers()
            if with_body:
                web.on_get()
                self.wfile.write(content[begin : end - web.lost])
                if web.lost:
                    self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def told(engine_options: BatchOptions, kind: type[DsmoeError] = FileError) -> str:
    """Return the message with which a batch is refused."""
    with pytest.raises(kind) as refusal:
        run_batch(FakeEngine(), engine_options)
    assert len(str(refusal.value).splitlines()) <= 3
    return str(refusal.value)


def texts(options: BatchOptions) -> dict[str, str]:
    """Return the texts of the records, by id."""
    return {name: record["text"] for name, record in by_id(records(options.out)).items()}


WHOLE = {str(n): f"p{n}" for n in range(12)}


def test_paths_and_urls() -> None:
    """Guards: a path with a colon taken for a URL; a URL made a path, which has one slash less."""
    assert parse_location("s3://bucket/a//b.jsonl") == Url("s3://bucket/a//b.jsonl")
    assert parse_location("s3://") == Url("s3://")  # not the file "s3:"
    for path in ("C:/a", "a:b", "./s3:/x", "-", "://x"):
        assert parse_location(path) == Path(path)
    secret = Url("https://me:hidden@host/dir/in.csv?token=hidden")
    assert (secret.name, str(secret)) == ("in.csv", "https://host/dir/in.csv")


@pytest.mark.parametrize(
    ("address", "shown", "name"),
    [
        ("https://me:hid@den@host/in.csv", "https://host/in.csv", "in.csv"),
        ("https://host/in.csv#hidden", "https://host/in.csv", "in.csv"),
        ("https://host/in.csv?a=me@hidden#hidden", "https://host/in.csv", "in.csv"),
        ("az://box/in.csv?sig=hid/den", "az://box/in.csv", "in.csv"),
        ("https://[x/in.csv", "https://[x/in.csv", "in.csv"),
        ("https://host?token=hidden", "https://host", ""),
    ],
)
def test_secrets_in_addresses(address: str, shown: str, name: str) -> None:
    """Guards: a part of a password, a token or a signature in a message or in the name of a local file; a
    traceback for a malformed address.
    """
    assert (str(Url(address)), Url(address).name) == (shown, name)


@pytest.mark.parametrize(("ranges", "sized"), [(True, True), (False, True), (False, False)])
def test_inputs(tmp_path: Path, memory: MemoryFileSystem, ranges: bool, sized: bool) -> None:
    """Guards: a kind of address, or of file, that is read otherwise than a local file."""
    memory.pipe("/dir/in.jsonl", CONTENT)
    local = write_lines(tmp_path / "local.jsonl", LINES)
    parquet.write_table(pa.Table.from_pylist(LINES), tmp_path / "in.parquet")
    web = Web(
        {"/in": CONTENT, "/in.parquet?a=b": (tmp_path / "in.parquet").read_bytes()},
        ranges=ranges,
        sized=sized,
    )
    with serving(web):
        for address in (
            "memory://dir/in.jsonl",
            f"file://{local}",
            f"{web.url}/in",
            f"{web.url}/in.parquet?a=b",
        ):
            options = batch(tmp_path, sources=[parse_location(address)], restart=True)
            answer(FakeEngine(n_parallel=3), options)
            assert texts(options) == WHOLE
    assert {path.name for path in tmp_path.iterdir()} == {
        *("in.jsonl", "in.parquet", "local.jsonl", "out.jsonl", "out.jsonl.journal")
    }


def test_several_urls(tmp_path: Path, memory: MemoryFileSystem) -> None:
    """Guards: files of a pattern in another order, or mixed up; a table at a URL that has no columns."""
    for name in "ba":
        memory.pipe(f"/dir/{name}.csv", f"id,word\n{name},{name * 3}\n".encode())
    form = InputForm(template=parse_template("{word}"))
    options = batch(tmp_path, sources=[Url("memory://dir/*.csv")], input=form, ordered=True)
    assert [record["text"] for record in answer(FakeEngine(), options)] == ["aaa", "bbb"]
    assert "no file matches the URL\nmemory://dir/*.tsv" in told(
        replace(options, sources=[Url("memory://dir/*.tsv")])
    )


def test_a_changed_input(tmp_path: Path, memory: MemoryFileSystem) -> None:
    """Guards: old answers to new questions; a file whose halves are of two versions."""
    memory.pipe("/in.jsonl", CONTENT)
    options = batch(tmp_path, sources=[Url("memory://in.jsonl")])
    run_batch(FakeEngine(), options)
    memory.pipe("/in.jsonl", CONTENT + b'{"id": "new", "prompt": "q"}\n')
    assert len(answer(FakeEngine(), options)) == 13
    memory.pipe("/in.jsonl", CONTENT.replace(b"p3", b"x3"))
    assert "a line has changed since its record was written\nmemory://in.jsonl, line 4" in told(options)
    with serving(Web({"/in": CONTENT}, version=["1", "1", "2"])) as web:
        assert "the input changed while it was read" in told(
            batch(tmp_path, sources=[Url(f"{web.url}/in")], restart=True)
        )


def test_errors_of_inputs(tmp_path: Path) -> None:
    """Guards: a traceback of a driver; a part of a file taken for all; secrets in messages."""
    gone = "the URL cannot be read: there is no such file"
    with serving(Web({"/short": CONTENT}, lost=9)) as web:
        short = told(batch(tmp_path, sources=[Url(f"{web.url}/short?token=hidden")]))
        missing = told(batch(tmp_path, sources=[Url(f"{web.url}/missing?token=hidden")]))
        assert missing == f"{gone}\n{web.url}/missing\ncheck the address"
    with serving(Web({"/blob/x.parquet": b"\n<!DOCTYPE html><html>"})) as web:
        page = told(batch(tmp_path, sources=[Url(f"{web.url}/blob/x.parquet")]), FormatError)
    assert "the URL leads to a web page" in page
    closed = told(batch(tmp_path, sources=[Url(f"{web.url}/in?token=hidden")]))
    assert "the URL cannot be read" in short
    assert told(batch(tmp_path, sources=[Url("memory://x")])) == f"{gone}\nmemory://x\ncheck the address"
    assert closed.startswith(f"the URL cannot be read: no connection to 127.0.0.1\n{web.url}/in\ncheck the")
    assert "hidden" not in short + missing + closed


def test_mistakes_in_addresses(tmp_path: Path) -> None:
    """Guards: the words of a library instead of what to change."""

    def told_of(address: str, kind: type[DsmoeError]) -> str:
        return told(batch(tmp_path, sources=[Url(address)]), kind)

    assert told_of("htps://a/b", UsageError).endswith("\ndid you mean https://?")
    assert "use https://, s3://" in told_of("foo://a/b", UsageError)
    assert told_of("http://[x/in.jsonl", FileError).startswith("the URL cannot be read: ")
    with serving(Web()) as web:
        assert "name each file instead of using *" in told_of(f"{web.url}/*.jsonl", FileError)
    assert "check the address and the network" in told_of(f"{web.url}/*.jsonl", FileError)


def test_the_output_is_not_an_input(tmp_path: Path, memory: MemoryFileSystem) -> None:
    """Guards: records as new requests, because a pattern matches the output from the second run on."""
    memory.pipe("/dir/in.jsonl", CONTENT)
    options = batch(tmp_path, sources=[Url("memory://dir/*.jsonl")], address=Url("memory://dir/out.jsonl"))
    for _ in range(2):
        run_batch(FakeEngine(), options)
        assert texts(options) == WHOLE


class _Full(io.BytesIO):
    """A file on a full disk."""

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_during_a_download(tmp_path: Path, memory: MemoryFileSystem) -> None:
    """Guards: a full disk here told as an error of the server."""
    memory.pipe("/in.jsonl", CONTENT)
    with pytest.raises(NoSpaceError, match="no space for a temporary copy"):
        download(Url("memory://in.jsonl"), _Full(), tmp_path, ignore, threading.Event())


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an ImportError that does not say what to install."""
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")):
        monkeypatch.setitem(sys.modules, package, None)
        address = Url(f"{protocol}://bucket/x.jsonl")
        assert f"pip install {package}" in told(batch(tmp_path, sources=[address]), UsageError)
        assert f"pip install {package}" in told(batch(tmp_path, address=address), UsageError)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.setattr(_REGISTRY, "_registry", {})
    http = told(batch(tmp_path, sources=[Url("https://host/x.jsonl")]), MissingExtraError)
    assert "pip install 'dsmoe-local[urls]'" in http


def test_an_input_that_hangs_is_left(tmp_path: Path) -> None:
    """Guards: Ctrl-C that waits for a server."""
    stop, released = threading.Event(), threading.Event()

    def hang() -> None:
        stop.set()
        released.wait(60)

    with serving(Web({"/in": CONTENT}, on_get=hang, ranges=False)) as web:
        try:
            with pytest.raises(InterruptedRunError, match="in was not downloaded to its end"):
                run_batch(FakeEngine(), batch(tmp_path, sources=[Url(f"{web.url}/in")]), stop=stop)
        finally:
            released.set()


def test_outputs(tmp_path: Path, memory: MemoryFileSystem) -> None:
    """Guards: an upload that is not all of the records, or happens too early; an object of somebody else."""
    options = batch(tmp_path, *LINES, address=Url("memory://dir/out.jsonl"))
    events: list[Event] = []
    run_batch(FakeEngine(), options, events.append)
    assert memory.cat("/dir/out.jsonl") == options.out.read_bytes()
    assert memory.find("/dir") == ["/dir/out.jsonl"]
    assert Note(f"uploaded to memory://dir/out.jsonl: {format_size(options.out.stat().st_size)}") in events
    mixed = replace(options, sources=[write_lines(tmp_path / "new.jsonl", [{"id": "x", "prompt": "a"}])])
    assert "out.jsonl has 12 records for lines that the input lacks" in told(mixed)
    with pytest.raises(DsmoeError):
        run_batch(FakeEngine(), replace(options, sources=[Url("memory://dir/out.jsonl")]))
    other = batch(tmp_path, *LINES, out=tmp_path / "other.jsonl", address=Url("memory://dir/out.jsonl"))
    assert "the output exists, but the journal other.jsonl.journal does not" in told(other)
    run_batch(FakeEngine(), replace(other, restart=True))
    assert memory.cat("/dir/out.jsonl") == other.out.read_bytes()
    web = replace(options, address=Url("https://host/out.jsonl"))
    assert "the output cannot be at a web address" in told(web, UsageError)


def test_parquet_to_a_folder_of_another_system(tmp_path: Path) -> None:
    """Guards: records uploaded in place of the table; a temporary name that stays."""
    there = tmp_path / "new" / "there"
    options = batch(tmp_path, *LINES, out=tmp_path / "out.parquet.jsonl")
    options = replace(options, parquet=tmp_path / "out.parquet", address=Url(f"file://{there}/out.parquet"))
    run_batch(FakeEngine(), options)
    assert [path.name for path in there.iterdir()] == ["out.parquet"]
    assert parquet.read_table(there / "out.parquet").num_rows == 12


class _Keeping(MemoryFileSystem):  # type: ignore[misc]
    """A store whose rename silently keeps an existing file."""

    protocol = "keeping"

    def mv(self, path1: str, path2: str, *args: Any, **options: Any) -> None:
        if not self.exists(path2):
            super().mv(path1, path2, *args, **options)


def test_an_existing_file_that_is_kept(tmp_path: Path, memory: MemoryFileSystem) -> None:
    """Guards: an old file of the same size taken for the output."""
    fsspec.register_implementation("keeping", _Keeping, clobber=True)
    options = batch(tmp_path, *LINES, address=Url("keeping://dir/out.jsonl"))
    run_batch(FakeEngine(), options)
    memory.pipe("/dir/out.jsonl", b"x" * options.out.stat().st_size)
    assert "an existing file could not be replaced" in told(options)


class _Losing(MemoryFileSystem):  # type: ignore[misc]
    """A store that loses the end of what it is given, or all of it."""

    protocol = "losing"
    fails = False
    hangs: threading.Event | None = None
    stop = threading.Event()

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        if self.hangs:
            self.stop.set()
            self.hangs.wait(60)
        if self.fails:
            raise RuntimeError("quota of https://host/x?secret=1 exceeded")
        self.pipe(rpath, Path(lpath).read_bytes()[:-1])


def test_uploads_that_fail(tmp_path: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a lost part that is not noticed; records that are lost with the upload."""
    fsspec.register_implementation("losing", _Losing, clobber=True)
    options = batch(tmp_path, *LINES, address=Url("losing://dir/out.jsonl"))
    assert "bytes arrived" in told(options)
    assert not memory.exists("/dir/out.jsonl")
    other = replace(options, address=Url("memory://right/out.jsonl"))
    run_batch(FakeEngine(lambda prompt: "not asked again"), other)
    assert memory.cat("/right/out.jsonl") == options.out.read_bytes()
    monkeypatch.setattr(_Losing, "fails", True)
    message = told(options)
    assert "the URL cannot be written: quota of https://host/x exceeded" in message
    assert f"it is complete in {options.out}" in message
    assert texts(options) == WHOLE


def test_an_upload_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: Ctrl-C that waits for a store."""
    fsspec.register_implementation("losing", _Losing, clobber=True)
    options = batch(tmp_path, *LINES, address=Url("losing://dir/out.jsonl"))
    released, stop = threading.Event(), threading.Event()
    monkeypatch.setattr(_Losing, "hangs", released)
    monkeypatch.setattr(_Losing, "stop", stop)
    try:
        with pytest.raises(InterruptedRunError, match=r"out\.jsonl is complete here, but not uploaded"):
            run_batch(FakeEngine(), options, stop=stop)
    finally:
        released.set()
    assert texts(options) == WHOLE


def work(source: str, there: str, out: str) -> None:
    """The work of a child: an input and an output at URLs."""
    address = Url(f"file://{there}/out.jsonl")
    run_batch(
        FakeEngine(n_parallel=2),
        BatchOptions([Url(f"file://{source}")], Path(out), GREEDY, "simple", address=address),
    )


@pytest.mark.parametrize("point", ["batch.written", "batch.complete", *points_of("upload")])
def test_killed_at_every_point(tmp_path: Path, point: str) -> None:
    """Guards: half an output at the URL; an output that is not uploaded by the next run."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    source = write_lines(tmp_path / "in.jsonl", LINES)
    job = Job(work, [str(source), str(there)], here / "out.jsonl")
    assert job.run(point)[0] == -signal.SIGKILL
    assert not (there / "out.jsonl").exists()
    assert job.run() == (0, "")
    assert [path.name for path in there.iterdir()] == ["out.jsonl"]
    assert (there / "out.jsonl").read_bytes() == job.out.read_bytes()
    assert set(by_id(records(job.out))) == WHOLE.keys()
    assert {path.name for path in here.iterdir()} == {"out.jsonl", "out.jsonl.journal"}
