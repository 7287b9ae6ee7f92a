"""`dsmoe pull` from a small server on loopback: which model, resuming, digests, and files that are there."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_server import Hub, serving
from support.split_files import split_with_gguf
from support.tiny_gguf import MOE, NARROW, write_tiny

from dsmoe_convert.errors import HubError
from dsmoe_convert.hub import Digest, HubRequest
from dsmoe_convert.pull import Pulled, choose, models_of, parse_source, pull
from dsmoe_local.base.durable import locked
from dsmoe_local.base.errors import (
    DsmoeError,
    FileError,
    InterruptedRunError,
    LockedError,
    NoSpaceError,
    UsageError,
)
from dsmoe_local.base.paths import data_folder
from dsmoe_local.base.progress import Advanced, Event, Started
from dsmoe_local.model.discovery import unfinished_downloads, unfinished_path

SCRIPT = "from dsmoe_local.cli.main import dsmoe; dsmoe()"
REPOSITORY = "tester/tiny-GGUF"


@pytest.fixture(autouse=True)
def own_hub_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A repository with a model in one file, one in three files, and files that are no models."""
    folder = tmp_path / "repository"
    (folder / "Q8_0").mkdir(parents=True)
    write_tiny(folder / "tiny-Q4_K_M.gguf", NARROW)
    split_with_gguf(write_tiny(tmp_path / "whole.gguf", MOE), folder / "Q8_0" / "tiny-Q8_0", 40)
    (folder / "mmproj-F16.gguf").write_bytes(b"the vision part")
    (folder / "tiny.imatrix.gguf").write_bytes(b"an importance matrix")
    (folder / "README.md").write_text("a model card")
    with serving(Hub(folder, REPOSITORY)) as running:
        yield running


def fetch(hub: Hub, folder: Path, wanted: str = "", *, name: str = "", force: bool = False) -> Pulled:
    request, stop = HubRequest(REPOSITORY, endpoint=hub.url), threading.Event()
    return pull(request, wanted, folder, ignore, stop, name=name, force=force)


def ignore(event: Event) -> None:
    pass


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


SPLIT = [f"tiny-Q8_0-{number:05}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a/b-GGUF", ("a/b-GGUF", None, "")),
        ("a/b:Q8_0", ("a/b", None, "Q8_0")),
        ("hf.co/a/b:q8_0", ("a/b", None, "q8_0")),
        ("https://huggingface.co/a/b/", ("a/b", None, "")),
        ("https://huggingface.co/a/b?show=files#top", ("a/b", None, "")),
        ("https://huggingface.co/a/b/tree/main", ("a/b", "main", "")),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F1/", ("a/b", "refs/pr/1", "")),
        ("https://hf.co/a/b/blob/main/c-Q8_0.gguf", ("a/b", "main", "c-Q8_0")),
        (
            "https://huggingface.co/a/b/resolve/v1/Q8/c-Q8_0-00001-of-00002.gguf?download=true",
            ("a/b", "v1", "c-Q8_0"),
        ),
    ],
)
def test_names_of_repositories(text: str, found: tuple[str, str | None, str]) -> None:
    """Guards: an address that ollama or a browser has, refused or taken literally."""
    assert parse_source(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "llama3",
        "",
        "a/b/c",
        "../b",
        "a/..",
        "model.gguf",
        ":Q4_K_M",
        "https://huggingface.co/a",
        "https://hf.co.invalid/a/b",
    ],
)
def test_words_that_are_not_repositories(text: str) -> None:
    """Guards: a request to the hub for a typing error, and no word on the form of names."""
    with pytest.raises(UsageError, match="is not a repository") as caught:
        parse_source(text)
    assert "OWNER/REPO" in caught.value.remedy


@pytest.mark.parametrize(
    ("files", "wanted", "chosen"),
    [
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_0.gguf"], "", "m-Q4_K_M.gguf"),
        (["m.Q8_0.gguf", "m.Q4_K_S.gguf"], "", "m.Q4_K_S.gguf"),
        (["m-q8.gguf", "m-q4.gguf", "m-q4-fast.gguf"], "", "m-q4.gguf"),
        (["m-q8.gguf", "m-q4.gguf", "m-q4-fast.gguf"], "q4-fast", "m-q4-fast.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-BF16.gguf"], "", "m-UD-Q4_K_XL.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-BF16.gguf"], "q4_k_xl", "m-UD-Q4_K_XL.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K_XL.gguf"], "Q4_K_XL", "m-Q4_K_XL.gguf"),
        (["model.gguf", "mmproj-F16.gguf", "model.imatrix.gguf"], "", "model.gguf"),
        (["Qwen3-30B-A3B-IQ4_XS.gguf", "Qwen3-30B-A3B-Q3_K_L.gguf"], "", "Qwen3-30B-A3B-IQ4_XS.gguf"),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "b-q4_k_m", "b-Q4_K_M.gguf"),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "b-Q4_K_M.gguf", "b-Q4_K_M.gguf"),
        (["m-Q8_0.gguf", "m-Q4_K_M-00001-of-00002.gguf"], "", "m-Q8_0.gguf"),
    ],
)
def test_which_model(files: list[str], wanted: str, chosen: str) -> None:
    """Guards: the part of another model, an incomplete one, or a type that nobody asked for."""
    assert choose(models_of(dict.fromkeys(files, 1)), wanted, "a/b").files == (chosen,)


@pytest.mark.parametrize(
    ("files", "wanted", "what", "where"),
    [
        ({"m-Q8_0.gguf": 2000, "m-BF16.gguf": 4000}, "", "none of about 4 bits", "Q8_0 (2 KB), BF16 (4 KB)"),
        ({"m-Q8_0.gguf": 2000}, "Q9", "no model 'Q9'", "it has Q8_0 (2 KB)"),
        ({"m-Q4_K_M.gguf": 1}, "Q4_K", "no model 'Q4_K'", "Q4_K_M"),
        ({"a-Q4_K_M.gguf": 1, "b-Q4_K_M.gguf": 2}, "", "2 models of that type", "it has a-Q4_K_M (1 B), b-"),
        ({"model.safetensors": 1}, "", "no GGUF model", "a/b"),
        ({f"m-Q{number}_X\x1b.gguf": 1 for number in range(99)}, "x", "no model 'x'", "Q0_X"),
    ],
)  # fmt: skip
def test_no_such_model(files: dict[str, int], wanted: str, what: str, where: str) -> None:
    """Guards: a refusal that does not say what there is; one longer than three lines."""
    with pytest.raises(DsmoeError) as caught:
        choose(models_of(files), wanted, "a/b")
    assert what in caught.value.what
    assert where in caught.value.where
    assert "dsmoe " in caught.value.remedy
    assert len(str(caught.value).splitlines()) == 3
    assert "\x1b" not in str(caught.value)


def test_a_model_in_one_file(hub: Hub, tmp_path: Path) -> None:
    """Guards: files that are not needed, something left behind, and a second download of what is there."""
    folder = tmp_path / "new" / "models"
    events: list[Event] = []
    source = hub.folder / "tiny-Q4_K_M.gguf"
    found = pull(HubRequest(REPOSITORY, endpoint=hub.url), "", folder, events.append, threading.Event())
    assert found == Pulled(folder / source.name, is_new=True)
    assert found.path.read_bytes() == source.read_bytes()
    assert names_in(folder) == [source.name]
    assert hub.downloads() == [source.name]
    n_bytes = source.stat().st_size
    assert [e for e in events if isinstance(e, Started)] == [
        Started("downloading", n_bytes),
        Started("verifying", n_bytes),
    ]
    assert sum(e.amount for e in events if isinstance(e, Advanced)) == 2 * n_bytes
    hub.requests.clear()
    assert fetch(hub, folder) == Pulled(found.path, is_new=False)
    assert hub.downloads() == []


def test_a_model_in_several_files(hub: Hub, tmp_path: Path) -> None:
    """Guards: a part of a model, and files in subfolders that no name leads to."""
    (tmp_path / "models").mkdir()
    found = fetch(hub, tmp_path / "models", "q8_0")
    assert found.path.name == SPLIT[0]
    assert names_in(tmp_path / "models") == SPLIT
    for name in SPLIT:
        assert (tmp_path / "models" / name).read_bytes() == (hub.folder / "Q8_0" / name).read_bytes()


def test_a_small_file(hub: Hub, tmp_path: Path) -> None:
    """Guards: a file below the size for Git LFS, of which the hub has another digest."""
    (hub.folder / "tiny-Q2_K.gguf").write_bytes(b"GGUF" * 100)
    assert fetch(hub, tmp_path / "models", "Q2_K").path.read_bytes() == b"GGUF" * 100


def test_an_interrupted_download_is_continued(hub: Hub, tmp_path: Path) -> None:
    """Guards: a download that begins again from its first byte after Ctrl-C."""
    folder, stop = tmp_path / "models", threading.Event()
    source = hub.folder / "tiny-Q4_K_M.gguf"
    hub.cut_after[source.name] = 5000
    hub.on_file = lambda name: stop.set()
    with pytest.raises(InterruptedRunError) as caught:
        pull(HubRequest(REPOSITORY, endpoint=hub.url), "", folder, ignore, stop)
    assert "same command" in caught.value.remedy
    for thread in threading.enumerate():
        if thread.name == "hub":
            thread.join()
    ((final, (part,)),) = unfinished_downloads(folder).items()
    assert final == folder / source.name
    # How much arrived before the interruption depends on the network.
    part.write_bytes(source.read_bytes()[:5000])
    hub.on_file = ignore_name
    hub.requests.clear()
    events: list[Event] = []
    pull(HubRequest(REPOSITORY, endpoint=hub.url), "", folder, events.append, threading.Event())
    assert Started("downloading", source.stat().st_size, 5000) in events
    assert hub.downloads() == []  # only a range
    assert final.read_bytes() == source.read_bytes()
    assert names_in(folder) == [source.name]


def ignore_name(name: str) -> None:
    pass


def test_a_damaged_download(hub: Hub, tmp_path: Path) -> None:
    """Guards: bytes that changed on the way, published; a damaged part that every later run continues."""
    folder = tmp_path / "models"
    source = hub.folder / "tiny-Q4_K_M.gguf"
    folder.mkdir()
    unfinished_path(folder / source.name, _sha256(source)).write_bytes(b"x" * 5000)
    with pytest.raises(HubError, match="damaged"):
        fetch(hub, folder)
    assert names_in(folder) == []
    assert fetch(hub, folder).path.read_bytes() == source.read_bytes()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_model_changed_meanwhile(hub: Hub, tmp_path: Path) -> None:
    """Guards: an old download that is continued with the new file's bytes, or that stays on the disk."""
    folder = tmp_path / "models"
    folder.mkdir()
    source = hub.folder / "tiny-Q4_K_M.gguf"
    unfinished_path(folder / source.name, "0" * 64).write_bytes(b"old")
    fetch(hub, folder)
    assert names_in(folder) == [source.name]


def test_another_file_of_that_name(hub: Hub, tmp_path: Path) -> None:
    """Guards: a user's file that a download replaces."""
    folder = tmp_path / "models"
    folder.mkdir()
    source = hub.folder / "tiny-Q4_K_M.gguf"
    mine = folder / source.name
    for content in (b"mine", b"x" * source.stat().st_size):
        mine.write_bytes(content)
        with pytest.raises(FileError, match="other content"):
            fetch(hub, folder)
        assert mine.read_bytes() == content
    assert hub.downloads() == []
    assert fetch(hub, folder, name="theirs").path == folder / "theirs.gguf"
    assert not fetch(hub, folder, name="theirs").is_new
    assert mine.read_bytes() == content
    assert fetch(hub, folder, force=True).is_new
    assert mine.read_bytes() == source.read_bytes()


def test_another_name_for_a_split_model(hub: Hub, tmp_path: Path) -> None:
    """Guards: files of two models that are taken for one; a name that leaves the models folder."""
    folder = tmp_path / "models"
    pulled = fetch(hub, folder, "Q8_0", name="large")
    assert pulled.path == folder / "large-00001-of-00003.gguf"
    assert names_in(folder) == [name.replace("tiny-Q8_0", "large") for name in SPLIT]
    fetch(hub, tmp_path / "same", "Q8_0")
    for path in folder.iterdir():
        same = tmp_path / "same" / path.name.replace("large", "tiny-Q8_0")
        assert path.read_bytes() == same.read_bytes()
    for name in ("../large", ".large", "a/b", "a\nb", "~"):
        with pytest.raises(UsageError, match="cannot be the name of a model"):
            fetch(hub, folder, name=name)


def test_a_link_of_that_name(hub: Hub, tmp_path: Path) -> None:
    """Guards: a link to a disk that is not there, noticed after the download, or replaced."""
    folder = tmp_path / "models"
    folder.mkdir()
    link = folder / "tiny-Q4_K_M.gguf"
    link.symlink_to(tmp_path / "nothing")
    with pytest.raises(FileError, match="a file that is missing"):
        fetch(hub, folder)
    assert hub.downloads() == []
    assert link.is_symlink()
    fetch(hub, folder, force=True)
    assert link.is_file()
    assert not link.is_symlink()


@pytest.mark.parametrize("digest", ["", "0" * 63, "../" * 20 + "0000", "Z" * 64])
def test_no_digest(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    """Guards: gigabytes that are downloaded and cannot be verified; a path in the name of a file."""
    monkeypatch.setattr("dsmoe_convert.hub.Digest", lambda text, is_sha256: Digest(digest, is_sha256))
    with pytest.raises(HubError, match="no valid digest"):
        fetch(hub, tmp_path / "models")
    assert hub.downloads() == []


def test_names_in_commands() -> None:
    """Guards: a suggested command that runs another one, in the name of a file."""
    with pytest.raises(UsageError) as caught:
        choose(models_of({"a; rm -r x.gguf": 1, "b.gguf": 2}), "c", "a/b")
    assert "dsmoe pull 'a/b:a; rm -r x'" in caught.value.remedy


def test_a_disk_without_room(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a disk that is full after an hour, which was known before; bytes counted that are there."""
    folder = tmp_path / "models"
    n_bytes = (hub.folder / "tiny-Q4_K_M.gguf").stat().st_size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(n_bytes, 0, n_bytes - 1))
    with pytest.raises(NoSpaceError) as caught:
        fetch(hub, folder)
    assert "DSMOE_MODELS_FOLDER" in caught.value.remedy
    assert hub.downloads() == []
    source = hub.folder / "tiny-Q4_K_M.gguf"
    unfinished_path(folder / source.name, _sha256(source)).write_bytes(source.read_bytes()[:1])
    fetch(hub, folder)


def test_two_at_once(hub: Hub, tmp_path: Path) -> None:
    """Guards: two downloads into one file."""
    (tmp_path / "models").mkdir()
    with locked(tmp_path / "models" / "tiny-Q4_K_M.gguf"), pytest.raises(LockedError):
        fetch(hub, tmp_path / "models")


def test_a_file_that_the_hub_does_not_send(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: advice to install a package that would not help."""
    monkeypatch.setattr("huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE", 1000)
    with pytest.raises(HubError, match="over HTTP") as caught:
        fetch(hub, tmp_path / "models")
    assert "hf download" in caught.value.remedy


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a request although the user has forbidden them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        fetch(hub, tmp_path / "models")
    assert hub.requests == []


def dsmoe(hub: Hub, *arguments: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "DSMOE_FAULT": fault}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )


@pytest.mark.parametrize(
    ("fault", "n_left"),
    [("pull.downloaded:1", 2), ("pull.downloaded:3", 0), ("pull.verified:1", 0), ("pull.renamed:1", 0)],
)
def test_kills(fault: str, n_left: int, hub: Hub, tmp_path: Path) -> None:
    """Guards: a model that shows incomplete after kill -9, or files that are downloaded again."""
    folder = data_folder() / "models"
    assert dsmoe(hub, "pull", f"{REPOSITORY}:Q8_0", fault=fault).returncode == -signal.SIGKILL
    assert not (folder / SPLIT[0]).exists()
    listed = dsmoe(hub, "models").stdout
    assert "unfinished download: tiny-Q8_0, " in listed
    hub.requests.clear()
    done = dsmoe(hub, "pull", f"{REPOSITORY}:Q8_0")
    assert done.returncode == 0, done.stderr
    assert len(hub.downloads()) == n_left
    assert names_in(folder) == SPLIT
    for name in SPLIT:
        assert (folder / name).read_bytes() == (hub.folder / "Q8_0" / name).read_bytes()


def test_the_command(hub: Hub) -> None:
    """Guards: a model that is downloaded and not found by its name; no word on the next step."""
    done = dsmoe(hub, "pull", REPOSITORY)
    path = data_folder() / "models" / "tiny-Q4_K_M.gguf"
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("tiny-Q4_K_M downloaded: BF16, ")
    assert "dsmoe run tiny-Q4_K_M" in done.stderr
    assert str(path) in dsmoe(hub, "models", "--json").stdout
    address = f"https://huggingface.co/{REPOSITORY}/blob/main/tiny-Q4_K_M.gguf"
    assert "is there already" in dsmoe(hub, "pull", address).stderr
    (hub.folder / "odd-Q2_K.gguf").write_bytes(b"no model" * 10_000)
    refused = dsmoe(hub, "pull", f"{REPOSITORY}:Q2_K")
    assert refused.returncode == 1
    assert "cannot be used: odd-Q2_K.gguf is not a GGUF file" in refused.stderr
    assert "dsmoe rm odd-Q2_K deletes it" in refused.stderr
    assert "dsmoe pull tester/tiny-GGUF" in dsmoe(hub, "run", REPOSITORY, "-p", "x").stderr
    assert "private" in dsmoe(hub, "pull", "tester/none").stderr
