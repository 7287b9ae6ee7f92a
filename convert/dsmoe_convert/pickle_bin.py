"""Where the tensors of a PyTorch `.bin` file lie. Unpickling happens in a child process, restricted.

`torch.load(weights_only=True, mmap=True)` builds tensors and nothing else, but it still interprets a pickle:
if it is tricked or crashes, a child without our files open is what it takes down. The child reports spans
of bytes; the parent then reads them as it reads safetensors. Run as a module, this file is that child.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.stored import DTYPES, StoredTensor
from dsmoe_local.base.errors import FileError, InterruptedRunError
from dsmoe_local.base.text import safe_line

if TYPE_CHECKING:
    import torch

_TIMEOUT = 600  # seconds; reading the pickle of a 10 GB shard takes about one
_POLL = 0.2
_LOCAL_HEADER = 30  # bytes of a zip entry's local header before its name


def read_tensors(path: Path, stop: threading.Event | None = None) -> dict[str, StoredTensor]:
    """The tensors of one `.bin` file by name, as a restricted child process reports them.

    `stop` ends the child. The answer is then of no use, and InterruptedRunError is raised.

    Raises CheckpointError if the file is not a plain dictionary of dense, contiguous tensors in PyTorch's zip
    format, FileError if it cannot be read.
    """
    # -P: a file called torch.py in the current folder must not be imported.
    command = [sys.executable, "-P", "-m", "dsmoe_convert.pickle_bin", str(path.absolute())]
    try:
        size = path.stat().st_size
        status, output = _run(command, stop or threading.Event())
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"reading the pickle took more than {_TIMEOUT} s", where=path) from error
    except OSError as error:
        raise FileError(f"cannot read the shard: {error.strerror}", where=path) from error
    answer = _answer(output)
    if status != 0 or "tensors" not in answer:
        what = answer.get("error") or f"the reader died with status {status}"
        raise CheckpointError(
            f"not a usable .bin file: {safe_line(str(what), 80)}",
            where=path,
            remedy="save it as safetensors and convert that",
        )
    tensors = {
        name: StoredTensor(name, dtype, tuple(shape), path.name, offset, n_bytes)
        for name, dtype, shape, offset, n_bytes in answer["tensors"]
    }
    for tensor in tensors.values():
        kind = DTYPES.get(tensor.dtype)
        expected = math.prod(tensor.shape) * kind.n_bytes if kind else tensor.n_bytes
        if tensor.offset < 0 or tensor.n_bytes != expected or tensor.offset + tensor.n_bytes > size:
            raise CheckpointError(
                "damaged .bin file: a tensor lies outside of it",
                where=f"{path}: {safe_line(tensor.name, 80)}",
            )
    return tensors


def _run(command: list[str], stop: threading.Event) -> tuple[int, bytes]:
    """Exit status and output of the child, which Ctrl-C on the terminal does not reach."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as child:
        give_up = time.monotonic() + _TIMEOUT
        while True:
            try:
                output, _ = child.communicate(timeout=_POLL)
            except subprocess.TimeoutExpired:
                if stop.is_set() or time.monotonic() > give_up:
                    child.kill()
                if stop.is_set():
                    raise InterruptedRunError("interrupted", remedy="run the same command again") from None
                if time.monotonic() > give_up:
                    raise
            else:
                return child.returncode, output


def _answer(output: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _describe(path: str) -> list[tuple[str, str, list[int], int, int]]:
    """In the child: (name, dtype, shape, offset in the file, bytes) of every tensor."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(state, dict) and set(state) == {"state_dict"}:
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise ValueError("it does not hold a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"the entry {name!r} is not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or not tensor.is_contiguous():
            raise ValueError(f"{name} is not dense and contiguous")
    base = _file_offset(path, list(state.values()))
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return [
        (
            name,
            names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")),
            list(tensor.shape),
            tensor.data_ptr() - base if tensor.numel() else 0,
            tensor.nbytes,
        )
        for name, tensor in state.items()
    ]


def _file_offset(path: str, tensors: list[torch.Tensor]) -> int:
    """The address at which byte 0 of the file is mapped.

    torch does not tell where in the file a tensor lies, but all storages point into one mapping of it, and
    the zip directory lists the same storages: in order of address and of offset the two must agree.
    """
    addresses = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors)
        if storage.nbytes()
    }
    entries: dict[int, int] = {}
    with zipfile.ZipFile(path) as archive, Path(path).open("rb") as file:
        for info in archive.infolist():
            if "/data/" in info.filename and info.file_size:
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("its tensors are compressed")
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER)
                lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                entries[info.header_offset + _LOCAL_HEADER + lengths] = info.file_size
    if not addresses or len(addresses) != len(entries):
        raise ValueError("its storages are not those of its zip directory")
    base = min(addresses) - min(entries)
    if {address - base: size for address, size in addresses.items()} != entries:
        raise ValueError("its storages are not those of its zip directory")
    return base


def _main() -> int:
    try:
        answer: dict[str, Any] = {"tensors": _describe(sys.argv[1])}
    except Exception as error:  # noqa: BLE001 - whatever the pickle provokes becomes one line for the parent
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    sys.stdout.write(json.dumps(answer))
    return 0 if "tensors" in answer else 1


if __name__ == "__main__":
    sys.exit(_main())
