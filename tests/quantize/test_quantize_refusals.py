"""What the quantizer refuses, and that nothing is lost when it does."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.tiny_gguf import MOE, NARROW, patch_weight, write_tiny

from dsmoe_local.base import durable
from dsmoe_local.base.errors import (
    DsmoeError,
    FileError,
    FormatError,
    InterruptedRunError,
    LockedError,
    NoSpaceError,
    UsageError,
)
from dsmoe_local.base.progress import Advanced, Event, Started
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.errors import KernelError, RequantizeError, WeightError
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file
from dsmoe_quantize.write import kernels, pipeline
from dsmoe_quantize.write.output import Summary


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "source.gguf", MOE)


def run(source: Path, out: Path, word: str = "q8_0", **options: object) -> Summary:
    return quantize_file(plan_quantization(source, resolve(word)), out, **options)  # type: ignore[arg-type]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("make_link", [os.link, os.symlink])
def test_output_is_the_input(source: Path, tmp_path: Path, make_link: object) -> None:
    """llama_model_quantize empties its input when the output leads to it."""
    before = source.read_bytes()
    link = tmp_path / "link.gguf"
    make_link(source, link)  # type: ignore[operator]
    for out in (source, link, tmp_path / "." / "source.gguf"):
        with pytest.raises(UsageError, match="same file"):
            run(source, out, force=True)
    assert source.read_bytes() == before
    assert names(tmp_path) == {"source.gguf", "link.gguf"}


def test_existing_output_needs_force(source: Path, tmp_path: Path) -> None:
    """An output that is overwritten unasked."""
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(FileError, match="exists already"):
        run(source, out)
    assert out.read_bytes() == b"precious"
    assert names(tmp_path) == {"source.gguf", "out.gguf"}
    run(source, out, force=True)
    assert read_gguf(out).tensors


def test_output_through_a_symlink(source: Path, tmp_path: Path) -> None:
    """A rename that replaces the user's link instead of the file it leads to."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out.gguf"
    link.symlink_to(tmp_path / "disk" / "real.gguf")
    run(source, link)
    assert link.is_symlink()
    assert names(tmp_path / "disk") == {"real.gguf"}


def test_strange_outputs(source: Path, tmp_path: Path) -> None:
    """A folder or a device as output, or no folder to write into."""
    with pytest.raises(UsageError, match="not a file"):
        run(source, tmp_path)
    with pytest.raises(UsageError, match="not a file"):
        run(source, Path("/dev/null"), force=True)
    with pytest.raises(FileError, match="folder does not exist"):
        run(source, tmp_path / "missing" / "out.gguf")


def test_two_runs_on_one_output(source: Path, tmp_path: Path) -> None:
    """Two runs that write into one temp file."""
    out = tmp_path / "out.gguf"
    with durable.locked(out), pytest.raises(LockedError, match="another run"):
        run(source, out)
    run(source, out)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (-np.inf, "infinite"), (np.inf, "infinite")])
@pytest.mark.parametrize("word", ["q8_0", "q4_k_m", "f32", "f16", "bf16"])
def test_weights_that_are_no_numbers(tmp_path: Path, dtype: str, value: float, what: str, word: str) -> None:
    """A NaN passes ggml's kernels and its own check of their output; the copy of a tensor must see it too."""
    source = write_tiny(tmp_path / "source.gguf", NARROW, dtype)
    name, shape = "blk.1.ffn_up_exps.weight", (3, 96, 576)
    index = (2, 57, 575)
    patch_weight(source, name, int(np.ravel_multi_index(index, shape)), value)
    patch_weight(source, name, int(np.ravel_multi_index((2, 57, 575), shape)) + 1, value)
    with pytest.raises(WeightError, match=what) as caught:
        run(source, tmp_path / "out.gguf", word)
    assert (caught.value.tensor, caught.value.index) == (name, index)
    assert "blk.1.ffn_up_exps.weight[2, 57, 575]" in str(caught.value)
    assert names(tmp_path) == {"source.gguf"}


def test_bad_weights_in_norms_and_routers(tmp_path: Path) -> None:
    """Tensors that are only copied, unchecked."""
    for name in ("output_norm.weight", "blk.1.ffn_gate_inp.weight"):
        source = write_tiny(tmp_path / "source.gguf", NARROW)
        patch_weight(source, name, 5, np.nan)
        with pytest.raises(WeightError) as caught:
            run(source, tmp_path / "out.gguf")
        assert caught.value.tensor == name


@pytest.mark.parametrize(
    ("word", "value"), [("f16", 70000.0), ("q8_0", 1e8), ("q4_k_m", 1e8), ("q4_0", 1e30)]
)
def test_weights_too_large(tmp_path: Path, word: str, value: float) -> None:
    """A weight that becomes infinite in F16, or in a block's F16 scale."""
    source = write_tiny(tmp_path / "source.gguf", NARROW)
    patch_weight(source, "blk.0.attn_q.weight", 576 * 3 + 4, value)
    with pytest.raises(WeightError, match="too large for") as caught:
        run(source, tmp_path / "out.gguf", word)
    assert caught.value.index == (3, 4)


def test_quantized_source(source: Path, tmp_path: Path) -> None:
    """Quality lost twice, unasked; tensors of the wanted type must not count."""
    small = run(source, tmp_path / "small.gguf").path
    with pytest.raises(RequantizeError, match="quantized already"):
        plan_quantization(small, resolve("q4_k_m"))
    again = run(small, tmp_path / "again.gguf")
    assert again.path.read_bytes() == small.read_bytes()


def test_damaged_scales_in_a_quantized_source(source: Path, tmp_path: Path) -> None:
    """A quantized tensor that is copied or read although a scale in it is no number."""
    small = run(source, tmp_path / "small.gguf").path
    info = read_gguf(small).tensors["blk.0.attn_q.weight"]
    with small.open("r+b") as file:
        file.seek(info.offset + 34 * 9)
        file.write(np.float16(np.nan).tobytes())
    for word in ("q8_0", "f32"):
        plan = plan_quantization(small, resolve(word), allow_requantize=True)
        with pytest.raises(WeightError) as caught:
            quantize_file(plan, tmp_path / "out.gguf")
        assert caught.value.index == (1, 32)


def test_no_space_before(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fills the disk although it could have known."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(NoSpaceError, match="not enough disk space"):
        run(source, tmp_path / "out.gguf")
    assert names(tmp_path) == {"source.gguf"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_on_the_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """ENOSPC in a worker thread must end the run with its own error; the next run goes on."""
    expected = run(source, tmp_path / "expected.gguf").path.read_bytes()
    _fail_write_number(60, code, monkeypatch)
    monkeypatch.setattr(pipeline, "SYNC_BYTES", 1)
    out = tmp_path / "out.gguf"
    with pytest.raises(NoSpaceError, match=r"(?s)the output cannot be written: .*free some space"):
        run(source, out)
    assert not out.exists()
    monkeypatch.undo()
    run(source, out)
    assert out.read_bytes() == expected
    assert names(tmp_path) == {"source.gguf", "expected.gguf", "out.gguf"}


def _fail_write_number(number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, left, lock = os.pwrite, [number], threading.Lock()

    def failing(descriptor: int, data: bytes, offset: int) -> int:
        with lock:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(code, os.strerror(code))
        # Short writes are legal too.
        return pwrite(descriptor, data[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", failing)


@pytest.mark.parametrize("ordinal", [1, 2, 5])
def test_failing_sync(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ordinal: int) -> None:
    """An fsync error that is retried or ignored: the kernel may have dropped the data."""
    calls = [0]
    sync = durable.sync

    def failing(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == ordinal:
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(durable, "sync", failing)
    monkeypatch.setattr(pipeline, "SYNC_BYTES", 1)
    with pytest.raises(FileError, match="Input/output error"):
        run(source, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_stop_and_continue(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop that is not obeyed, or loses what was done."""
    expected = run(source, tmp_path / "expected.gguf").path.read_bytes()
    monkeypatch.setattr(pipeline, "SYNC_BYTES", 1)
    stop = threading.Event()
    n_slabs = 0

    def listen(event: Event) -> None:
        nonlocal n_slabs
        n_slabs += isinstance(event, Advanced)
        if n_slabs == 60:
            stop.set()

    out = tmp_path / "out.gguf"
    with pytest.raises(InterruptedRunError, match="interrupted"):
        run(source, out, listen=listen, stop=stop, threads=1)
    assert not out.exists()
    assert n_slabs < 70
    assert run(source, out).n_resumed > 0
    assert out.read_bytes() == expected


def test_error_in_the_listener(source: Path, tmp_path: Path) -> None:
    """An exception in a worker that is swallowed, or hangs the run."""

    def listen(event: Event) -> None:
        if isinstance(event, Advanced):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(source, tmp_path / "out.gguf", listen=listen)
    # Other tests' servers may have left some of theirs.
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("encoder", "syncer"))]


def test_source_changes_meanwhile(source: Path, tmp_path: Path) -> None:
    """An output that is half of one model and half of another."""
    before = source.stat().st_mtime_ns

    def listen(event: Event) -> None:
        os.utime(source, ns=(before + 5, before + 5))

    with pytest.raises(FileError, match="changed while it was read"):
        run(source, tmp_path / "out.gguf", listen=listen)
    assert names(tmp_path) == {"source.gguf"}


def test_source_shrinks_meanwhile(source: Path, tmp_path: Path) -> None:
    """A short read that is taken for data."""
    plan = plan_quantization(source, resolve("q8_0"))

    def shrink(event: object) -> None:
        if isinstance(event, Started):
            os.truncate(source, source.stat().st_size - 4096)

    with pytest.raises(FileError, match="truncated"):
        quantize_file(plan, tmp_path / "out.gguf", listen=shrink)


def test_source_is_replaced_after_planning(source: Path, tmp_path: Path) -> None:
    """A header of one file before the weights of another."""
    plan = plan_quantization(source, resolve("q8_0"))
    content = source.read_bytes()
    source.unlink()
    source.write_bytes(content)
    with pytest.raises(FileError, match="changed while it was in use"):
        quantize_file(plan, tmp_path / "out.gguf")


def test_sources_that_are_no_models(tmp_path: Path) -> None:
    """Files that must not reach a kernel."""
    with pytest.raises(FileError):
        plan_quantization(tmp_path / "missing.gguf", resolve("q8_0"))
    with pytest.raises(FileError, match="this is a folder") as caught:
        plan_quantization(tmp_path, resolve("q8_0"))
    assert "dsmoe-convert" in caught.value.remedy
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(FormatError, match="not a GGUF file"):
        plan_quantization(tmp_path / "text.gguf", resolve("q8_0"))


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback instead of a sentence when llama-cpp-python is not there or has no library."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelError, match="is missing"):
        kernels.library_path()


def test_kernels_do_not_import_llama_cpp() -> None:
    """The quantizer that loads the whole engine."""
    import subprocess
    import sys

    code = (
        "import sys; from dsmoe_quantize.write import kernels; from dsmoe_local.model.ggml import GgmlType\n"
        "kernels.encoder(GgmlType.Q4_K); sys.exit('llama_cpp' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_messages_are_short(source: Path, tmp_path: Path) -> None:
    """Errors of more than three lines, or without the file."""
    with pytest.raises(DsmoeError) as caught:
        run(source, source)
    assert len(str(caught.value).splitlines()) <= 3
    assert str(source) in str(caught.value)
