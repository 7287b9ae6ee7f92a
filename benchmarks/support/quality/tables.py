"""The tables of benchmarks/quality.py in Markdown, made of its figures alone. docs has what is printed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.support.quality.bars import (
    AUTO,
    BYTES,
    DECODE,
    KL,
    PROMPT,
    SIZE,
    Verdict,
    control_of,
    ratio_of,
    targets_hold,
    verdict_on,
    verdicts,
)
from benchmarks.support.quality.figures import (
    PARTS,
    FidelityRow,
    Figures,
    Part,
    Reference,
    SizeRow,
    SpeedRow,
)
from benchmarks.support.quality.variants import BASE, COMPARED, OURS, Variant
from benchmarks.support.runner import Bar, is_difference
from benchmarks.support.tables import Column, markdown, markdown_of

_WORDS = {False: "without", True: "with"}
_HOLDS = {True: "met", False: "**MISSED**"}
_NO_DIFFERENCE = "no difference"


def all_tables(figures: Figures) -> dict[str, str]:
    """Return every table of the document, by the name that marks its place."""
    return {
        "settings": settings_table(figures),
        "bars": bars_table(figures),
        "reference": fidelity_table(figures.reference),
        "alike": alike_table(figures.reference),
        "calibrated": calibrated_table(figures),
        "frontier": frontier_table(figures.reference),
        "targets": targets_table(figures.reference),
        "sizes": sizes_table(figures.sizes),
        "speed": speed_table(figures.speed),
        "latent": fidelity_table(figures.latent),
        "demo": fidelity_table(figures.demo),
    }


def summary_table(figures: Figures) -> str:
    """Compare our recipes with the base, without an importance matrix."""
    rows = []
    for word in COMPARED:
        found = [
            verdict_on(figures, word, measure, BASE, Bar(0), imatrix=False)
            for measure in (SIZE, BYTES, PROMPT, DECODE)
        ]
        cells = [_NO_DIFFERENCE if each.is_none else f"{each.result:.2f} x" for each in found]
        base, ours = (figures.reference.alike_row(Variant(each, False)) for each in (BASE, word))
        cells.append(f"{ratio_of(ours.windows, base.windows)[0]:.2f} x")
        rows.append([named(word), *cells])
    heads = ("against Q4_K_M repacked", "size", "bytes per token", "prompt speed", "decode speed", KL)
    return markdown(heads, "lrrrrr", rows)


def named(word: str) -> str:
    """Return a type in Markdown, our recipes in bold."""
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
_BITS: Column = ("bits", "r", lambda row: f"{row.bits_per_weight:.2f}")
_PERPLEXITY: Column = ("perplexity", "r", lambda row: f"{row.perplexity:.3f}")
_SAME_TOP: Column = ("same top", "r", lambda row: f"{row.same_top:.2%}")
_SAME_EXPERTS: Column = ("same experts", "r", lambda row: f"{row.same_experts:.2%}")
_KL: Column = ("KL, 1e-3", "r", lambda row: f"{1e3 * row.kl:.3f} ± {1e3 * row.kl_error:.3f}")


def _against_base(part: Part[FidelityRow]) -> Column:
    """Return the column of ratios to the base's divergence with the same use of an importance matrix."""
    bases = {imatrix: part.row(Variant(BASE, imatrix)) for imatrix in (False, True)}
    return f"against {BASE}", "r", lambda row: _divergences(row.windows, bases[row.imatrix].windows)


def bars_table(figures: Figures) -> str:
    """Show each bar, the ratio, and whether the bar is met."""
    columns: Sequence[Column] = (
        ("recipe", "l", lambda each: f"`{each.recipe}`"),
        _IMATRIX,
        ("what", "l", lambda each: each.measure),
        ("against", "l", lambda each: each.against),
        ("ratio", "r", lambda each: f"{each.result:.3f}"),
        ("interval", "l", lambda each: "{:.3f} – {:.3f}".format(*each.spread) if each.spread else ""),
        ("bar", "l", lambda each: str(each.bar)),
        ("", "l", _judged),
    )
    return markdown_of(columns, verdicts(figures))


def _judged(verdict: Verdict) -> str:
    words = [_HOLDS[bool(verdict.passed)]]
    if verdict.is_uncertain:
        words.append("uncertain")
    if verdict.is_none:
        words.append(_NO_DIFFERENCE)
    return ", ".join(words)


def fidelity_table(part: Part[FidelityRow]) -> str:
    """Compare each type with the unquantized model."""
    columns: Sequence[Column] = (
        _TYPE,
        _IMATRIX,
        ("size, MB", "r", lambda row: f"{row.file_size / 1e6:.2f}"),
        _BITS,
        _MB_PER_TOKEN,
        _PERPLEXITY,
        _KL,
        ("99%, 1e-3", "r", lambda row: f"{1e3 * row.kl_99:.1f}"),
        _against_base(part),
        _SAME_TOP,
        _SAME_EXPERTS,
        ("overlap", "r", lambda row: f"{row.overlap:.2%}"),
    )
    return markdown_of(columns, part.rows)


def frontier_table(part: Reference) -> str:
    """Show what the solver makes of budgets."""
    columns: Sequence[Column] = (
        ("`--target-bpw`", "r", lambda row: row.type.removesuffix(" bpw")),
        _IMATRIX,
        ("bits", "r", lambda row: f"{row.bits_per_weight:.3f}"),
        _MB_PER_TOKEN,
        _KL,
        _against_base(part),
    )
    return markdown_of(columns, part.frontier)


def targets_table(part: Reference) -> str:
    """Show the sizes asked for, and those of the files."""
    rows = [
        [f"{row.budget:,}", f"{row.file_size:,}", f"{share:.2%}", _HOLDS[holds]]
        for row, (share, holds) in zip(part.targets, targets_hold(part), strict=True)
    ]
    return markdown(("`--target-size`, bytes", "file", "used", "99 to 100%"), "rrrl", rows)


def alike_table(part: Reference) -> str:
    """Compare types that all have embedding and output in Q8_0."""
    bases = {imatrix: part.alike_row(Variant(BASE, imatrix)) for imatrix in (False, True)}
    columns: Sequence[Column] = (
        _TYPE,
        _IMATRIX,
        ("size", "r", lambda row: _ratio(row.file_size, bases[row.imatrix].file_size)),
        ("KL, 1e-3", "r", lambda row: f"{1e3 * row.kl:.3f}"),
        (f"against {BASE}", "r", lambda row: _divergences(row.windows, bases[row.imatrix].windows)),
        ("95%", "l", lambda row: _interval(row.windows, bases[row.imatrix].windows)),
        _SAME_EXPERTS,
    )
    return markdown_of(columns, part.alike)


def calibrated_table(figures: Figures) -> str:
    """Compare files rounded with GPTQ with files of the same types made with an importance matrix."""

    def base(row: FidelityRow) -> FidelityRow:
        return figures.reference.row(row.variant)

    columns: Sequence[Column] = (
        _TYPE,
        _BITS,
        _KL,
        ("against imatrix", "r", lambda row: _divergences(row.windows, base(row).windows)),
        ("95%", "l", lambda row: _interval(row.windows, base(row).windows)),
        _PERPLEXITY,
        _SAME_TOP,
        _SAME_EXPERTS,
    )
    return markdown_of(columns, figures.calibrated.rows)


def spread(ratios: Sequence[float], control: float) -> str:
    """Show the median of the rounds, the lowest and the highest, and whether it is a difference."""
    middle = statistics.median(ratios)
    told = f"{middle:.3f} x"
    if len(ratios) > 1:
        told += f" ({min(ratios):.3f} – {max(ratios):.3f})"
    return told if is_difference(middle, control) else f"{told}, {_NO_DIFFERENCE}"


def sizes_table(part: Part[SizeRow]) -> str:
    """Show the 16B shape. Mixes that choose other types with an importance matrix have two lines."""
    base = part.row(Variant(BASE, False))
    columns: Sequence[Column] = (
        ("type", "l", lambda row: named(row.type) + (", imatrix" if row.imatrix else "")),
        ("size, GB", "r", lambda row: f"{row.n_bytes / 1e9:.3f}"),
        _BITS,
        (f"against {BASE}", "r", lambda row: _ratio(row.n_bytes, base.n_bytes)),
        ("GB per token", "r", lambda row: f"{row.n_bytes_per_token / 1e9:.3f}"),
        (f"against {BASE}", "r", lambda row: _ratio(row.n_bytes_per_token, base.n_bytes_per_token)),
    )
    plain = {row.type: row.digest for row in part.rows if not row.imatrix}
    return markdown_of(
        columns, [row for row in part.rows if not row.imatrix or row.digest != plain[row.type]]
    )


def speed_table(part: Part[SpeedRow]) -> str:
    """Show medians of the rounds, and the bytes that decoding reads."""
    base = part.row(Variant(BASE, False))  # the bytes are the same, however it was loaded
    prompt, decode = (control_of(part, measure) for measure in (PROMPT, DECODE))
    columns: Sequence[Column] = (
        ("type", "l", lambda row: named(row.type)),
        ("`--kernels`", "l", lambda row: row.kernels + (", the control" if row.kernels != AUTO else "")),
        ("prompt, tokens/s", "r", lambda row: f"{statistics.median(row.prompt):.1f}"),
        (f"against {BASE} repacked", "r", lambda row: spread(row.prompt_ratio, prompt)),
        ("decode, tokens/s", "r", lambda row: f"{statistics.median(row.decode):.1f}"),
        (f"against {BASE} repacked", "r", lambda row: spread(row.decode_ratio, decode)),
        (
            "bytes per token of this file",
            "r",
            lambda row: _ratio(row.n_bytes_per_token, base.n_bytes_per_token),
        ),
    )
    return markdown_of(columns, part.rows)


def settings_table(figures: Figures) -> str:
    """Say of each part when, with what and on what it was measured."""
    rows = [
        [name if number == 0 else "", *line]
        for name in PARTS
        for number, line in enumerate(_lines(getattr(figures, name)))
    ]
    return markdown(("part", "", ""), "lll", rows)


def _lines(part: Part[Any]) -> Iterator[tuple[str, str]]:
    yield "measured", f"{part.measured}, commit {part.commit or 'unknown'}"
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


def _training_lines(part: Part[Any]) -> Iterator[tuple[str, str]]:
    found = part.facts["training"]
    amount = (
        f"{found['n_steps']:,} steps, {found['n_tokens'] / 1e6:.1f}M tokens, {found['n_epochs']:.1f} epochs"
    )
    yield "training", f"seed {found['seed']}: {amount}"
    yield "trained with", f"{found['products']} products, torch {found['torch']}, Python {found['python']}"
    yield "held-out loss", f"{found['held_out_loss']:.3f} nats per token"


def _fidelity_lines(part: Part[Any]) -> Iterator[tuple[str, str]]:
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


def _speed_lines(part: Part[Any]) -> Iterator[tuple[str, str]]:
    settings, facts = part.settings, part.facts
    yield "processor", f"{facts['cpu']}, {settings['threads']} threads, load before {facts['load_before']}"
    yield "shape", f"{settings['shape']}, {settings['layers']} layers"
    yield "prompt, reply", f"{settings['n_prompt']} tokens, {settings['n_gen']} tokens"
    yield "rounds", f"{settings['rounds']}, with {' and '.join(map(str, settings['turns']))} turns each"
