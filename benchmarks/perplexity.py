"""Does `dsmoe eval` find what `llama-perplexity` finds? Both read the same text.

    python -m benchmarks.perplexity MODEL.gguf… --llama-cpp BUILD [--text FILE] [-c 512] [--chunks 8]
    python -m benchmarks.perplexity QUANTIZED.gguf… --llama-cpp BUILD --against MODEL.gguf

Same windows, same threads. Of each model the perplexity; with --against also the mean KL divergence from that
model's predictions, of which `dsmoe eval` keeps fewer than all if the vocabulary is large: its figure then
lies a little below. Differences are in parts per million of theirs. Table, then one JSON line; exit status 1
if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.runner import Bar, Row, say
from benchmarks.support.tables import report
from benchmarks.support.tools import Failure, find_program, finished
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.evaluate.speed.machine import cpu_name
from dsmoe_local.evaluate.text import read_text

SAME = Bar(1000, at_most=True)
"""A thousandth, in parts per million."""
_PER_MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Bench:
    """What is read, by how many threads, and where files go."""

    text: Path
    build: Path
    folder: Path
    options: tuple[str, ...]
    against: Path | None

    def rows(self, model: Path) -> list[Row]:
        """Both programs' figures of one model."""
        say(f"reading {self.text.name} with {model.name}")
        ours = self._ours(model)
        output = self._theirs("-m", model, "-f", self.text)
        perplexity = ours["perplexity"]["perplexity"]["value"]
        rows = [_row(f"perplexity, {model.stem}", perplexity, _figure("PPL", output), SAME)]
        if self.against is not None:
            base = "--kl-divergence-base", self.folder / "logits"
            if not (self.folder / "logits").exists():
                self._theirs("-m", self.against, "-f", self.text, *base)
            output = self._theirs("-m", model, "-f", self.text, *base, "--kl-divergence")
            kl = ours["comparison"]["divergence"]["kl"]["value"]
            theirs = 1e3 * _figure("Mean    KLD", output)
            rows.append(_row(f"mean KL, {model.stem}", 1e3 * kl, theirs, None, "1e-3 nats"))
        return rows

    def _ours(self, model: Path) -> Any:  # noqa: ANN401 - JSON
        against = ("--against", self.against) if self.against is not None else ()
        program = Path(sys.executable).with_name("dsmoe")
        command = [program, "eval", model, "--text", self.text, "--json", *against, *self.options]
        return json.loads(finished(command).stdout)

    def _theirs(self, *arguments: str | Path) -> str:
        done = finished([find_program(self.build, "llama-perplexity"), *arguments, *self.options])
        return done.stdout + done.stderr


def _figure(name: str, output: str) -> float:
    found = re.search(rf"{re.escape(name)} *[:=] +(-?[\d.]+)", output)
    if found is None:
        raise Failure(f"llama-perplexity does not say {name}: {output[-600:]}")
    return float(found[1])


def _row(measure: str, ours: float, theirs: float, bar: Bar | None, unit: str = "") -> Row:
    result = _PER_MILLION * abs(ours / theirs - 1)
    return Row(measure, ours, "llama-perplexity", theirs, result, unit, bar, "ppm", is_difference=True)


def main() -> int:
    """Measure and print."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="BUILD", help="its build folder")
    parser.add_argument("--against", type=Path, metavar="MODEL.gguf", help="the unquantized model")
    parser.add_argument("--text", metavar="FILE", help="[built in]")
    parser.add_argument(
        "-c", "--context", type=int, default=512, metavar="N", help="tokens of a window [512]"
    )
    parser.add_argument("--chunks", type=int, default=8, metavar="N", help="windows [8]")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), metavar="N")
    given = parser.parse_args()
    numbers = ("-c", str(given.context), "--chunks", str(given.chunks), "-t", str(given.threads))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = read_text(given.text)
        path = folder / "text.txt"
        # llama-perplexity drops one line feed at the end of a file.
        path.write_text(f"{text.content}\n", encoding="utf-8")
        bench = Bench(path, given.llama_cpp, folder, numbers, given.against)
        rows = [row for model in given.models for row in bench.rows(model)]
    title = f"{text.name}, {given.chunks} windows of {given.context} tokens"
    report(title, rows, {"benchmark": "perplexity", "cpu": cpu_name()})
    return 1 if any(row.passed is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
