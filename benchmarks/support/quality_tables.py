"""The tables of benchmarks/quality.py, in markdown, from its figures alone: docs hold what is printed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.support.quality_bars import (
    BYTES,
    COMPARED,
    DECODE,
    KL,
    PROMPT,
    SIZE,
    Verdict,
    control_of,
    ratio_of,
    targets_hold,
    verdicts,
)
from benchmarks.support.quality_figures import AlikeRow, FidelityRow, Part, StepRow
from benchmarks.support.quality_recipes import BASE, EIGHT_BASE, OURS, POINTS_BASE, Variant
from benchmarks.support.runner import is_difference
from benchmarks.support.tables import Column, markdown, markdown_of

_WORDS = {False: "without", True: "with"}
_POINT_PARTS = ("sizes", "reference", "speed")
"""What the table of points takes our recipes' figures from."""
_HOLDS = {True: "met", False: "**MISSED**", None: "the same types"}
_NO_DIFFERENCE = "no difference"


def all_tables(parts: Mapping[str, Part]) -> dict[str, str]:
    """Every table that there are figures for, by the name that docs mark its place with."""
    makers: Mapping[str, tuple[str, Callable[[Part], str]]] = {
        "reference": ("reference", fidelity_table),
        "demo": ("demo", fidelity_table),
        "frontier": ("reference", frontier_table),
        "targets": ("reference", targets_table),
        "alike": ("reference", alike_table),
        "q8": ("reference", eight_table),
        "steps": ("steps", steps_table),
        "sizes": ("sizes", sizes_table),
        "speed": ("speed", speed_table),
    }
    tables = {name: make(parts[part]) for name, (part, make) in makers.items() if part in parts}
    if {"points", *_POINT_PARTS} <= parts.keys():
        tables["points"] = points_table(parts)
    return {"settings": settings_table(parts), "bars": bars_table(parts), **tables}


def summary_table(parts: Mapping[str, Part]) -> str:
    """Our recipes beside the base, without an importance matrix: a line each."""
    told = {(each.recipe, each.measure): each for each in verdicts(parts) if not each.imatrix}
    rows = []
    for word in COMPARED:
        found = [told[word, measure] for measure in (SIZE, BYTES, PROMPT, DECODE)]
        cells = [f"{each.ratio:.2f} x" if each.is_difference else _NO_DIFFERENCE for each in found]
        cells.append(f"{_alike_ratio(parts['reference'], word):.2f} x")
        rows.append([named(word), *cells])
    heads = ("against Q4_K_M", "size", "bytes per token", "prompt speed", "decode speed", KL)
    return markdown(heads, "lrrrrr", rows)


def _alike_ratio(part: Part, word: str, windows: Sequence[float] = ()) -> float:
    """The ratio of a recipe's divergence, or of `windows`, to the base's with the recipe's embedding and
    output, without an importance matrix.
    """
    variant = Variant(word, False)
    alike = part.alike_row(variant, BASE)
    assert alike is not None
    return ratio_of(windows or part.row(variant).windows, alike.windows)[0]


def named(word: str) -> str:
    """A recipe stands out."""
    return f"**`{word}`**" if word in OURS else f"`{word}`"


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.3f} x"


def _divergences(ours: Sequence[float], theirs: Sequence[float]) -> str:
    return f"{ratio_of(ours, theirs)[0]:.3f} x"


def _interval(ours: Sequence[float], theirs: Sequence[float]) -> str:
    low, high = ratio_of(ours, theirs)[1]
    return f"{low:.3f} – {high:.3f}"


_TYPE: Column = ("type", "l", lambda row: named(row.type))
_IMATRIX: Column = ("imatrix", "l", lambda row: _WORDS[row.imatrix])
_MB_PER_TOKEN: Column = ("MB per token", "r", lambda row: f"{row.n_bytes_per_token / 1e6:.2f}")
_KL: Column = ("KL, 1e-3", "r", lambda row: f"{1e3 * row.kl:.3f} ± {1e3 * row.kl_error:.3f}")


def _against_base(part: Part) -> Column:
    """The ratio to the base's divergence, both with an importance matrix or both without."""
    bases = {imatrix: part.row(Variant(BASE, imatrix)) for imatrix in (False, True)}
    return f"against {BASE}", "r", lambda row: _divergences(row.windows, bases[row.imatrix].windows)


def bars_table(parts: Mapping[str, Part]) -> str:
    """Each bar, the ratio, and whether it holds."""
    columns: Sequence[Column] = (
        ("recipe", "l", lambda each: f"`{each.recipe}`"),
        _IMATRIX,
        ("what", "l", lambda each: each.measure),
        ("against", "l", lambda each: each.against),
        ("ratio", "r", lambda each: f"{each.ratio:.3f}"),
        ("interval", "l", lambda each: "{:.3f} – {:.3f}".format(*each.interval) if each.interval else ""),
        ("bar", "l", lambda each: str(each.bar)),
        ("", "l", _judged),
    )
    return markdown_of(columns, verdicts(parts))


def _judged(verdict: Verdict) -> str:
    words = [_HOLDS[verdict.holds]]
    if verdict.is_uncertain:
        words.append("uncertain")
    if verdict.control > 1 and not verdict.is_difference:
        words.append(_NO_DIFFERENCE)
    return ", ".join(words)


def fidelity_table(part: Part) -> str:
    """Each type beside the unquantized model."""
    columns: Sequence[Column] = (
        _TYPE,
        _IMATRIX,
        ("size, MB", "r", lambda row: f"{row.file_size / 1e6:.2f}"),
        ("bits", "r", lambda row: f"{row.bits_per_weight:.2f}"),
        _MB_PER_TOKEN,
        ("perplexity", "r", lambda row: f"{row.perplexity:.3f}"),
        _KL,
        ("99%, 1e-3", "r", lambda row: f"{1e3 * row.kl_99:.1f}"),
        _against_base(part),
        ("same top", "r", lambda row: f"{row.same_top:.2%}"),
        ("same experts", "r", lambda row: f"{row.same_experts:.2%}"),
        ("overlap", "r", lambda row: f"{row.overlap:.2%}"),
    )
    return markdown_of(columns, part.rows)


def frontier_table(part: Part) -> str:
    """What the solver makes of budgets."""
    columns: Sequence[Column] = (
        ("`--target-bpw`", "r", lambda row: row.type.removesuffix(" bpw")),
        _IMATRIX,
        ("bits", "r", lambda row: f"{row.bits_per_weight:.3f}"),
        _MB_PER_TOKEN,
        _KL,
        _against_base(part),
    )
    return markdown_of(columns, part.frontier)


def targets_table(part: Part) -> str:
    """Sizes asked for, and what came of them."""
    rows = [
        [f"{row.budget:,}", f"{row.file_size:,}", f"{share:.2%}", _HOLDS[holds]]
        for row, (share, holds) in zip(part.targets, targets_hold(part), strict=True)
    ]
    return markdown(("`--target-size`, bytes", "file", "used", "99 to 100%"), "rrrl", rows)


def alike_table(part: Part) -> str:
    """Recipes against others with their own embedding and output types."""

    def ours(base: AlikeRow) -> FidelityRow:
        row: FidelityRow = part.row(base.variant)
        return row

    columns: Sequence[Column] = (
        ("recipe", "l", lambda base: named(base.type)),
        _IMATRIX,
        ("against", "l", lambda base: f"`{base.base}`"),
        ("size", "r", lambda base: _ratio(ours(base).file_size, base.file_size)),
        ("KL, 1e-3", "r", lambda base: f"{1e3 * ours(base).kl:.3f}"),
        ("its KL, 1e-3", "r", lambda base: f"{1e3 * base.kl:.3f}"),
        ("ratio", "r", lambda base: _divergences(ours(base).windows, base.windows)),
        ("95%", "l", lambda base: _interval(ours(base).windows, base.windows)),
    )
    return markdown_of(columns, part.alike)


def eight_table(part: Part) -> str:
    """What else 8 bits could be, beside Q8_0."""
    bases = {imatrix: part.row(Variant(EIGHT_BASE, imatrix)) for imatrix in (False, True)}
    columns: Sequence[Column] = (
        ("Q8_0, but", "l", lambda row: row.about),
        _IMATRIX,
        ("size of 16B", "r", lambda row: f"{row.large_ratio:.3f} x"),
        ("size here", "r", lambda row: _ratio(row.file_size, bases[row.imatrix].file_size)),
        ("KL, 1e-3", "r", lambda row: f"{1e3 * statistics.mean(row.windows):.4f}"),
        ("KL of Q8_0, 1e-3", "r", lambda row: f"{1e3 * bases[row.imatrix].kl:.4f}"),
        ("ratio", "r", lambda row: _divergences(row.windows, bases[row.imatrix].windows)),
        ("95%", "l", lambda row: _interval(row.windows, bases[row.imatrix].windows)),
        ("predicted from built-in costs", "r", lambda row: f"{row.predicted_ratio:.2f} x"),
    )
    return markdown_of(columns, part.eight)


def points_table(parts: Mapping[str, Part]) -> str:
    """Our recipes and other choices, in ratios to the base, without an importance matrix."""
    large, reference = parts["sizes"].row(Variant(BASE, False)), parts["reference"]
    controls = [control_of(parts["speed"], measure) for measure in (PROMPT, DECODE)]
    rows = []
    ours = [
        (named(word), *(parts[part].row(Variant(word, False)) for part in _POINT_PARTS), word)
        for word in COMPARED
    ]
    others = [(row.about, row, row, row, POINTS_BASE) for row in parts["points"].rows]
    for what, sizes, fidelity, speed, start in (*ours, *others):
        ratios = (
            sizes.n_bytes / large.n_bytes,
            sizes.n_bytes_per_token / large.n_bytes_per_token,
            _alike_ratio(reference, start, fidelity.windows),
        )
        speeds = map(spread, (speed.prompt_ratio, speed.decode_ratio), controls)
        rows.append([what, *(f"{ratio:.3f} x" for ratio in ratios), *speeds])
    return markdown(("", "size", "bytes per token", KL, "prompt", "decode"), "lrrrrr", rows)


def spread(ratios: Sequence[float], control: float) -> str:
    """The median of the rounds, the least and the greatest; whether the control is off by as much."""
    middle = statistics.median(ratios)
    told = f"{middle:.3f} x"
    if len(ratios) > 1:
        told += f" ({min(ratios):.3f} – {max(ratios):.3f})"
    return told if is_difference(middle, control) else f"{told}, {_NO_DIFFERENCE}"


def steps_table(part: Part) -> str:
    """Recipes, and each step away from them, in ratios to the base."""
    base, *others = part.rows

    def what(row: StepRow) -> str:
        return f"{row.kind} in `{row.word}`" if row.kind else f"{named(row.type)} as it is"

    columns: Sequence[Column] = (
        ("", "l", what),
        ("size", "r", lambda row: _ratio(row.n_bytes, base.n_bytes)),
        ("bytes per token", "r", lambda row: _ratio(row.n_bytes_per_token, base.n_bytes_per_token)),
        ("KL", "r", lambda row: _divergences(row.windows, base.windows)),
    )
    return markdown_of(columns, others)


def sizes_table(part: Part) -> str:
    """The 16B shape. Mixes that choose other types with an importance matrix have a line for that."""
    base = part.row(Variant(BASE, False))
    columns: Sequence[Column] = (
        ("type", "l", lambda row: named(row.type) + (", imatrix" if row.imatrix else "")),
        ("size, GB", "r", lambda row: f"{row.n_bytes / 1e9:.3f}"),
        ("bits", "r", lambda row: f"{row.bits_per_weight:.2f}"),
        (f"against {BASE}", "r", lambda row: _ratio(row.n_bytes, base.n_bytes)),
        ("GB per token", "r", lambda row: f"{row.n_bytes_per_token / 1e9:.3f}"),
        (f"against {BASE}", "r", lambda row: _ratio(row.n_bytes_per_token, base.n_bytes_per_token)),
    )
    plain = {row.type: row.digest for row in part.rows if not row.imatrix}
    return markdown_of(
        columns, [row for row in part.rows if not row.imatrix or row.digest != plain[row.type]]
    )


def speed_table(part: Part) -> str:
    """Medians of the rounds; what decoding reads, in ratios, too."""
    base = part.row(Variant(BASE, False))
    prompt, decode = (control_of(part, measure) for measure in (PROMPT, DECODE))
    columns: Sequence[Column] = (
        ("type", "l", lambda row: named(row.type) + (", the control" if row.type == BASE else "")),
        ("prompt, tokens/s", "r", lambda row: f"{statistics.median(row.prompt):.1f}"),
        (f"against {BASE}", "r", lambda row: spread(row.prompt_ratio, prompt)),
        ("decode, tokens/s", "r", lambda row: f"{statistics.median(row.decode):.1f}"),
        (f"against {BASE}", "r", lambda row: spread(row.decode_ratio, decode)),
        (
            "bytes per token of this file",
            "r",
            lambda row: _ratio(row.n_bytes_per_token, base.n_bytes_per_token),
        ),
    )
    return markdown_of(columns, part.rows)


def settings_table(parts: Mapping[str, Part]) -> str:
    """Of each part that is there: when, with what, on what, and how much of it."""
    rows = [
        [name if number == 0 else "", *line]
        for name, part in parts.items()
        for number, line in enumerate(_lines(part))
    ]
    return markdown(("part", "", ""), "lll", rows)


def _lines(part: Part) -> Iterator[tuple[str, str]]:
    yield "measured", f"{part.measured}, commit {part.commit or 'unknown'}"
    if part.oldest:
        yield "the oldest rows", part.oldest
    if "training" in part.facts:
        yield from _training_lines(part)
    if "n_windows" in part.settings:
        yield from _fidelity_lines(part)
    if "costs" in part.facts:
        yield "costs of errors, for the solver", part.facts["costs"]
    if "layers" in part.settings:
        yield from _speed_lines(part)
    if "kernels" in part.settings:
        yield "llama-cpp-python", part.settings["kernels"]


def _training_lines(part: Part) -> Iterator[tuple[str, str]]:
    """As benchmarks/train_reference.py has written it."""
    found = part.facts["training"]
    amount = (
        f"{found['n_steps']:,} steps, {found['n_tokens'] / 1e6:.1f}M tokens, {found['n_epochs']:.1f} epochs"
    )
    yield "training", f"{found['minutes']:g} minutes, seed {found['seed']}: {amount}"
    yield "trained with", f"{found['products']} products, torch {found['torch']}, Python {found['python']}"
    yield "held-out loss", f"{found['held_out_loss']:.3f} nats per token"


def _fidelity_lines(part: Part) -> Iterator[tuple[str, str]]:
    settings, facts = part.settings, part.facts
    if "n_weights" in facts:
        yield "weights", f"{facts['n_weights'] / 1e6:.2f}M in {facts['n_layers']} layers"
    if "perplexity" in facts:
        yield "unquantized perplexity", f"{facts['perplexity']:.4f} ± {facts['perplexity_error']:.4f}"
    windows = f"{settings['n_windows']} windows of {settings['n_context']} tokens"
    yield "text", f"{settings['text']}: {windows}, {settings['n_scored']:,} tokens scored"
    if "n_calibration" in settings:
        yield "importance matrix", f"{settings['n_calibration']} windows of {settings['n_context']} tokens"
    yield "weights it is compared with, KV cache", f"F32, {settings['cache'].upper()}"


def _speed_lines(part: Part) -> Iterator[tuple[str, str]]:
    settings, facts = part.settings, part.facts
    yield "processor", f"{facts['cpu']}, {settings['threads']} threads, load before {facts['load_before']}"
    yield "shape", f"{settings['shape']}, {settings['layers']} layers"
    yield "prompt, reply", f"{settings['n_prompt']} tokens, {settings['n_gen']} tokens"
    yield "rounds", f"{settings['rounds']}, with {' and '.join(map(str, settings['turns']))} turns each"
