"""Find the tensors of a PyTorch `.bin` file. A restricted child process unpickles it.

`torch.load(weights_only=True, mmap=True)` creates only tensors, but it still interprets a pickle. If that is
exploited or crashes, only the child is affected. The child returns spans of bytes. The parent checks them and
reads them like those of safetensors. Run as a module, this file is the child.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmoe_convert import restricted
from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.shards import DTYPES, StoredTensor
from dsmoe_local.base.errors import FileError
from dsmoe_local.base.text import safe_line

if TYPE_CHECKING:
    import torch

_SECONDS = 600  # reading the pickle of a 10 GB shard takes about one second
_CPU_SECONDS = 120
_MEMORY = 2 << 30  # in addition to the file, which is mapped
_LOCAL_HEADER = 30  # bytes of a zip entry's local header before its name


def read_tensors(path: Path, stop: threading.Event | None = None) -> dict[str, StoredTensor]:
    """Return the tensors of a `.bin` file by name, as a restricted child process reports them.

    Raises CheckpointError if the file is not a dictionary of dense, contiguous tensors in PyTorch's zip
    format, FileError if it cannot be read, InterruptedRunError if `stop` is set.
    """
    try:
        size = path.stat().st_size
        status, output = restricted.run_module(__name__, str(path.absolute()), seconds=_SECONDS, stop=stop)
    except restricted.GaveUpError as error:
        raise _refusal(path, str(error)) from error
    except OSError as error:
        raise FileError(f"cannot read the shard: {error.strerror}", where=path) from error
    answer = _answer(output)
    if status != 0 or "tensors" not in answer:
        raise _refusal(path, str(answer.get("error") or f"the child process failed with status {status}"))
    tensors = {}
    for entry in answer["tensors"] if isinstance(answer["tensors"], list) else [None]:
        tensor = _stored(entry, path.name, size)
        if tensor is None:
            raise CheckpointError(
                "damaged .bin file: a tensor is outside the file",
                where=f"{path}: {safe_line(str(entry), 80)}",
                remedy="download it again",
            )
        tensors[tensor.name] = tensor
    return tensors


def _refusal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"not a usable .bin file: {safe_line(what, 80)}",
        where=path,
        remedy="save the model as safetensors and convert that",
    )


def _stored(entry: object, shard: str, size: int) -> StoredTensor | None:
    """Return a tensor of the child's answer; None unless it is within a file of `size` bytes."""
    match entry:
        case [str(name), str(dtype), list(shape), int(offset), int(n_bytes)]:
            if not all(type(length) is int and length >= 0 for length in shape):
                return None
            kind = DTYPES.get(dtype)
            expected = math.prod(shape) * kind.n_bytes if kind else n_bytes
            if min(offset, n_bytes) < 0 or n_bytes != expected or offset + n_bytes > size:
                return None
            return StoredTensor(name, dtype, tuple(shape), shard, offset, n_bytes)
    return None


def _answer(output: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _describe(path: str) -> list[tuple[str, str, list[int], int, int]]:
    """In the child: return name, dtype, shape, offset in the file, and size of every tensor."""
    restricted.leave_network()
    import torch

    restricted.confine(memory=_MEMORY + Path(path).stat().st_size, seconds=_CPU_SECONDS)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(state, dict) and set(state) == {"state_dict"}:
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise ValueError("it is not a dictionary of tensors")
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
    """Return the address at which byte 0 of the file is mapped.

    torch does not report the offset of a tensor in the file. But all storages are in one mapping of the file,
    and the zip directory lists their offsets. Raises ValueError unless addresses and offsets agree.
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
        raise ValueError("its storages differ from its zip directory")
    base = min(addresses) - min(entries)
    if {address - base: size for address, size in addresses.items()} != entries:
        raise ValueError("its storages differ from its zip directory")
    return base


def _main() -> int:
    try:
        answer: dict[str, Any] = {"tensors": _describe(sys.argv[1])}
    except Exception as error:  # noqa: BLE001 - the parent reports any error that the pickle causes
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    sys.stdout.write(json.dumps(answer))
    return 0 if "tensors" in answer else 1


if __name__ == "__main__":
    sys.exit(_main())
