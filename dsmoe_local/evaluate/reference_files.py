"""The two files of a recorded reference: its predictions, and the choices of its routers.

Both consist of blocks of consecutive prompt tokens. A token is found by its request id and index.

    magic (8 bytes), length of a JSON header, the header
    blocks: length and CRC-32 of a body, the body:
        n, index of the first token, length of the request id (uint32), the id in UTF-8, data of n tokens
    0 in place of a length, CRC-32 of the header and of all blocks' lengths and CRC-32s

Predictions have the magic DSMOEREF and the header {"n_vocab"}. The data of n tokens are

    target (int32), its log-probability, tail mass (float32), number of entries (int32): n of each
    token id (int32), log-probability (float32): one of each per entry, the likeliest first

Routing has the magic DSMOEGAT and the header {"first_layer", "n_layers", "n_experts"}: the layers with
routers. The data of n tokens are

    number k of experts per token (int32), token ids (n, int32)
    chosen experts, shape (n, n_layers, k), and costs, shape (n, n_layers, n_experts), both uint16

A cost is -ln p in steps of COST_STEP nats, so p has a relative error of exp(COST_STEP / 2) at most, down to
e^-32. All numbers are little-endian, all logarithms natural.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.durable import locked, publish, sync
from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.model.hyperparameters import Hyperparameters, ModelOutline

COST_STEP = 2.0**-11

_PREDICTIONS, _ROUTING = b"DSMOEREF", b"DSMOEGAT"
_VERSION = 2
_HEADER = struct.Struct("<8sI")
_BLOCK = struct.Struct("<II")
_BODY = struct.Struct("<III")
_MAX_BODY = 1 << 28
_MAX_HEADER = 1 << 12
_MAX_LOGPROB = 1e-3  # rounding may make a probability a little larger than 1
_MIN_PROBABILITY = np.float32(1e-30)
_MAX_COST = np.float32(np.iinfo(np.uint16).max)

Decoded = TypeVar("Decoded")


class BlockWriter:
    """Writes blocks to `.NAME.part` beside `path`, which `finish` completes, verifies and renames to `path`.

    The partial file of a killed process is replaced.
    """

    def __init__(self, path: Path, magic: bytes, header: Mapping[str, int]) -> None:
        """Create the partial file. Raises FileError if `path` exists, LockedError if another run has it."""
        self._path, self._magic = path, magic
        self._part = path.with_name(f".{path.name}.part")
        self._is_empty, self._is_failed, self._is_complete, self._is_named = True, False, False, False
        text = json.dumps({"version": _VERSION, **header}).encode()
        head = _HEADER.pack(magic, len(text)) + text
        self._checksum = zlib.crc32(head)
        with ExitStack() as stack, self._write_errors():
            stack.enter_context(locked(path))
            if os.path.lexists(path):
                raise self._exists("remove it, or name another file")
            self._part.unlink(missing_ok=True)
            # Private, since it contains tokens of the text. O_EXCL: nobody can place a link here meanwhile.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._file = os.fdopen(os.open(self._part, flags, 0o600), "wb")
            self._file.write(head)
            self._lock = stack.pop_all()

    def append(self, request_id: str, index: int, n_tokens: int, data: Sequence[bytes]) -> None:
        """Append the data of consecutive tokens; the first has the index `index`. Raises FileError."""
        if self._is_complete:
            raise FileError(
                "the reference is complete: nothing can be added", where=self._path, remedy="record a new one"
            )
        name = request_id.encode("utf-8", "surrogatepass")
        body = b"".join([_BODY.pack(n_tokens, index, len(name)), name, *data])
        head = _BLOCK.pack(len(body), zlib.crc32(body))
        with self._write_errors():
            self._file.write(head + body)
        self._checksum = zlib.crc32(head, self._checksum)
        self._is_empty = False

    def finish(self) -> None:
        """Sync and verify the file, and rename it to `path`. Do nothing if it has no blocks or is renamed.

        Raises FileError, also if `path` exists by now; FormatError if the file cannot be read back.
        """
        if self._is_empty or self._is_named:
            return
        with self._write_errors():
            if not self._is_complete:
                self._file.write(_BLOCK.pack(0, self._checksum))
                self._file.flush()
                sync(self._file.fileno())
                self._is_complete = True
            BlockReader(self._part, self._magic).close()
            try:
                publish(self._part, self._path)
            except FileExistsError as error:
                raise self._exists(f"the new one is {self._part.name}: rename it") from error
        self._is_named = True

    def close(self) -> None:
        """Finish and close the file. May be called twice."""
        if self._file.closed:
            return
        with self._lock:
            try:
                self.finish()
            finally:
                # Closing writes the buffer, and the disk may be full.
                with suppress(OSError):
                    self._file.close()
                if not self._is_complete:
                    self._part.unlink(missing_ok=True)

    def _exists(self, remedy: str) -> FileError:
        return FileError("the reference exists already", where=self._path, remedy=remedy)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turn OSError into FileError. Then a block may be incomplete, so all further calls fail."""
        if self._is_failed:
            raise FileError(
                "the reference is incomplete: it could not be written",
                where=self._path,
                remedy="record it again",
            )
        try:
            yield
        except OSError as error:
            self._is_failed = True
            raise FileError(f"the reference cannot be written: {error.strerror}", where=self._path) from error


class _Block(NamedTuple):
    """The index of a block's first token, their number, and the position of the data in the file."""

    first: int
    n_tokens: int
    offset: int
    size: int


class BlockReader(Generic[Decoded]):
    """Finds tokens by request id and index. Subclasses decode blocks; the last decoded one is cached."""

    def __init__(self, path: Path, magic: bytes) -> None:
        """Read and check the whole file. Raises FileError, and FormatError if it is damaged or incomplete."""
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise FileError(f"the reference cannot be read: {reason}", where=path) from error
        self._blocks: dict[str, list[_Block]] = {}
        self._decoded: tuple[int, Decoded] | None = None
        self.n_tokens = 0
        try:
            self._header = self._read_index(magic)
            self.check_header()
        except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
            self.close()
            raise self.damaged(str(error)) from error

    def check_header(self) -> None:
        """Read the numbers in the header. Raises ValueError or KeyError."""

    def decode(self, data: bytes, n_tokens: int) -> Decoded:
        """Decode the data of a block. Raises FormatError."""
        raise NotImplementedError

    def block_of(self, request_id: str, index: int) -> tuple[Decoded, int] | None:
        """Return the decoded block that contains a token, and its index there; None if there is none."""
        blocks = self._blocks.get(request_id, [])
        number = bisect_right(blocks, index, key=lambda block: block.first) - 1
        if number < 0 or index - blocks[number].first >= blocks[number].n_tokens:
            return None
        first, n_tokens, offset, size = blocks[number]
        if self._decoded is None or self._decoded[0] != offset:
            self._decoded = (offset, self.decode(self._data[offset : offset + size], n_tokens))
        return self._decoded[1], index - first

    def damaged(self, how: str) -> FormatError:
        """Return the error for a damaged file."""
        return FormatError(
            f"the reference is damaged or was not finished: {how}", where=self._path, remedy="make it again"
        )

    def number(self, key: str) -> int:
        """Return a number in the header. Raises ValueError if it is negative or no integer."""
        value = self._header[key]
        if type(value) is not int or value < 0:
            raise ValueError(f"{key} is not a number")
        return value

    def _read_index(self, magic: bytes) -> dict[str, object]:
        found, length = _HEADER.unpack_from(self._data)
        if found != magic:
            raise ValueError("it does not begin with the magic bytes of a reference")
        if length > _MAX_HEADER:
            raise ValueError("its header is too long")
        offset = _HEADER.size + length
        header: dict[str, object] = json.loads(self._data[_HEADER.size : offset])
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']} is not known")
        total = zlib.crc32(self._data[:offset])
        while True:
            head = self._data[offset : offset + _BLOCK.size]
            size, checksum = _BLOCK.unpack(head)
            offset += _BLOCK.size
            if not size:
                break
            self._add_block(offset, size, checksum)
            total = zlib.crc32(head, total)
            offset += size
        if checksum != total or offset != len(self._data):
            raise ValueError("its checksum or size is wrong")
        for blocks in self._blocks.values():
            blocks.sort()
        return header

    def _add_block(self, offset: int, size: int, checksum: int) -> None:
        body = self._data[offset : offset + size] if size <= _MAX_BODY else b""
        if len(body) != size or zlib.crc32(body) != checksum:
            raise ValueError(f"the block at offset {offset} is truncated or damaged")
        n_tokens, first, name_size = _BODY.unpack_from(body)
        start = _BODY.size + name_size
        if start > size:
            raise ValueError(f"the block at offset {offset} is too short for its request id")
        name = body[_BODY.size : start].decode("utf-8", "surrogatepass")
        self._blocks.setdefault(name, []).append(_Block(first, n_tokens, offset + start, size - start))
        self.n_tokens += n_tokens

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._data.close()


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction of one token.

    `target` is the actual token, `logprob` its log-probability. `ids` are the likeliest tokens, the likeliest
    first, with `logprobs`. `tail_mass` is the total probability of all other tokens.
    """

    target: int
    logprob: float
    tail_mass: float
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


class PredictionWriter(BlockWriter):
    """Writes a file of predictions."""

    def __init__(self, path: Path, n_vocab: int) -> None:
        super().__init__(path, _PREDICTIONS, {"n_vocab": n_vocab})

    def add(self, request_id: str, index: int, predictions: Sequence[Prediction]) -> None:
        """Append the predictions of consecutive tokens; the first has the index `index`."""
        data = [
            np.array([p.target for p in predictions], "<i4").tobytes(),
            np.array([p.logprob for p in predictions], "<f4").tobytes(),
            np.array([p.tail_mass for p in predictions], "<f4").tobytes(),
            np.array([len(p.ids) for p in predictions], "<i4").tobytes(),
            np.concatenate([p.ids for p in predictions]).astype("<i4").tobytes(),
            np.concatenate([p.logprobs for p in predictions]).astype("<f4").tobytes(),
        ]
        self.append(request_id, index, len(predictions), data)


class PredictionReader(BlockReader[list[Prediction]]):
    """Reads a file of predictions."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _PREDICTIONS)

    def check_header(self) -> None:
        """See BlockReader."""
        self.n_vocab = self.number("n_vocab")

    def find(self, request_id: str, index: int) -> Prediction | None:
        """Return the prediction of a token; None if it was not scored. Raises FormatError."""
        found = self.block_of(request_id, index)
        return None if found is None else found[0][found[1]]

    def decode(self, data: bytes, n_tokens: int) -> list[Prediction]:
        """See BlockReader."""
        floats = np.frombuffer(data, "<f4", len(data) // 4)
        integers = floats.view("<i4")
        sizes = integers[3 * n_tokens : 4 * n_tokens].astype(np.int64)
        total = int(sizes.sum())
        if len(data) != 16 * n_tokens + 8 * total or (sizes < 1).any():
            raise self.damaged("a block does not have the length that it states")
        targets, ids = integers[:n_tokens], integers[4 * n_tokens : 4 * n_tokens + total]
        logprobs, masses = floats[n_tokens : 2 * n_tokens], floats[2 * n_tokens : 3 * n_tokens]
        entries = floats[4 * n_tokens + total :]
        if total and not 0 <= int(ids.min()) <= int(ids.max()) < self.n_vocab:
            raise self.damaged("a token is not in the vocabulary")
        logarithms = np.concatenate([logprobs, entries])
        is_possible = np.isfinite(logarithms) & (logarithms <= _MAX_LOGPROB)
        if not (is_possible.all() and ((masses >= 0) & (masses <= 1)).all()):
            raise self.damaged("a probability is not between 0 and 1")
        ends = np.cumsum(sizes).tolist()
        return [
            Prediction(int(targets[j]), float(logprobs[j]), float(masses[j]), ids[a:b], entries[a:b])
            for j, (a, b) in enumerate(zip([0, *ends], ends, strict=False))
        ]


class Routers(NamedTuple):
    """The layers of a model that have routers, and how many experts each of them has."""

    first_layer: int
    n_layers: int
    n_experts: int


def routers_of(outline: ModelOutline) -> Routers | None:
    """Return the routers of a model; None if it is dense, or no table describes it."""
    if not isinstance(outline, Hyperparameters) or not outline.is_moe:
        return None
    return Routers(outline.n_dense_layers, outline.n_moe_layers, outline.n_routed_experts)


@dataclass(frozen=True, slots=True)
class Choices:
    """The experts chosen for consecutive tokens, and the costs of all experts, with the shapes above."""

    tokens: npt.NDArray[np.int32]
    experts: npt.NDArray[np.uint16]
    costs: npt.NDArray[np.uint16]


def costs_of(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the costs of probabilities."""
    steps = np.rint(np.log(np.maximum(probabilities, _MIN_PROBABILITY)) * np.float32(-1 / COST_STEP))
    return np.clip(steps, 0, _MAX_COST).astype(np.uint16)


def logarithms_of(costs: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """Return log-probabilities, normalized so that the probabilities of the last axis sum up to 1."""
    logarithms: npt.NDArray[np.float64] = costs.astype(np.float64) * -COST_STEP
    logarithms -= np.log(np.exp(logarithms).sum(-1, keepdims=True))
    return logarithms


class RoutingWriter(BlockWriter):
    """Writes a file of router choices."""

    def __init__(self, path: Path, routers: Routers) -> None:
        super().__init__(path, _ROUTING, routers._asdict())

    def add(self, request_id: str, index: int, choices: Choices) -> None:
        """Append the choices for consecutive tokens; the first has the index `index`."""
        n_tokens, _, n_used = choices.experts.shape
        data = [
            np.array([n_used], "<i4").tobytes(),
            choices.tokens.astype("<i4").tobytes(),
            choices.experts.astype("<u2").tobytes(),
            choices.costs.astype("<u2").tobytes(),
        ]
        self.append(request_id, index, n_tokens, data)


class RoutingReader(BlockReader[Choices]):
    """Reads a file of router choices."""

    def __init__(self, path: Path) -> None:
        self._n_used: int | None = None
        super().__init__(path, _ROUTING)

    def check_header(self) -> None:
        """See BlockReader."""
        self.routers = Routers(*(self.number(name) for name in Routers._fields))

    def find(self, request_id: str, index: int) -> Choices | None:
        """Return the choices for one token, without the first dimension; None if it was not scored.

        Raises FormatError if the values of its block are invalid.
        """
        found = self.block_of(request_id, index)
        if found is None:
            return None
        block, j = found
        return Choices(block.tokens[j], block.experts[j], block.costs[j])

    def decode(self, data: bytes, n_tokens: int) -> Choices:
        """See BlockReader."""
        _, n_layers, n_experts = self.routers
        n_used = int.from_bytes(data[:4], "little")
        size = 4 + 4 * n_tokens + 2 * n_tokens * n_layers * (n_used + n_experts)
        if not 1 <= n_used <= n_experts or len(data) != size:
            raise self.damaged("a block does not have the length that it states")
        tokens = np.frombuffer(data, "<i4", n_tokens, 4)
        both = np.frombuffer(data, "<u2", offset=4 + 4 * n_tokens)
        split = n_tokens * n_layers * n_used
        experts = both[:split].reshape(n_tokens, n_layers, n_used)
        if self._n_used not in (None, n_used) or (experts >= n_experts).any():
            raise self.damaged("an expert is not in the model")
        self._n_used = n_used
        return Choices(tokens, experts, both[split:].reshape(n_tokens, n_layers, n_experts))
