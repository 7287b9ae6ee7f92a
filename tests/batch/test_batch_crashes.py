"""Batches whose engine process really dies: because of a request, or killed from outside."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from support import hosted
from support.batches import answer, batch, by_id, run_batch
from support.models import tiny_model

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.interface import Deliver, Ticket
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Prompt, Request


@pytest.mark.parametrize(
    ("deed", "told"), [("signal SIGSEGV", "SIGSEGV"), ("signal SIGABRT", "SIGABRT"), ("exit 3", "3")]
)
def test_the_culprit_alone_is_blamed(tmp_path: Path, deed: str, told: str) -> None:
    """Guards: a native crash that ends the batch, or takes other lines' records with it."""
    lines: list[dict[str, Any]] = [{"id": str(n), "prompt": f"p{n}"} for n in range(12)]
    lines[4]["prompt"] = deed
    options = batch(tmp_path, *lines, ordered=True)
    with EngineClient.load(ModelOptions(Path("fake.gguf")), factory=hosted.FAKE) as engine:
        found = by_id(answer(engine, options))
    assert len(found) == 12
    assert {name for name, record in found.items() if record["error"]} == {"4"}
    assert found["4"]["error"]["code"] == "engine_crash_error"
    assert told in found["4"]["error"]["message"]
    assert found["11"]["text"] == "p11"


def test_an_engine_killed_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a line blamed for the out-of-memory killer's choice; texts that differ after it."""
    lines = [{"id": str(n), "prompt": f"The quick {n}", "max_tokens": 12} for n in range(30)]
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    options = ModelOptions(tiny_model(), n_parallel=2, deterministic=True, n_threads=1)
    with EngineClient.load(options) as engine:
        whole = by_id(answer(engine, batch(folders[0], *lines)))
        first = engine.pid
        n_started = 0
        start = engine.start

        def kill_at_eighth(request: Request, deliver: Deliver) -> Ticket:
            nonlocal n_started
            n_started += 1
            if n_started == 8:
                os.kill(first, signal.SIGSTOP)  # so that the request is in flight when it is killed
            ticket = start(request, deliver)
            if n_started == 8:
                os.kill(first, signal.SIGKILL)
            return ticket

        monkeypatch.setattr(engine, "start", kill_at_eighth)
        killed = by_id(answer(engine, batch(folders[1], *lines)))
        assert engine.pid != first
        assert n_started > len(lines)
    assert {name: record["text"] for name, record in killed.items()} == {
        name: record["text"] for name, record in whole.items()
    }
    assert not any(record["error"] for record in killed.values())


def test_an_interruption_while_the_model_loads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a signal that is ignored until the model is loaded again."""
    stop = threading.Event()
    options = batch(tmp_path, {"id": "a", "prompt": "exit 1"}, {"id": "b", "prompt": "b"}, ordered=True)
    with EngineClient.load(ModelOptions(tmp_path / "loaded"), stop=stop, factory=hosted.ONCE) as engine:
        encode = engine.encode

        def interrupted(prompt: Prompt) -> tuple[int, ...]:
            # The second load of this engine never ends.
            stop.set()
            return encode(prompt)

        monkeypatch.setattr(engine, "encode", interrupted)
        with pytest.raises(InterruptedRunError, match="0 of 2 records are written"):
            run_batch(engine, options, stop=stop)
