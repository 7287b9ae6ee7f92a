"""A text through a model: which experts, against plain torch; and what another number of them costs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import torch_deepseek
from support.checkpoints import CORPUS, TINY, random_weights
from support.models import tiny_model
from support.observed import torch_inputs
from support.tiny_gguf import DENSE, write_tiny

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Event, Listener, Started, ignore
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.experts.cost import active_cost, compared, own_number
from dsmoe_local.experts.reading import OBSERVERS, Reading, read_tokens
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.report import report_on

TEXT = "\n".join((*CORPUS, *CORPUS[::-1]))
EXACT = ModelOptions(
    tiny_model(),
    n_threads=1,
    flash_attention="off",
    cache_type_k="f32",
    cache_type_v="f32",
    observers=OBSERVERS,
)


@pytest.fixture(scope="module", params=[256, 64], ids=["one window", "several windows"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.load(replace(EXACT, n_context=request.param, n_ubatch=32)) as engine:
        yield engine


def read(
    engine: Engine, text: str, listen: Listener = ignore, stop: threading.Event | None = None
) -> Reading:
    bos, *ids = engine.encode(text)
    return read_tokens(engine, ids, bos, "text", listen, stop or threading.Event())


def windows(engine: Engine, ids: list[int], bos: list[int]) -> list[list[int]]:
    """As the documentation has them: as few as fit beside one more token, equally long."""
    count = 1
    while True:
        cuts = [len(ids) * number // count for number in range(count + 1)]
        parts = [bos + ids[a:b] for a, b in itertools.pairwise(cuts)]
        if max(map(len, parts)) < engine.info.n_context:
            return parts
        count += 1


def test_a_text_uses_the_experts_that_torch_chooses(engine: Engine) -> None:
    """Guards: a last layer that sees only the ends, windows that overlap or lose a token, no BOS."""
    bos, *ids = engine.encode(TEXT)
    reading = read(engine, TEXT)
    weights = random_weights(TINY)
    counts = torch.zeros(TINY.n_moe_layers, TINY.n_routed_experts, dtype=torch.long)
    nll, n_scored, parts = 0.0, 0, windows(engine, ids, [bos])
    for part in parts:
        inputs = torch_inputs(weights, TINY, part)
        for index in range(TINY.n_moe_layers):
            name = f"model.layers.{TINY.n_dense_layers + index}.mlp.gate.weight"
            chosen = (inputs[name] @ weights[name].T).topk(TINY.n_experts_per_token, dim=-1).indices
            counts[index] += torch.bincount(chosen.flatten(), minlength=TINY.n_routed_experts)
        predicted = torch_deepseek.logits(weights, TINY, part)[:-1].log_softmax(-1)
        nll -= predicted.gather(1, torch.tensor(part[1:])[:, None]).sum().item()
        n_scored += len(part) - 1
    assert [list(layer.counts) for layer in reading.activity.layers] == counts.tolist()
    assert (reading.n_tokens, reading.n_windows) == (len(ids), len(parts))
    assert reading.activity.tokens == len(ids) + len(parts)
    assert reading.perplexity == pytest.approx(2.718281828459045 ** (nll / n_scored), rel=1e-3)


def test_a_second_text_is_counted_on_its_own(engine: Engine) -> None:
    """Guards: a text that is shown with the experts of the one before it."""
    first = read(engine, TEXT)
    other = read(engine, CORPUS[2])
    again = read(engine, TEXT)
    assert [layer.counts for layer in again.activity.layers] == [
        layer.counts for layer in first.activity.layers
    ]
    assert other.n_tokens == len(engine.encode(CORPUS[2])) - 1
    assert other.activity.tokens == other.n_tokens + other.n_windows


def test_progress_adds_up(engine: Engine) -> None:
    """Guards: a bar that ends before or behind its end."""
    events: list[Event] = []
    read(engine, TEXT, events.append)
    total = sum(event.total for event in events if isinstance(event, Started))
    assert total == sum(event.amount for event in events if isinstance(event, Advanced)) > 0


def test_a_stopped_reading_ends(engine: Engine) -> None:
    """Guards: Ctrl-C that has to wait for the whole text."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedRunError):
        read(engine, TEXT, stop=stop)


def test_costs_are_those_of_inspect_and_linear_in_the_experts() -> None:
    """Guards: a saving that counts shared experts, or all routed ones."""
    path = tiny_model()
    report, (file, _) = report_on(str(path)), read_model(path)
    own = active_cost(path, own_number(path))
    assert own.n_experts_per_token == TINY.n_experts_per_token
    assert own.n_bytes == report.n_bytes_per_token
    assert own.n_activated == report.n_activated
    routed = sum(tensor.n_bytes for name, tensor in file.tensors.items() if "_exps." in name)
    more = active_cost(path, own.n_experts_per_token + 2)
    assert more.n_bytes - own.n_bytes == pytest.approx(2 * routed / TINY.n_routed_experts)
    assert "5 instead of 3 experts" in compared(own, more)
    assert "more" in compared(own, more)
    assert "less" in compared(more, own)
    assert "(the same)" in compared(own, own)


def dsmoe(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", "from dsmoe_local.cli.main import dsmoe; dsmoe()", "experts", *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, "COLUMNS": "100", **environment},
        timeout=120,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_the_command_prints_tables_json_and_a_picture(tmp_path: Path) -> None:
    """Guards: JSON that is not alone on stdout, a picture that is not written, escape codes in a pipe."""
    text = tmp_path / "a [bold]\x1b[31m.txt"
    text.write_text(TEXT, encoding="utf-8")
    model = str(tiny_model())
    svg = tmp_path / "a.svg"
    shown = dsmoe("-m", model, str(text), "-", "--svg", str(svg), "-c", "64", stdin=CORPUS[1].encode())
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout
    assert "a [bold]␛[31m.txt: " in shown.stdout
    assert "they differ most in" in shown.stdout
    assert "stdin" in svg.read_text()
    done = dsmoe(model, str(text), "--json", "-c", "64")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    (only,) = found["texts"]
    assert only["windows"] > 1
    assert only["layers"][0]["tokens"] == only["layers"][1]["tokens"] == only["text_tokens"] + only["windows"]
    assert sum(only["layers"][1]["counts"]) == 3 * only["layers"][1]["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("nowhere.txt",), "cannot be read", 1),
        ((".",), "this is a folder", 1),
        (("-",), "the text is empty", 1),
        (("-", "-"), "stdin is given twice", 2),
        (("a", "b", "c"), "3 texts are given", 2),
        (("-", "--svg", "a.png"), "ends in .svg", 2),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    arguments: tuple[str, ...], message: str, code: int
) -> None:
    """Guards: a wrong path that is found after ten gigabytes were read; more than three lines."""
    done = dsmoe("-m", str(tiny_model()), *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_dense_models_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """Guards: a traceback out of the engine's process."""
    dense = write_tiny(tmp_path / "dense.gguf", DENSE)
    done = dsmoe("-m", str(dense), "-", stdin=b"text")
    assert done.returncode == 2
    assert "the model is dense" in done.stderr
    done = dsmoe("-m", str(tiny_model()), "-", stdin=b"text\xff")
    assert done.returncode == 1
    assert "not UTF-8" in done.stderr
    assert "byte 4" in done.stderr
