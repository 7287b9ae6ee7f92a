"""What benchmarks/quality.py finds out, as plain data, and the JSON files that it is kept in, one for each
part.

Each row has the digest of the types that it was measured with: rows of a recipe that has changed are refused.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.support.quality_types import BASE, Variant
from dsmoe_local.base.durable import write_file
from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.paths import cache_folder

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("reference", "steps", "demo", "sizes", "speed", "points")


@dataclass(frozen=True, slots=True)
class SizeRow:
    """A type on the 16B shape, in bytes of its weights."""

    type: str
    imatrix: bool
    digest: str
    n_bytes: int
    bits_per_weight: float
    n_bytes_per_token: float


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """A type's tokens per second on the shape with few layers, and their ratio to the base's beside it, round
    by round, and the bytes that decoding one token reads there.
    """

    type: str
    imatrix: bool
    digest: str
    n_bytes_per_token: float
    prompt: Sequence[float]
    decode: Sequence[float]
    prompt_ratio: Sequence[float]
    decode_ratio: Sequence[float]


@dataclass(frozen=True, slots=True)
class FidelityRow:
    """A file beside its unquantized model. Divergences in nats, of a token; `windows` are their means over
    each window. `same_experts` and `overlap` are means over the layers.
    """

    type: str
    imatrix: bool
    digest: str
    file_size: int
    bits_per_weight: float
    n_bytes_per_token: float
    perplexity: float
    perplexity_error: float
    kl: float
    kl_error: float
    kl_upper: float
    kl_99: float
    same_top: float
    same_experts: float
    overlap: float
    windows: Sequence[float]


@dataclass(frozen=True, slots=True)
class AlikeRow(FidelityRow):
    """`base` with the embedding and output types of the recipe that the row is named after."""

    base: str = BASE


@dataclass(frozen=True, slots=True)
class StepRow:
    """A recipe with another type, `word`, for a kind of group; none of both: as it is. Bytes are those of the
    16B shape, `windows` as of a `FidelityRow`; `digest` is the recipe's own.
    """

    type: str
    imatrix: bool
    digest: str
    kind: str
    word: str
    n_bytes: int
    n_bytes_per_token: float
    windows: Sequence[float]


@dataclass(frozen=True, slots=True)
class TargetRow:
    """A size that was asked for, and that of the file made for it."""

    budget: int
    file_size: int


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """A recipe that might take the place of q8; `about` says what it is. `large_ratio` is its size to Q8_0's
    on the 16B shape, `predicted_ratio` its predicted error to that one's, by the built-in costs. `windows`
    are as of a `FidelityRow`.
    """

    type: str
    imatrix: bool
    digest: str
    about: str
    large_ratio: float
    predicted_ratio: float
    file_size: int
    windows: Sequence[float]


@dataclass(frozen=True, slots=True)
class PointRow:
    """A recipe without a name of ours, `about` says which. Bytes are those of the 16B shape, `windows` as of
    a `FidelityRow`, ratios as of a `SpeedRow`.
    """

    type: str
    imatrix: bool
    digest: str
    about: str
    n_bytes: int
    n_bytes_per_token: float
    windows: Sequence[float]
    prompt_ratio: Sequence[float]
    decode_ratio: Sequence[float]


Row: TypeAlias = SizeRow | SpeedRow | FidelityRow | StepRow | PointRow

_ROWS: Mapping[str, type[Row]] = {
    "reference": FidelityRow,
    "steps": StepRow,
    "demo": FidelityRow,
    "sizes": SizeRow,
    "speed": SpeedRow,
    "points": PointRow,
}


@dataclass(frozen=True, slots=True)
class Part:
    """One part's rows. `settings` decide them, beside the types. Of the reference alone: `frontier` and
    `targets`, what the solver made of budgets; `alike`, what recipes are held against, with the recipe's
    types for embedding and output; `eight`, what else 8 bits could be.

    `measured` and `commit` are those of the last run, `oldest` of the first one that some rows are from, if
    that is another.
    """

    name: str
    measured: str
    commit: str
    settings: Mapping[str, Any]
    rows: Sequence[Any]
    frontier: Sequence[FidelityRow] = ()
    targets: Sequence[TargetRow] = ()
    alike: Sequence[AlikeRow] = ()
    eight: Sequence[CandidateRow] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    oldest: str = ""

    @property
    def stamp(self) -> str:
        """When its oldest rows were measured, and with which commit."""
        return self.oldest or f"{self.measured}, commit {self.commit or 'unknown'}"

    def row(self, variant: Variant) -> Any:  # noqa: ANN401 - of the part's kind
        """The row of a type; KeyError if there is none."""
        for row in self.rows:
            if (row.type, row.imatrix) == (variant.word, variant.imatrix):
                return row
        raise KeyError(str(variant))

    def alike_row(self, variant: Variant, base: str) -> AlikeRow | None:
        """What a recipe is held against, with its types for embedding and output, if that was measured."""
        wanted = variant.word, variant.imatrix, base
        return next((row for row in self.alike if (row.type, row.imatrix, row.base) == wanted), None)

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return asdict(self)


def is_current(row: Row) -> bool:
    """Whether the row's type, by a name of ours or of llama.cpp's, is still the one that was measured."""
    try:
        return Variant(row.type, row.imatrix).digest == row.digest
    except UsageError:  # there is no such type any more
        return False


def part_of(name: str, settings: Mapping[str, Any], rows: Sequence[Row], **more: Any) -> Part:  # noqa: ANN401
    """A part that was measured just now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Part(name, now, _commit(), settings, rows, **more)


def _commit() -> str:
    """The checkout's, where there is one; it tells of changes that are in no commit."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],  # noqa: S607
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def parse_part(content: Mapping[str, Any]) -> Part:
    """What `as_json` has made. KeyError, TypeError if it is something else."""
    kind = _ROWS[content["name"]]
    rows = [kind(**row) for row in content["rows"]]
    frontier = tuple(FidelityRow(**row) for row in content["frontier"])
    alike = tuple(AlikeRow(**row) for row in content["alike"])
    targets = tuple(TargetRow(**row) for row in content["targets"])
    eight = tuple(CandidateRow(**row) for row in content["eight"])
    tuples = {"frontier": frontier, "targets": targets, "alike": alike, "eight": eight}
    return Part(**{**content, "rows": rows, **tuples})


def folder_of(*, quick: bool = False) -> Path:
    """Where parts are kept; those of a quick run apart."""
    return cache_folder() / "benchmarks" / ("quality-quick" if quick else "quality")


def save_part(part: Part, folder: Path) -> None:
    """Keep it, in place of what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{part.name}.json", (json.dumps(part.as_json(), indent=1) + "\n").encode())


def load_part(name: str, folder: Path) -> Part | None:
    """What was kept, whatever its age; None if there is nothing, or nothing that can be read."""
    try:
        return parse_part(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
