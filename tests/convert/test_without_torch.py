"""torch is optional: safetensors are converted without it, and to the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import Form, write_checkpoint

from dsmoe_convert.convert import ConvertOptions, convert_folder

CONVERT = """
import sys
from dsmoe_local.cli.main import convert
try:
    convert()
finally:
    print("loaded" if sys.modules.get("torch") else "not loaded")
"""
WITHOUT_TORCH = "import sys\nsys.modules['torch'] = None\n" + CONVERT


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_safetensors_are_converted_without_torch(form: Form, tmp_path: Path) -> None:
    """A conversion that loads torch where it is installed, and therefore fails where it is not."""
    source = write_checkpoint(tmp_path / "tiny", form=form, dtype=torch.bfloat16)
    convert_folder(source, tmp_path / "expected.gguf", ConvertOptions("q4"))
    expected = (tmp_path / "expected.gguf").read_bytes()
    for code in (CONVERT, WITHOUT_TORCH):
        command = [sys.executable, "-c", code, str(source), "--type", "q4", "-o", "out.gguf", "--force"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "not loaded"
        assert (tmp_path / "out.gguf").read_bytes() == expected


def test_repositories_and_the_demo_need_no_torch() -> None:
    """An import of torch on the way to the hub, or in the demo where no calibration is made."""
    code = (
        "import sys\n"
        "import huggingface_hub, tokenizers\n"
        "from dsmoe_convert import hub, sources\n"
        "from dsmoe_convert.demo import build, calibration\n"
        "huggingface_hub.HfApi(), huggingface_hub.snapshot_download, tokenizers.Tokenizer\n"
        "calibration.load()\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
