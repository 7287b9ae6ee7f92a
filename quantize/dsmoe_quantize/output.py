"""Writing one GGUF file, whatever the tensors come from: crash-safe, resumable, on all cores.

A lock, a sibling `.NAME.part` with its journal of finished tensors, then sync, verify, rename. The converter
and the quantizer both end here; neither knows how. What the tensors hold is `encode`'s concern.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base.progress import Listener, ignore
from dsmoe_local.model.gguf_file import Field
from dsmoe_quantize.encode import TensorJob


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished run wrote. `n_resumed` tensors were there from an interrupted one."""

    path: Path
    n_bytes: int
    n_tensors: int
    n_weights: int
    n_resumed: int
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """File size, header included, in bits for each weight."""
        return 8 * self.n_bytes / self.n_weights


def write_output(
    out: Path,
    metadata: Mapping[str, Field],
    jobs: Sequence[TensorJob],
    fingerprint: Mapping[str, object],
    *,
    sources: Sequence[Path] = (),
    threads: int = 0,
    force: bool = False,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Summary:
    """Write `jobs` in this order, after `metadata` as it is, to `out`, which appears complete or not at all.

    `fingerprint` holds whatever decides the bytes (the source's identity, the options), as JSON values by a
    name that a user understands: a run that was interrupted is continued if it agrees, else started over.
    `sources` are the files read: the output must be none of them. `threads` 0 means all cores. `listen` is
    called from one thread at a time. `stop` ends the run within two seconds.

    Raises UsageError (the output is a source, a folder, or exists without `force`), LockedError, NoSpaceError,
    FileError, WeightError, InterruptedRunError, and what the row sources raise. An existing output is
    untouched in every such case, and what is finished is kept for the next run.
    """
    raise NotImplementedError
