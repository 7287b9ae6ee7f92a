"""The figures of benchmarks/quality.py as plain data, the JSON files that they are kept in (one for each
part), and which of them may be shown beside each other.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.support.quality_recipes import (
    ALIKE,
    BASE,
    EIGHT,
    POINTS,
    STEPPED,
    Variant,
    digest_of,
    timed_variants,
    variants,
)
from benchmarks.support.runner import say
from dsmoe_local.base.durable import write_file
from dsmoe_local.base.paths import cache_folder
from dsmoe_quantize.write import kernels

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("reference", "steps", "demo", "sizes", "speed", "points")


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of a type. `digest` is that of the types that it stood for when it was measured."""

    type: str
    imatrix: bool
    digest: str

    @property
    def variant(self) -> Variant:
        """The type, with an importance matrix or without."""
        return Variant(self.type, self.imatrix)


@dataclass(frozen=True, slots=True)
class SizeRow(Row):
    """Bytes of the weights of the 16B shape."""

    n_bytes: int
    bits_per_weight: float
    n_bytes_per_token: float


@dataclass(frozen=True, slots=True)
class SpeedRow(Row):
    """Tokens per second on the shape with few layers, their ratio to the base's, round by round, and the
    bytes that decoding one token reads there.
    """

    n_bytes_per_token: float
    prompt: Sequence[float]
    decode: Sequence[float]
    prompt_ratio: Sequence[float]
    decode_ratio: Sequence[float]


@dataclass(frozen=True, slots=True)
class FidelityRow(Row):
    """A file beside its unquantized model. KL divergences in nats per token; `windows` has the mean of each
    window. `same_experts` and `overlap` are means over the layers.
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


@dataclass(frozen=True, slots=True)
class AlikeRow(FidelityRow):
    """`base` with the embedding and output types of the recipe that the row is named after."""

    base: str = BASE


@dataclass(frozen=True, slots=True)
class StepRow(Row):
    """A recipe with the type `word` for one kind of group; both are empty for the recipe itself. Bytes are
    those of the 16B shape, `windows` as in `FidelityRow`.
    """

    kind: str
    word: str
    n_bytes: int
    n_bytes_per_token: float
    windows: Sequence[float]


@dataclass(frozen=True, slots=True)
class CandidateRow(Row):
    """A candidate for q8. `large_ratio` is its size to Q8_0's on the 16B shape, `predicted_ratio` its
    predicted error to Q8_0's, by the built-in costs; `windows` as in `FidelityRow`.
    """

    about: str
    large_ratio: float
    predicted_ratio: float
    file_size: int
    windows: Sequence[float]


@dataclass(frozen=True, slots=True)
class PointRow(Row):
    """Another choice beside our recipes. Bytes are those of the 16B shape, `windows` as in `FidelityRow`,
    ratios as in `SpeedRow`.
    """

    about: str
    n_bytes: int
    n_bytes_per_token: float
    windows: Sequence[float]
    prompt_ratio: Sequence[float]
    decode_ratio: Sequence[float]


@dataclass(frozen=True, slots=True)
class TargetRow:
    """A size that was asked for, and that of the file made for it."""

    budget: int
    file_size: int


@dataclass(frozen=True, slots=True)
class Part:
    """One part's rows. `settings` decide them, beside the types. Only the reference has `frontier` and
    `targets`, what the solver made of budgets; `alike`, what recipes are compared with; `eight`, the
    candidates for q8. `oldest` tells when the oldest rows were measured, where that was an earlier run.
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

    def row(self, variant: Variant) -> Any:  # noqa: ANN401 - of the part's kind
        """The row of a type; KeyError if there is none."""
        for row in self.rows:
            if row.variant == variant:
                return row
        raise KeyError(str(variant))

    def alike_row(self, variant: Variant, base: str) -> AlikeRow | None:
        """What a recipe is compared with, if that was measured."""
        return next((row for row in self.alike if (row.variant, row.base) == (variant, base)), None)


_ROWS: Mapping[str, type[Row]] = {
    "reference": FidelityRow,
    "steps": StepRow,
    "demo": FidelityRow,
    "sizes": SizeRow,
    "speed": SpeedRow,
    "points": PointRow,
}
_MORE = {"frontier": FidelityRow, "targets": TargetRow, "alike": AlikeRow, "eight": CandidateRow}


def part_of(name: str, settings: Mapping[str, Any], rows: Sequence[Row], **more: Any) -> Part:  # noqa: ANN401
    """A part that was measured just now."""
    return Part(name, now(), commit(), settings, tuple(rows), **more)


def now() -> str:
    """The time, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str:
    """The checkout's, if there is one; "-dirty" where it has changes that are in no commit."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def parse_part(content: Mapping[str, Any]) -> Part:
    """What `asdict` has made of a part. KeyError, TypeError if it is something else."""
    kinds = {"rows": _ROWS[content["name"]], **_MORE}
    rows = {name: tuple(kind(**row) for row in content[name]) for name, kind in kinds.items()}
    return Part(**{**content, **rows})


def folder_of(*, quick: bool = False) -> Path:
    """Where parts are kept; those of a quick run apart."""
    return cache_folder() / "benchmarks" / ("quality-quick" if quick else "quality")


def save_part(part: Part, folder: Path) -> None:
    """Keep it, in place of what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{part.name}.json", (json.dumps(asdict(part), indent=1) + "\n").encode())


def load_part(name: str, folder: Path) -> Part | None:
    """What was kept, whatever its age; None if there is nothing, or nothing that can be read."""
    try:
        return parse_part(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


_SHARED: Mapping[str, Mapping[str, Sequence[str]]] = {
    "steps": {"reference": ("model", "n_context", "n_windows", "cache", "predictions")},
    "points": {
        "reference": ("model", "text_digest", "n_context", "n_windows", "cache", "predictions"),
        "speed": ("shape", "layers", "n_prompt", "n_gen", "turns", "threads"),
    },
}
"""By part: the settings that it must have in common with others, whose figures stand beside its own."""


def kept_parts(folder: Path) -> dict[str, Part]:
    """Those that are kept, complete and up to date; says what is not."""
    found: dict[str, Part] = {}
    for name in PARTS:
        part = load_part(name, folder)
        if part is None:
            say(f"{name}: not measured yet")
        elif why := refusal(part, found):
            say(f"{name}: refused, {why}. Run --parts {name}")
        else:
            found[name] = part
    return found


def refusal(part: Part, others: Mapping[str, Part]) -> str:
    """Why a part may not be shown beside the others; empty if it may."""
    if changed := stale(part):
        return f"since these types have changed: {', '.join(changed)}"
    if lacking := missing(part):
        return f"since it is incomplete, without {', '.join(lacking)}"
    current = kernels.version()
    if part.name != "sizes" and part.settings.get("kernels") != current:
        return f"since it is of llama-cpp-python {part.settings.get('kernels')}, and this is {current}"
    for name, keys in _SHARED.get(part.name, {}).items():
        other = others.get(name)
        if other is not None and (differ := _differences(part, other, keys)):
            return f"since it is not of what {name} is of: {', '.join(differ)} differ"
    reference = others.get("reference")
    if part.name == "steps" and reference is not None and not _differences(part, reference, ("text_digest",)):
        return "since recipes would be chosen on the text of their bars"
    return ""


def _differences(part: Part, other: Part, keys: Sequence[str]) -> list[str]:
    return [key for key in keys if part.settings.get(key) != other.settings.get(key)]


def stale(part: Part) -> list[str]:
    """Types that are no longer what they were when they were measured, or no longer exist."""
    wanted = dict(_wanted(part.name))
    return [name for name, digest in _measured(part) if wanted.get(name) != digest]


def missing(part: Part) -> list[str]:
    """What a complete part has, and this one lacks."""
    measured = dict(_measured(part))
    return [name for name, _ in _wanted(part.name) if name not in measured]


def _measured(part: Part) -> Iterator[tuple[str, str]]:
    """Names and digests of what a part has; of what has no types of its own, the digest is empty."""
    for row in (*part.rows, *part.eight):
        yield str(row.variant), row.digest
    for name in ("frontier", "targets"):
        if getattr(part, name):
            yield name, ""
    for row in part.alike:
        yield _alike_name(row.variant, row.base), ""


def _wanted(name: str) -> Iterator[tuple[str, str]]:
    """The same of a complete and current part."""
    without = {"speed": list(timed_variants()), "steps": [Variant(word, False) for word in (BASE, *STEPPED)]}
    if name == "points":
        yield from ((recipe.name, digest_of(recipe, imatrix=False)) for recipe in POINTS)
        return
    for variant in without.get(name, variants()):
        yield str(variant), variant.digest
    if name == "reference":
        yield from (("frontier", ""), ("targets", ""))
        for imatrix in (False, True):
            for recipe in EIGHT:
                yield str(Variant(recipe.name, imatrix)), digest_of(recipe, imatrix=imatrix)
            for word, base in ALIKE:
                yield _alike_name(Variant(word, imatrix), base), ""


def _alike_name(variant: Variant, base: str) -> str:
    return f"{base} with the embedding and output of {variant}"
