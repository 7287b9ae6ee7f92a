"""Which kept parts of benchmarks/quality.py may be told of, and how one that is measured anew joins what was
kept. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.support.quality_bars import ALIKE, speed_of
from benchmarks.support.quality_eight import EIGHT
from benchmarks.support.quality_points import POINTS
from benchmarks.support.quality_rows import (
    PARTS,
    CandidateRow,
    FidelityRow,
    Part,
    PointRow,
    is_current,
    load_part,
)
from benchmarks.support.quality_speed import timed_variants
from benchmarks.support.quality_steps import STEPPED
from benchmarks.support.quality_types import BASE, Variant, digest_of, variants
from benchmarks.support.runner import say
from dsmoe_quantize import kernels
from dsmoe_quantize.named_recipes import NamedRecipe

_EXTRAS = ("frontier", "targets", "alike", "eight")
"""What the reference has beside its rows."""
_SHARED: Mapping[str, Mapping[str, Sequence[str]]] = {
    "steps": {"reference": ("model", "n_context", "n_windows", "cache", "predictions")},
    "points": {
        "reference": ("model", "text_digest", "n_context", "n_windows", "cache", "predictions"),
        "speed": ("shape", "layers", "n_prompt", "n_gen", "turns", "threads"),
    },
}
"""By part: the settings that it must have in common with others, whose figures stand beside its own."""


def kept_parts(folder: Path) -> dict[str, Part]:
    """Those that are kept, complete, and still true; says what is not."""
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
    """Why a part may not be told of beside the others; nothing if it may."""
    if changed := changes(part):
        return f"since these types have changed: {', '.join(changed)}"
    if missing := gaps(part):
        return f"since it is incomplete, without {', '.join(missing)}"
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


def changes(part: Part) -> list[str]:
    """Types that are not what they were when they were measured, or are no more."""
    if part.name == "points":
        return _changed(part.rows, POINTS)
    stale = [str(Variant(row.type, row.imatrix)) for row in part.rows if not is_current(row)]
    return [*stale, *_changed(part.eight, EIGHT)]


def _changed(rows: Sequence[CandidateRow | PointRow], recipes: Sequence[NamedRecipe]) -> list[str]:
    """Of rows of recipes without a name of ours."""
    known = {recipe.name: recipe for recipe in recipes}
    return [
        str(Variant(row.type, row.imatrix))
        for row in rows
        if row.type not in known or digest_of(known[row.type], imatrix=row.imatrix) != row.digest
    ]


def gaps(part: Part) -> list[str]:
    """What a complete part has, and this one has not."""
    if part.name == "speed":
        return [str(variant) for variant in timed_variants() if speed_of(part, variant) is None]
    if part.name == "steps":
        found = {row.type for row in part.rows if not row.kind}
        return [word for word in (BASE, *STEPPED) if word not in found]
    if part.name == "points":
        found = {row.type for row in part.rows}
        return [recipe.name for recipe in POINTS if recipe.name not in found]
    rows = {(row.type, row.imatrix) for row in part.rows}
    missing = [str(each) for each in variants() if (each.word, each.imatrix) not in rows]
    if part.name == "reference":
        missing += [name for name in _EXTRAS if not getattr(part, name)]
        missing += [
            f"{base} with the embedding and output of {Variant(word, imatrix)}"
            for imatrix in (False, True)
            for word, base in ALIKE
            if part.alike and part.alike_row(Variant(word, imatrix), base) is None
        ]
    return missing


def comparable(part: Part | None, settings: Mapping[str, object]) -> Part | None:
    """A kept part if it is of the same model, text and kernels, else None."""
    return part if part is not None and dict(part.settings) == dict(settings) else None


def joined(part: Part, known: Part | None) -> Part:
    """A part that is being measured, and what a comparable one has beyond it: a run that ends here loses
    nothing that was measured, and is still true.
    """
    if known is None:
        return part
    here = {(row.type, row.imatrix) for row in part.rows}
    left = [row for row in known.rows if (row.type, row.imatrix) not in here and is_current(row)]
    rows = [*part.rows, *left]
    part = replace(part, rows=rows, oldest=oldest_of(rows, known))
    if changes(known):
        return part
    extras = {name: getattr(known, name) for name in _EXTRAS}
    facts = {**part.facts, "costs": known.facts["costs"]} if "costs" in known.facts else part.facts
    return replace(part, **extras, facts=facts)


def oldest_of(rows: Sequence[FidelityRow], known: Part | None) -> str:
    """When the oldest rows were measured, if some are those of a kept part; else nothing."""
    return known.stamp if known is not None and any(row in known.rows for row in rows) else ""
