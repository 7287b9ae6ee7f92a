"""Downloads from a small server on loopback that speaks the hub's API: whole, shard by shard, refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.checkpoints import TINY, random_weights, write_checkpoint, write_weights
from support.hub_server import COMMIT, Hub, serving

from dsmoe_convert.checkpoint import SAFETENSORS, read_index
from dsmoe_convert.convert import ConvertOptions, RunOptions
from dsmoe_convert.errors import HubError, TokenizerError
from dsmoe_convert.low_disk import ShardWindow
from dsmoe_convert.sources import SourceOptions, convert, plan_source
from dsmoe_local.base.durable import Journal
from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, MissingExtraError, UsageError
from dsmoe_local.base.progress import Advanced, Event, Started
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_local.model.layout import tensor_specs

SECRET = "hf_" + "secret" * 5
N_SHARDS = 5
SCRIPT = "from dsmoe_local.cli.main import convert; convert()"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the hub's cache out of the user's; free shards without a second's delay."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("dsmoe_quantize.write.pipeline.SYNC_SECONDS", 0.01)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_checkpoint(tmp_path / "tiny-moe", n_shards=N_SHARDS)
    (folder / "modeling_deepseek.py").write_text("raise SystemExit('never run')")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    with serving(Hub(folder)) as running:
        yield running


@pytest.fixture
def expected(hub: Hub, tmp_path: Path) -> bytes:
    """What the same files give as a local folder."""
    return convert(str(hub.folder), tmp_path / "expected.gguf").path.read_bytes()


def fetch(
    hub: Hub,
    out: Path,
    *,
    low_disk: bool = False,
    run: RunOptions | None = None,
    pre: str | None = None,
    **source: str,
) -> bytes:
    options = SourceOptions(endpoint=hub.url, low_disk=low_disk, **source)
    return convert(hub.repository, out, ConvertOptions(pre=pre), options, run).path.read_bytes()


def shards_in(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


def test_whole_repository(hub: Hub, tmp_path: Path, expected: bytes) -> None:
    """A file that is not needed and fetched, or needed and not; a second run that downloads again."""
    events: list[Event] = []
    assert fetch(hub, tmp_path / "out.gguf", run=RunOptions(listen=events.append)) == expected
    downloads = hub.downloads()
    assert len(shards_in(downloads)) == N_SHARDS
    assert not [name for name in downloads if name.endswith((".py", ".bin"))]
    total = next(
        event.total for event in events if isinstance(event, Started) and event.stage == "downloading"
    )
    shards = list(hub.folder.glob("*.safetensors"))
    assert total == sum(shard.stat().st_size for shard in shards)
    names = {shard.name for shard in shards}
    assert sum(e.amount for e in events if isinstance(e, Advanced) and e.detail in names) == total
    hub.requests.clear()
    assert fetch(hub, tmp_path / "again.gguf") == expected
    assert hub.downloads() == []


def test_additional_chat_templates(hub: Hub, tmp_path: Path) -> None:
    """Guards: chat templates for tools that are not downloaded, and files beside them that are."""
    templates = hub.folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ 1 }}")
    (templates / "README.md").write_text("no template")
    (hub.folder / "tiktoken.model").write_text("not needed")
    fetch(hub, tmp_path / "out.gguf")
    assert read_gguf(tmp_path / "out.gguf").get("tokenizer.chat_template.rag") == "{{ 1 }}"
    assert not {"tiktoken.model", "additional_chat_templates/README.md"} & set(hub.downloads())


def test_tiktoken_ranks(hub: Hub, tmp_path: Path) -> None:
    """Guards: a repository refused because it has no tokenizer.json."""
    (hub.folder / "tokenizer.json").unlink()
    (hub.folder / "tiktoken.model").write_text("damaged")
    with pytest.raises(TokenizerError, match="line 1"):
        fetch(hub, tmp_path / "out.gguf", pre="kimi-k2")
    assert "tiktoken.model" in hub.downloads()


def test_low_disk(hub: Hub, tmp_path: Path, expected: bytes) -> None:
    """More than two shards on disk at a time, or something left behind."""
    staging = tmp_path / "out" / ".out.gguf.shards"
    most = 0

    def look(name: str) -> None:
        nonlocal most
        if name.endswith(".safetensors"):
            most = max(most, 1 + len(list(staging.glob("*.safetensors"))))

    hub.on_file = look
    (tmp_path / "out").mkdir()
    assert fetch(hub, tmp_path / "out" / "out.gguf", low_disk=True) == expected
    assert 1 <= most <= 2
    assert shards_in(hub.downloads()) == sorted(shard.name for shard in hub.folder.glob("*.safetensors"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.gguf"]
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_low_disk_with_a_split_output(hub: Hub, tmp_path: Path) -> None:
    """A wait for space, or a file left behind, because the unfinished output has other names."""
    options = ConvertOptions(split_max_size=400_000)
    convert(str(hub.folder), tmp_path / "expected.gguf", options)
    (tmp_path / "out").mkdir()
    source = SourceOptions(endpoint=hub.url, low_disk=True)
    summary = convert(hub.repository, tmp_path / "out" / "expected.gguf", options, source)
    names = [f"expected-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert summary.path == tmp_path / "out" / names[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_low_disk_with_scattered_tensors(tmp_path: Path) -> None:
    """A checkpoint whose experts are spread over many shards: a wait for a shard that never ends."""
    weights = random_weights(TINY)
    names = sorted(weights, key=lambda name: name[::-1])
    folder = write_checkpoint(tmp_path / "tiny-moe", n_shards=1)
    for path in folder.glob("model*"):
        path.unlink()
    write_weights(folder, {name: weights[name] for name in names}, "sharded", 6)
    expected = convert(str(folder), tmp_path / "expected.gguf").path.read_bytes()
    with serving(Hub(folder)) as hub:
        assert fetch(hub, tmp_path / "out.gguf", low_disk=True) == expected
        assert len(shards_in(hub.downloads())) == 6


def test_low_disk_leaves_nothing_when_refused(hub: Hub, tmp_path: Path) -> None:
    """An output that may not be written, found out after shards came, or a staging folder left behind."""
    out = tmp_path / "out" / "out.gguf"
    with pytest.raises(DsmoeError, match="folder"):
        fetch(hub, out, low_disk=True)
    out.parent.mkdir()
    out.write_bytes(b"precious")
    with pytest.raises(DsmoeError, match="exists"):
        fetch(hub, out, low_disk=True)
    assert [path.name for path in out.parent.iterdir()] == ["out.gguf"]
    assert shards_in(hub.downloads()) == []


def test_low_disk_resumes(hub: Hub, tmp_path: Path, expected: bytes) -> None:
    """An interruption in the middle that makes the next run fetch everything again."""
    run = RunOptions(threads=1)
    out = tmp_path / "out.gguf"

    def stop(name: str) -> None:
        if name.startswith("model-00004"):
            run.stop.set()

    hub.on_file = stop
    with pytest.raises(InterruptedRunError):
        fetch(hub, out, low_disk=True, run=run)
    assert not out.exists()
    hub.on_file = lambda name: None
    hub.requests.clear()
    assert fetch(hub, out, low_disk=True) == expected
    assert not list(tmp_path.glob(".out.gguf*"))


@pytest.mark.parametrize(
    ("fault", "sync_seconds"),
    [
        ("output.slab:60", 0.01),
        ("output.synced:1", 1),
        ("output.journaled:1", 1),
        ("shards.spent:1", 0.01),
        ("shards.spent:3", 0.01),
    ],
)
def test_low_disk_killed(fault: str, sync_seconds: float, hub: Hub, tmp_path: Path, expected: bytes) -> None:
    """kill -9 after a shard was read and deleted, before what was made of it was on the disk: it had to be
    downloaded again.
    """
    out = tmp_path / "out" / "out.gguf"
    out.parent.mkdir()
    code = f"from dsmoe_quantize.write import pipeline; pipeline.SYNC_SECONDS = {sync_seconds}; {SCRIPT}"
    command = [sys.executable, "-c", code, hub.repository, "-o", str(out), "--low-disk"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    killed = subprocess.run(command, env=environment | {"DSMOE_FAULT": fault}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    # One comes after the other: all but the last were here. The hub library may ask for a file again.
    complete = list(dict.fromkeys(shards_in(hub.downloads())))[:-1]
    staging = out.parent / ".out.gguf.shards"
    # The hub library downloads a file again if it was killed before it wrote what it knows about it: three
    # lines in a file that is created empty.
    known = {
        path.stem
        for path in staging.glob(".cache/huggingface/download/*.metadata")
        if path.read_text().count("\n") == 3
    }
    complete += [path.name for path in staging.glob("*.safetensors") if path.name in known]
    assert complete
    hub.requests.clear()
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(complete) & set(hub.downloads())
    assert out.read_bytes() == expected
    assert [path.name for path in out.parent.iterdir()] == ["out.gguf"]


def test_a_shard_is_kept_until_it_is_not_needed(
    hub: Hub, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is deleted when it is read, and not when the journal names all that was made of it."""
    out = tmp_path / "out.gguf"
    staging = tmp_path / ".out.gguf.shards"
    index = read_index(hub.folder / SAFETENSORS.index, SAFETENSORS.suffix)
    needs = {spec.name: {index[source] for source in spec.sources} for spec in tensor_specs(TINY)}
    release = ShardWindow.release
    released: set[str] = set()

    def look(window: ShardWindow, names: Sequence[str]) -> None:
        with Journal(tmp_path / ".out.gguf.part.journal") as journal:
            assert set(journal.entries[1:]) == released | set(names)
        waiting = set().union(*(needs[name] for name in needs.keys() - released))
        gone = set(shards_in(hub.downloads())[:-1]) - {path.name for path in staging.iterdir()}
        assert not gone & waiting
        released.update(names)
        release(window, names)

    monkeypatch.setattr(ShardWindow, "release", look)
    assert fetch(hub, out, low_disk=True) == expected
    assert released == needs.keys()


def test_a_moved_branch_starts_over(hub: Hub, tmp_path: Path) -> None:
    """A resume that mixes two commits."""
    run = RunOptions(threads=1)
    hub.on_file = lambda name: run.stop.set() if name.startswith("model-00004") else None
    with pytest.raises(InterruptedRunError):
        fetch(hub, tmp_path / "out.gguf", low_disk=True, run=run)
    write_checkpoint(hub.folder, seed=5, n_shards=N_SHARDS)
    hub.commit = "f" * 40
    hub.revisions = ("main", hub.commit)
    hub.on_file = lambda name: None
    notes: list[Event] = []
    found = fetch(hub, tmp_path / "out.gguf", low_disk=True, run=RunOptions(listen=notes.append))
    assert found == convert(str(hub.folder), tmp_path / "fresh.gguf").path.read_bytes()


def test_a_cut_connection(hub: Hub, tmp_path: Path, expected: bytes) -> None:
    """A connection that drops in the middle of a shard."""
    hub.cut_after["model-00002-of-00005.safetensors"] = 5000
    assert fetch(hub, tmp_path / "out.gguf") == expected


def test_interrupted_download(hub: Hub, tmp_path: Path, expected: bytes) -> None:
    """Ctrl-C during a download that waits for its end, or forgets the shards that are complete."""
    run = RunOptions()
    hub.on_file = lambda name: run.stop.set() if name.startswith("model-00003") else None
    with pytest.raises(InterruptedRunError):
        fetch(hub, tmp_path / "out.gguf", run=run)
    hub.on_file = lambda name: None
    hub.requests.clear()
    assert fetch(hub, tmp_path / "out.gguf") == expected
    assert 1 <= len(shards_in(hub.downloads())) <= 3


def test_revision(hub: Hub, tmp_path: Path) -> None:
    """A revision that is ignored."""
    hub.revisions = ("main", "v1", COMMIT)
    fetch(hub, tmp_path / "out.gguf", revision="v1")
    assert any(path.endswith("/revision/v1") for _, path in hub.requests)
    with pytest.raises(HubError, match="no such revision"):
        fetch(hub, tmp_path / "other.gguf", revision="v2")


def test_the_address_of_a_page(hub: Hub, tmp_path: Path) -> None:
    """The address that a browser shows, refused, or its revision ignored."""
    address = f"https://huggingface.co/{hub.repository}/tree/v2"
    command = [sys.executable, "-c", SCRIPT, address, "-o", str(tmp_path / "out.gguf")]
    environment = {**os.environ, "HF_ENDPOINT": hub.url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "no such revision" in done.stderr
    assert ("GET", f"/api/models/{hub.repository}/revision/v2") in hub.requests


def test_token(hub: Hub, tmp_path: Path, expected: bytes) -> None:
    """A token that is not sent, or printed."""
    hub.token = SECRET
    assert fetch(hub, tmp_path / "out.gguf", token=SECRET) == expected
    for wrong, gated, word in (
        ("", False, "private"),
        ("", True, "granted"),
        (SECRET + "x", False, "private"),
    ):
        hub.gated = gated
        with pytest.raises(HubError) as caught:
            fetch(hub, tmp_path / "no.gguf", token=wrong or "hf_other")
        assert word in str(caught.value)
        assert SECRET not in str(caught.value)


def test_secrets_are_scrubbed(tmp_path: Path) -> None:
    """A library error that quotes the token."""
    options = SourceOptions(endpoint=f"http://127.0.0.1:1/{SECRET}", token=SECRET)
    with pytest.raises(HubError) as caught:
        convert("tester/tiny-moe", tmp_path / "out.gguf", None, options)
    assert SECRET not in str(caught.value)


def test_offline(hub: Hub, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE that still asks the server, or a cached repository that cannot be used without it."""
    assert fetch(hub, tmp_path / "out.gguf") == expected
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    found = convert(hub.repository, tmp_path / "off.gguf", None, SourceOptions(endpoint=hub.url))
    assert found.path.read_bytes() == expected
    dry = plan_source(
        hub.repository, ConvertOptions(), SourceOptions(endpoint=hub.url), RunOptions(), headers_only=True
    )
    assert dry.conversion.default_name == "tiny-moe-F32.gguf"
    assert hub.requests == []
    with pytest.raises(HubError, match="cache"):
        convert("tester/other", tmp_path / "no.gguf", None, SourceOptions(endpoint=hub.url))
    with pytest.raises(UsageError, match="OFFLINE"):
        fetch(hub, tmp_path / "low.gguf", low_disk=True)


def test_a_bad_configuration_is_found_before_the_weights(hub: Hub, tmp_path: Path) -> None:
    """33 GB that are downloaded first and refused then."""
    config = (hub.folder / "config.json").read_text()
    (hub.folder / "config.json").write_text(config.replace('"softmax"', '"sigmoid"'))
    with pytest.raises(DsmoeError, match="scoring_func"):
        fetch(hub, tmp_path / "out.gguf")
    assert shards_in(hub.downloads()) == []


def test_an_output_that_may_not_be_written_is_found_before_the_weights(hub: Hub, tmp_path: Path) -> None:
    """33 GB that are downloaded first and refused then."""
    (tmp_path / "out.gguf").write_bytes(b"precious")
    with pytest.raises(DsmoeError, match="exists already"):
        fetch(hub, tmp_path / "out.gguf")
    with pytest.raises(DsmoeError, match="folder does not exist"):
        fetch(hub, tmp_path / "no" / "out.gguf")
    assert hub.downloads() == []


def test_missing_files(hub: Hub, tmp_path: Path) -> None:
    """A repository that lacks a shard, its tokenizer or all weights."""
    shard = next(hub.folder.glob("model-00002*"))
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(HubError, match="model-00002"):
        fetch(hub, tmp_path / "out.gguf")
    shard.write_bytes(content)
    for path in hub.folder.glob("model*"):
        path.unlink()
    with pytest.raises(DsmoeError, match="pickle"):
        fetch(hub, tmp_path / "out.gguf")
    (hub.folder / "pytorch_model.bin").unlink()
    with pytest.raises(HubError, match="no weights"):
        fetch(hub, tmp_path / "out.gguf")
    (hub.folder / "tokenizer.json").unlink()
    with pytest.raises(HubError, match="no tokenizer"):
        fetch(hub, tmp_path / "out.gguf")


def test_pickles_from_the_hub(tmp_path: Path) -> None:
    """A repository with .bin weights only."""
    folder = write_checkpoint(tmp_path / "tiny-moe", form="bin", dtype=torch.bfloat16)
    options = ConvertOptions(allow_pickle=True)
    expected = convert(str(folder), tmp_path / "expected.gguf", options).path.read_bytes()
    with serving(Hub(folder)) as hub:
        source = SourceOptions(endpoint=hub.url)
        assert convert(hub.repository, tmp_path / "out.gguf", options, source).path.read_bytes() == expected


def test_pickles_that_cannot_be_read_stay_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """33 GB of .bin files that are downloaded before someone notices that torch is not installed."""
    folder = write_checkpoint(tmp_path / "tiny-moe", form="bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with serving(Hub(folder)) as hub:
        options, source = ConvertOptions(allow_pickle=True), SourceOptions(endpoint=hub.url)
        with pytest.raises(MissingExtraError, match=r"\[pickle\]"):
            convert(hub.repository, tmp_path / "out.gguf", options, source)
        assert "pytorch_model.bin" not in hub.downloads()


def test_dry_run_fetches_no_weights(hub: Hub) -> None:
    """A dry run that downloads what it does not need."""
    planned = plan_source(
        hub.repository, ConvertOptions("q4"), SourceOptions(endpoint=hub.url), RunOptions(), headers_only=True
    )
    assert planned.conversion.default_name == "tiny-moe-q4.gguf"
    assert shards_in(hub.downloads()) == []


def test_interrupted_planning(hub: Hub) -> None:
    """Ctrl-C during a dry run, or while the tokenizer is read, that is forgotten."""
    run = RunOptions()
    run.stop.set()
    with pytest.raises(InterruptedRunError):
        plan_source(str(hub.folder), ConvertOptions(), SourceOptions(), run)


@pytest.mark.parametrize(
    "name",
    ["~nobody-of-that-name/x", "nothing", "a/b/c", "./missing", "/missing", "a/..", "owner/na me", "-o/x"],
)
def test_names_that_are_neither(name: str, tmp_path: Path) -> None:
    """A typing error that turns into a request to the hub."""
    with pytest.raises(UsageError, match="neither a folder nor"):
        convert(name, tmp_path / "out.gguf")


def test_files_instead_of_folders(tmp_path: Path) -> None:
    """A GGUF or a shard given as the source."""
    (tmp_path / "x.gguf").touch()
    with pytest.raises(UsageError, match="is a file"):
        convert(str(tmp_path / "x.gguf"), None)


def test_revision_of_a_folder(tmp_path: Path) -> None:
    """A revision that is silently ignored for a local folder."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="--revision"):
        convert(str(tmp_path), None, None, SourceOptions(revision="v1"))
