"""The converter in one pass against converter, then quantizer: the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import WIDE, write_checkpoint

from dsmoe_convert.convert import ConvertOptions, convert_folder
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.policy.choice import Overrides, parse_override
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("word", ["q4", "Q4_K_M", "f32", "bf16"])
def test_same_files(tmp_path: Path, word: str, dtype: torch.dtype) -> None:
    """A difference in metadata, order or bytes between the two ways to one type."""
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint, WIDE, dtype=dtype)
    overrides = Overrides(tensors=(parse_override(r"blk\.1\.attn_q\.weight=q5_0"),))
    direct = convert_folder(checkpoint, tmp_path / "direct.gguf", ConvertOptions(word, overrides))
    plain = convert_folder(checkpoint, tmp_path / "plain.gguf")
    plan = plan_quantization(plain.path, resolve(word), overrides)
    two_steps = quantize_file(plan, tmp_path / "two-steps.gguf")
    assert direct.path.read_bytes() == two_steps.path.read_bytes()
    assert read_gguf(direct.path).tensors["blk.1.attn_q.weight"].type.name == "Q5_0"
