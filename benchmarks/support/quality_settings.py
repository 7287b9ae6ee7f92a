"""What the figures of benchmarks/quality.py were measured with, as a table. From the figures' own files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.support.quality_rows import Part
from benchmarks.support.tables import markdown

Line = tuple[str, str]


def settings_table(parts: Mapping[str, Part]) -> str:
    """Of each part that is there: when, with what, on what, and how much of it."""
    rows = [
        [name if number == 0 else "", *line]
        for name, part in parts.items()
        for number, line in enumerate(_lines(part))
    ]
    return markdown(("part", "", ""), "lll", rows)


def _lines(part: Part) -> Iterator[Line]:
    yield "measured", f"{part.measured}, commit {part.commit or 'unknown'}"
    if part.oldest:
        yield "the oldest rows", part.oldest
    if "training" in part.facts:
        yield from _training(part)
    if "n_windows" in part.settings:
        yield from _fidelity(part)
    if "costs" in part.facts:
        yield "costs of errors, for the solver", part.facts["costs"]
    if "layers" in part.settings:
        yield from _speed(part)
    if "kernels" in part.settings:
        yield "llama-cpp-python", part.settings["kernels"]


def _training(part: Part) -> Iterator[Line]:
    """As benchmarks/train_reference.py has written it."""
    found = part.facts["training"]
    amount = (
        f"{found['n_steps']:,} steps, {found['n_tokens'] / 1e6:.1f}M tokens, {found['n_epochs']:.1f} epochs"
    )
    yield "training", f"{found['minutes']:g} minutes, seed {found['seed']}: {amount}"
    yield "trained with", f"{found['products']} products, torch {found['torch']}, Python {found['python']}"
    yield "held-out loss", f"{found['held_out_loss']:.3f} nats per token"


def _fidelity(part: Part) -> Iterator[Line]:
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


def _speed(part: Part) -> Iterator[Line]:
    settings, facts = part.settings, part.facts
    yield "processor", f"{facts['cpu']}, {settings['threads']} threads, load before {facts['load_before']}"
    yield "shape", f"{settings['shape']}, {settings['layers']} layers"
    yield "prompt, reply", f"{settings['n_prompt']} tokens, {settings['n_gen']} tokens"
    yield "rounds", f"{settings['rounds']}, with {' and '.join(map(str, settings['turns']))} turns each"
