"""The figures of benchmarks/quality.py: plain data, and the JSON file in docs that holds them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from benchmarks.support.quality.variants import Variant

ROOT = Path(__file__).resolve().parents[3]
FIGURES = ROOT / "docs" / "quality.json"


class Row(msgspec.Struct, frozen=True):
    """Figures of a type. `digest` identifies the tensor types it stood for when it was measured."""

    type: str
    imatrix: bool
    digest: str

    @property
    def variant(self) -> Variant:
        """The type, with or without an importance matrix."""
        return Variant(self.type, self.imatrix)


class SizeRow(Row, frozen=True):
    """Bytes of the weights of the 16B shape."""

    n_bytes: int
    bits_per_weight: float
    n_bytes_per_token: float


class SpeedRow(Row, frozen=True):
    """Tokens per second on the shape with few layers, one figure for each round; their ratios to the base
    timed beside it; the bytes that decoding one token reads there. `kernels` is how it was loaded; the base
    beside it was loaded with "repack", as llama.cpp does.
    """

    n_bytes_per_token: float
    prompt: Sequence[float]
    decode: Sequence[float]
    prompt_ratio: Sequence[float]
    decode_ratio: Sequence[float]
    kernels: str = "repack"


class FidelityRow(Row, frozen=True):
    """A quantized file compared with its unquantized model. KL divergences are in nats per token; `windows`
    has the mean of each window. `same_experts` and `overlap` are means over the layers.
    """

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


class TargetRow(msgspec.Struct, frozen=True):
    """A size that was asked for, and the size of the file made for it, in bytes."""

    budget: int
    file_size: int


R = TypeVar("R", bound=Row)


def next_row(rows: Sequence[R], variant: Variant) -> R:
    """Return the first row of a type; KeyError if there is none."""
    for row in rows:
        if row.variant == variant:
            return row
    raise KeyError(str(variant))


class Part(msgspec.Struct, Generic[R], frozen=True, kw_only=True):
    """The rows of one run. `settings` determine them, together with the types; `facts` are for the reader."""

    measured: str
    commit: str
    settings: Mapping[str, Any]
    rows: Sequence[R]
    facts: Mapping[str, Any] = {}

    def row(self, variant: Variant) -> R:
        """Return the row of a type; KeyError if there is none."""
        return next_row(self.rows, variant)


class Reference(Part[FidelityRow], frozen=True, kw_only=True):
    """The trained reference. `frontier` and `targets` are what the solver makes of budgets. `alike` are types
    with embedding and output in Q8_0.
    """

    frontier: Sequence[FidelityRow]
    targets: Sequence[TargetRow]
    alike: Sequence[FidelityRow]

    def alike_row(self, variant: Variant) -> FidelityRow:
        """Return the row of a type with embedding and output in Q8_0; KeyError if there is none."""
        return next_row(self.alike, variant)


class Figures(msgspec.Struct, frozen=True):
    """All parts. `calibrated` is the trained reference rounded with GPTQ."""

    reference: Reference
    calibrated: Part[FidelityRow]
    latent: Part[FidelityRow]
    demo: Part[FidelityRow]
    sizes: Part[SizeRow]
    speed: Part[SpeedRow]


PARTS = Figures.__struct_fields__


def now_and_commit() -> dict[str, Any]:
    """Return what `Part` records about a run: the time, and the commit, "-dirty" if there are changes."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return {"measured": datetime.now(UTC).isoformat(timespec="seconds"), "commit": done.stdout.strip()}


def read_figures(path: Path = FIGURES) -> Figures:
    """Read the figures beside the document."""
    return msgspec.json.decode(path.read_bytes(), type=Figures)


def write_figures(figures: Figures, path: Path = FIGURES) -> None:
    """Write the figures beside the document."""
    path.write_bytes(msgspec.json.encode(figures) + b"\n")


def outdated(figures: Figures) -> Iterator[str]:
    """Yield why parts must not be shown beside each other: the types of a row have changed since, or the
    parts were measured with different kernels.
    """
    for name in PARTS:
        part = getattr(figures, name)
        for row in part.rows:
            if row.digest != row.variant.digest:
                yield f"{name}: {row.variant} has other types now"
        if name == "calibrated" and part.facts["training"] != figures.reference.facts["training"]:
            yield f"{name} and reference are different models"
        if "kernels" in part.settings and part.settings["kernels"] != figures.reference.settings["kernels"]:
            yield f"{name} and reference differ in kernels"
