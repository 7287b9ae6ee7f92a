"""The file that holds what a reference model predicted: its likeliest tokens and the mass of the others.

A `block_file` with "DSMOEREF" and {"n_vocab"}, which tells of its n tokens:

    target (int32), its logprob, tail mass (float32), n_entries (int32)   of all tokens
    id (int32), logprob (float32)                                         of all entries, likeliest first

Logarithms are natural. What goes in is `reference`'s to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine.observe.block_file import BlockReader, BlockWriter

_MAGIC = b"DSMOEREF"
_ROUNDING = 1e-3  # how much above 1 a probability may be


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was predicted of one token: `target` is what really came. `ids` are the likeliest, in order."""

    target: int
    logprob: float
    tail_mass: float
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


class ReferenceWriter(BlockWriter):
    """Appends predictions."""

    def __init__(self, path: Path, n_vocab: int) -> None:
        super().__init__(path, _MAGIC, {"n_vocab": n_vocab})

    def add(self, request_id: str, index: int, predictions: Sequence[Prediction]) -> None:
        """Append those of tokens that follow each other, from `index` on."""
        told = [
            np.array([p.target for p in predictions], "<i4").tobytes(),
            np.array([p.logprob for p in predictions], "<f4").tobytes(),
            np.array([p.tail_mass for p in predictions], "<f4").tobytes(),
            np.array([len(p.ids) for p in predictions], "<i4").tobytes(),
            np.concatenate([p.ids for p in predictions]).astype("<i4").tobytes(),
            np.concatenate([p.logprobs for p in predictions]).astype("<f4").tobytes(),
        ]
        self.append(request_id, index, len(predictions), told)


class ReferenceReader(BlockReader):
    """Finds predictions."""

    def __init__(self, path: Path) -> None:
        self._known: tuple[int, list[Prediction]] = (-1, [])
        super().__init__(path, _MAGIC)

    def check(self) -> None:
        """See BlockReader."""
        self.n_vocab = self.number("n_vocab")

    def find(self, request_id: str, index: int) -> Prediction | None:
        """What was predicted of a request's token; None if it was not scored.

        FormatError: the file is forged.
        """
        place = self.place(request_id, index)
        if place is None:
            return None
        if self._known[0] != place.position:
            self._known = (place.position, self._read_block(self.read(place), place.n_tokens))
        return self._known[1][place.number]

    def _read_block(self, told: bytes, count: int) -> list[Prediction]:
        floats = np.frombuffer(told, "<f4", len(told) // 4)
        integers = floats.view("<i4")
        sizes = integers[3 * count : 4 * count].astype(np.int64)
        total = int(sizes.sum())
        if len(told) != 16 * count + 8 * total or (sizes < 1).any():
            raise self.damaged("a block is not as long as it says")
        targets, ids = integers[:count], integers[4 * count : 4 * count + total]
        logprobs, masses = floats[count : 2 * count], floats[2 * count : 3 * count]
        entries = floats[4 * count + total :]
        if total and not 0 <= int(ids.min()) <= int(ids.max()) < self.n_vocab:
            raise self.damaged("it has tokens that its vocabulary lacks")
        logarithms = np.concatenate([logprobs, entries])
        possible = np.isfinite(logarithms) & (logarithms <= _ROUNDING)
        if not (possible.all() and ((masses >= 0) & (masses <= 1)).all()):
            raise self.damaged("it has probabilities that are none")
        ends = np.cumsum(sizes).tolist()
        return [
            Prediction(int(targets[j]), float(logprobs[j]), float(masses[j]), ids[a:b], entries[a:b])
            for j, (a, b) in enumerate(zip([0, *ends], ends, strict=False))
        ]
