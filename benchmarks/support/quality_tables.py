"""The tables of benchmarks/quality.py, in markdown, from its figures alone: docs hold what is printed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.support.quality_bars import (
    DECODE,
    PROMPT,
    median_ratio,
    ratio_of,
    speed_of,
    targets_hold,
    verdicts,
)
from benchmarks.support.quality_rows import FidelityRow, Part
from benchmarks.support.quality_types import BASE, OURS, Variant

_WORDS = {False: "without", True: "with"}


def all_tables(parts: Mapping[str, Part]) -> dict[str, str]:
    """Every table that there are figures for, by the name that docs mark its place with."""
    makers: Mapping[str, tuple[str, Callable[[Part], str]]] = {
        "reference": ("reference", fidelity_table),
        "demo": ("demo", fidelity_table),
        "frontier": ("reference", frontier_table),
        "targets": ("reference", targets_table),
        "sizes": ("sizes", sizes_table),
        "speed": ("speed", speed_table),
    }
    tables = {name: make(parts[part]) for name, (part, make) in makers.items() if part in parts}
    return {"bars": bars_table(parts), **tables}


def bars_table(parts: Mapping[str, Part]) -> str:
    """Each bar, the ratio, and whether it holds."""
    rows = []
    for verdict in verdicts(parts):
        low_high = "" if verdict.interval is None else "{:.3f} – {:.3f}".format(*verdict.interval)
        word = "met" if verdict.holds else "**MISSED**"
        rows.append(
            [
                f"`{verdict.recipe}`",
                _WORDS[verdict.imatrix],
                verdict.measure,
                verdict.against,
                f"{verdict.ratio:.3f}",
                low_high,
                str(verdict.bar),
                "the same types" if verdict.is_alias else word,
            ]
        )
    return markdown(("recipe", "imatrix", "what", "against", "ratio", "95%", "bar", ""), "llllrlll", rows)


def fidelity_table(part: Part) -> str:
    """Each type beside the unquantized model."""
    bases = {imatrix: _row(part.rows, BASE, imatrix) for imatrix in (False, True)}
    return markdown(_FIDELITY, "llrrrrrrrrrr", [_fidelity(row, bases[row.imatrix]) for row in part.rows])


_FIDELITY = (
    "type", "imatrix", "size, MB", "bits", "MB per token", "perplexity", "KL, 1e-3", "99%, 1e-3",
    "against Q4_K_M", "same top", "same experts", "overlap",
)  # fmt: skip


def _row(rows: Iterable[FidelityRow], word: str, imatrix: bool) -> FidelityRow | None:
    return next((row for row in rows if (row.type, row.imatrix) == (word, imatrix)), None)


def _fidelity(row: FidelityRow, base: FidelityRow | None) -> list[str]:
    return [
        named(row.type),
        _WORDS[row.imatrix],
        f"{row.file_size / 1e6:.2f}",
        f"{row.bits_per_weight:.2f}",
        f"{row.n_bytes_per_token / 1e6:.2f}",
        f"{row.perplexity:.3f}",
        f"{1e3 * row.kl:.3f} ± {1e3 * row.kl_error:.3f}",
        f"{1e3 * row.kl_99:.1f}",
        "" if base is None else f"{ratio_of(row.windows, base.windows)[0]:.3f} x",
        f"{row.same_top:.2%}",
        f"{row.same_experts:.2%}",
        f"{row.overlap:.2%}",
    ]


def named(word: str) -> str:
    """A recipe stands out."""
    return f"**`{word}`**" if word in OURS else f"`{word}`"


def frontier_table(part: Part) -> str:
    """What the solver makes of budgets."""
    bases = {imatrix: _row(part.rows, BASE, imatrix) for imatrix in (False, True)}
    rows = []
    for row in part.frontier:
        base = bases[row.imatrix]
        rows.append(
            [
                row.type.removesuffix(" bpw"),
                _WORDS[row.imatrix],
                f"{row.bits_per_weight:.3f}",
                f"{row.n_bytes_per_token / 1e6:.2f}",
                f"{1e3 * row.kl:.3f} ± {1e3 * row.kl_error:.3f}",
                "" if base is None else f"{ratio_of(row.windows, base.windows)[0]:.3f} x",
            ]
        )
    heads = ("`--target-bpw`", "imatrix", "bits", "MB per token", "KL, 1e-3", "against Q4_K_M")
    return markdown(heads, "rlrrrr", rows)


def targets_table(part: Part) -> str:
    """Sizes asked for, and what came of them."""
    rows = [
        [f"{row.budget:,}", f"{row.file_size:,}", f"{share:.2%}", "met" if holds else "**MISSED**"]
        for row, (share, holds) in zip(part.targets, targets_hold(part), strict=True)
    ]
    return markdown(("`--target-size`, bytes", "file", "used", "99 to 100%"), "rrrl", rows)


def sizes_table(part: Part) -> str:
    """The 16B shape. Mixes that choose other types with an importance matrix have a line for that."""
    base = part.row(Variant(BASE, False))
    rows = []
    for row in part.rows:
        if row.imatrix and row.digest == part.row(Variant(row.type, False)).digest:
            continue
        rows.append(
            [
                named(row.type) + (", imatrix" if row.imatrix else ""),
                f"{row.n_bytes / 1e9:.3f}",
                f"{row.bits_per_weight:.2f}",
                f"{row.n_bytes / base.n_bytes:.3f} x",
                f"{row.n_bytes_per_token / 1e9:.3f}",
                f"{row.n_bytes_per_token / base.n_bytes_per_token:.3f} x",
            ]
        )
    heads = ("type", "size, GB", "bits", "against Q4_K_M", "GB per token", "against Q4_K_M")
    return markdown(heads, "lrrrrr", rows)


def speed_table(part: Part) -> str:
    """Medians of the rounds, and of the rounds' ratios."""
    base = speed_of(part, Variant(BASE, False))
    rows = []
    for row in part.rows:
        cells = [named(row.type)]
        for measure in (PROMPT, DECODE):
            rates = getattr(row, measure)
            cells.append(f"{statistics.median(rates):.1f}")
            if base is None:
                cells.append("")
            else:
                pairs = list(zip(rates, getattr(base, measure), strict=True))
                ratios = [ours / theirs for ours, theirs in pairs]
                cells.append(f"{median_ratio(pairs):.3f} x ({min(ratios):.3f} – {max(ratios):.3f})")
        rows.append(cells)
    heads = ("type", "prompt, tokens/s", "against Q4_K_M", "decode, tokens/s", "against Q4_K_M")
    return markdown(heads, "lrrrr", rows)


def markdown(heads: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> str:
    """A table; of `sides`, l is left, r right, m in the middle."""
    marks = {"l": "---", "r": "---:", "m": ":---:"}
    lines = [heads, [marks[side] for side in sides], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A document with the tables between their marks: `<!-- table: NAME -->` and `<!-- end -->`. ValueError
    if a mark is missing.
    """
    for name, table in tables.items():
        begin, end = f"<!-- table: {name} -->\n", "\n<!-- end -->"
        start = text.find(begin)
        stop = text.find(end, start)
        if start < 0 or stop < 0:
            raise ValueError(f"the document has no place for the table {name}")
        text = text[: start + len(begin)] + table + text[stop:]
    return text
