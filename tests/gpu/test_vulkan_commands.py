"""The commands on a Vulkan device, each in processes of its own, as users run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.batches import records, write_lines
from support.models import demo, tiny_model

pytestmark = pytest.mark.gpu

DSMOE = "from dsmoe_local.cli.main import dsmoe; dsmoe()"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def dsmoe(*arguments: str | Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `dsmoe`, which must end with `status`."""
    done = subprocess.run(
        [sys.executable, "-c", DSMOE, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**ENVIRONMENT, **environment},
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", "{}: 3 layers, the output"),
        ("-ngl 2", "{}: 1 layer, the output"),
        ("-ngl 0", ""),
        ("-dev none", ""),
        ("-ncmoe 2", "CPU: the routed experts of 1 layer"),
        ("-cmoe", "CPU: the routed experts of 2 layers"),
        ("-ot exps=CPU", "{}: 3 layers, the output"),
        ("-nkvo", "{}: 3 layers, the output"),
    ],
)
def test_options_of_placement(flags: str, told: str, vulkan: str) -> None:
    """Guards: an option that is lost on the way to the engine's process, or ends it."""
    done = dsmoe("chat", tiny_model(), "-p", "The quick", "-n", "4", "--temp", "0", "--json", *flags.split())
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 4
    assert told.format(vulkan) in done.stderr
    assert told or vulkan not in done.stderr


def test_demo(vulkan: str) -> None:
    """Guards: what only a model of 30 layers and a vocabulary of 49,152 tokens needs of the device."""
    done = dsmoe("chat", demo(), "-p", "Name a city.", "-n", "4", "--temp", "0", "-c", "256", "--json")
    assert f"{vulkan}: 30 layers, the output" in done.stderr
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 4


def test_batch(vulkan: str, tmp_path: Path) -> None:
    """Guards: requests in parallel that get the results of others."""
    prompts = ["The quick brown fox", "The quick brown dog", "A lazy dog jumps", "Once upon a time"] * 3
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
    texts = []
    for name, flags in (("gpu", []), ("cpu", ["-dev", "none"])):
        out = tmp_path / name
        options = ["--temp", "0", "-n", "6", "-np", "4", "--format", "simple", "--ordered", *flags]
        done = dsmoe("batch", source, "-o", out, "-m", tiny_model(), *options)
        assert (vulkan in done.stderr) == (name == "gpu")
        texts.append([record["text"] for record in records(out)])
    assert texts[0] == texts[1]


def test_divergence_from_the_cpu(vulkan: str, tmp_path: Path) -> None:
    """Guards: predictions that `dsmoe eval` reads from the device in another order or type."""
    kept = tmp_path / "cpu.reference"
    size = ("-c", "64", "--chunks", "2")
    dsmoe("eval", tiny_model(), "--keep", kept, *size, "-dev", "none")
    done = dsmoe("eval", tiny_model(), "--against", kept, "--json", *size)
    assert vulkan in done.stderr
    assert 0 < json.loads(done.stdout)["comparison"]["divergence"]["kl"]["value"] < 1e-3


def test_experts(vulkan: str, tmp_path: Path) -> None:
    """Guards: choices of routers that are read from memory which the device has used again."""
    text = tmp_path / "a.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    found = []
    for flags in ([], ["-dev", "none"]):
        done = dsmoe("experts", "-m", tiny_model(), text, "--json", *flags)
        assert (vulkan in done.stderr) == (not flags)
        found.append(json.loads(done.stdout)["texts"][0])
    assert found[0]["captured_mass"] == pytest.approx(found[1]["captured_mass"], rel=1e-3)
    for ours, cpu in zip(found[0]["layers"], found[1]["layers"], strict=True):
        shares = [{each["expert"]: each["share"] for each in layer["busiest"]} for layer in (ours, cpu)]
        # A choice between two experts that are about as good may fall differently.
        assert shares[0] == pytest.approx(shares[1], abs=0.03)
