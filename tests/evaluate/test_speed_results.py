"""Rates and bytes per token computed from times, and the output formats."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gguf
import pytest
from support.models import tiny_model
from support.tiny_gguf import DENSE, write_tiny

from dsmoe_local.base.errors import FormatError
from dsmoe_local.engine.types import ModelInfo, ModelOptions
from dsmoe_local.evaluate.speed.machine import Bandwidth, Machine
from dsmoe_local.evaluate.speed.output import FORMATS, as_text
from dsmoe_local.evaluate.speed.results import ModelSpeed, Reads, reads_of, speed_of
from dsmoe_local.evaluate.speed.timing import Timed, Workload

LLAMA_BENCH = [
    "build_commit",
    "build_number",
    "cpu_info",
    "gpu_info",
    "backends",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "cpu_mask",
    "cpu_strict",
    "poll",
    "type_k",
    "type_v",
    "n_gpu_layers",
    "n_cpu_moe",
    "split_mode",
    "main_gpu",
    "no_kv_offload",
    "flash_attn",
    "devices",
    "tensor_split",
    "tensor_buft_overrides",
    "load_mode",
    "lazy_mode",
    "embeddings",
    "no_op_offload",
    "no_host",
    "repack",
    "fit_target",
    "fit_min_ctx",
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
]
"""The fields of llama-bench's CSV, in order."""

BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
READS = Reads("Q4_0", 2_000_000_000, 1.5e9, 200_000)
MACHINE = Machine("A Processor", Bandwidth(40e9, 4, 1 << 30, 32 << 20), 0.1)


def model(
    name: str = "some model", *, placement: str = "CPU: 9 GB of weights", scale: float = 1
) -> ModelSpeed:
    options = ModelOptions(Path(f"/models/{name}.gguf"), flash_attention="on")
    info = ModelInfo(
        path=options.path,
        name="a name",
        architecture="deepseek",
        n_context=642,
        n_context_trained=4096,
        n_vocab=100,
        n_parameters=16_400_000_000,
        n_bytes=9 << 30,
        n_routed_experts=64,
        n_experts_per_token=6,
        n_choosable_experts=64,
        n_threads=4,
        template=None,
        placement=placement,
    )
    timed = [
        Timed(Workload(512, 0), (1.0 * scale, 2.0 * scale), BEGAN),
        Timed(Workload(0, 128, 1000), (8.0 * scale, 16.0 * scale), BEGAN),
    ]
    return ModelSpeed(info, options, READS, 1.25, 3 << 30, tuple(speed_of(each, READS) for each in timed))


def test_rates_are_llama_benchs() -> None:
    """The mean is that of the rates, not the rate of the mean time; the deviation is that of a sample.

    Guards: 341.3 tokens/s for 384.0, a deviation of the whole population, a division by nothing.
    """
    prompt, reply = model().speeds
    assert prompt.samples == [512, 256]
    assert prompt.rate == pytest.approx(384)
    # sqrt((512² + 256²) / (n - 1) - mean² n / (n - 1)), as it computes it.
    assert prompt.deviation == pytest.approx(math.sqrt(512**2 + 256**2 - 2 * 384**2))
    assert reply.rate == pytest.approx(12)
    alone = speed_of(Timed(Workload(512, 0), (2.0,), BEGAN), READS)
    assert (alone.rate, alone.deviation) == (256, 0)
    assert speed_of(Timed(Workload(512, 0), (0.0,), BEGAN), READS).rate > 0


def test_bytes_per_second() -> None:
    """Guards: a context that costs nothing to read, prompts with a meaningless figure, a GPU's reads
    held against the machine's memory.
    """
    one = model()
    prompt, reply = one.speeds
    assert (prompt.bytes_per_second, one.share_of(prompt, MACHINE.bandwidth)) == (None, None)
    # A token in the middle of the reply has 1,000 + 64 before it.
    per_token = 1.5e9 + 1064 * 200_000
    assert reply.bytes_per_second == pytest.approx(12 * per_token)
    assert one.share_of(reply, MACHINE.bandwidth) == pytest.approx(12 * per_token / 40e9)
    offloaded = model(placement="CUDA0: 20 layers (6 GB of weights); RPC0: 4 layers; CPU: 2 GB of weights")
    assert offloaded.devices == ("CUDA0", "RPC0")
    assert offloaded.share_of(offloaded.speeds[1], MACHINE.bandwidth) is None
    assert (model(placement="").devices, model().devices) == ((), ())


def read_by_hand(path: Path, n_active: int, n_experts: int) -> float:
    """Compute the bytes read per token with the gguf package's reader."""
    total = 0.0
    for tensor in gguf.GGUFReader(path).tensors:
        part = 1.0
        if "_exps." in tensor.name:
            part = n_active / n_experts
        elif tensor.name == "token_embd.weight":
            part = 1 / int(tensor.shape[1])
        total += int(tensor.n_bytes) * part
    return total


def test_what_a_token_reads(tmp_path: Path) -> None:
    """Guards: experts that are not used, all rows of an embedding, another number of active experts or type
    of cache not looked at, an embedding that is the output not read.
    """
    path = tiny_model()
    reads = reads_of(path, ModelOptions(path))
    assert reads.n_bytes == pytest.approx(read_by_hand(path, 3, 8))
    fewer = reads_of(path, ModelOptions(path, n_experts_per_token=1))
    assert fewer.n_bytes == pytest.approx(read_by_hand(path, 1, 8))
    assert fewer.n_activated < reads.n_activated
    fields = gguf.GGUFReader(path).fields
    layers = int(fields["deepseek.block_count"].parts[-1][0])
    kv_size = int(fields["deepseek.attention.head_count_kv"].parts[-1][0]) * int(
        fields["deepseek.rope.dimension_count"].parts[-1][0]
    )
    assert reads.n_cache_bytes == layers * 2 * 2 * kv_size
    mixed = reads_of(path, ModelOptions(path, cache_type_k="f32"))
    assert mixed.n_cache_bytes == layers * (4 + 2) * kv_size
    dense = write_tiny(tmp_path / "dense.gguf", DENSE)
    tensors = gguf.GGUFReader(dense).tensors
    row = next(int(each.n_bytes) for each in tensors if each.name == "token_embd.weight") / DENSE.n_vocab
    assert reads_of(dense, ModelOptions(dense)).n_bytes == pytest.approx(
        sum(int(each.n_bytes) for each in tensors) + row
    )
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError):
        reads_of(tmp_path / "broken.gguf", ModelOptions(tmp_path))


def test_json_and_csv_have_llama_benchs_fields() -> None:
    """Guards: a field of llama-bench's name that means something else or stands elsewhere, CSV that says
    another thing than JSON, samples lost.
    """
    models = [model(), model("other", scale=2)]
    found: list[dict[str, Any]] = json.loads(FORMATS["json"](MACHINE, models))
    assert len(found) == 4
    shared = [name for name in found[0] if name in LLAMA_BENCH]
    assert shared == [name for name in LLAMA_BENCH if name in found[0]]
    assert list(found[0])[: len(shared)] == shared
    first, second = found[:2]
    assert (first["n_prompt"], first["n_gen"], first["n_depth"]) == (512, 0, 0)
    assert (second["n_prompt"], second["n_gen"], second["n_depth"]) == (0, 128, 1000)
    assert (first["avg_ns"], first["stddev_ns"]) == (1_500_000_000, round(math.sqrt(0.5) * 1e9))
    assert (first["avg_ts"], first["samples_ts"]) == (384, [512, 256])
    assert first["samples_ns"] == [1_000_000_000, 2_000_000_000]
    assert (first["test_time"], first["model_size"]) == ("2026-01-02T03:04:05Z", 9 << 30)
    assert (first["flash_attn"], first["no_kv_offload"], first["backends"]) == (1, False, "CPU")
    assert (second["n_experts_used"], second["n_experts"], second["load_seconds"]) == (6, 64, 1.25)
    assert second["read_bytes_per_second"] == round(12 * (1.5e9 + 1064 * 200_000))
    assert (first["read_bytes_per_second"], first["memory_share"]) == (None, None)
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](MACHINE, models))))
    assert len(rows) == 4
    for row, record in zip(rows, found, strict=True):
        assert set(record) - set(row) == {"samples_ns", "samples_ts"}
        for name, text in row.items():
            value = record[name]
            if isinstance(value, bool | int | float):
                assert float(text) == pytest.approx(float(value), abs=1e-6), name
            else:
                assert text == ("" if value is None else value), name


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_markdown_tables() -> None:
    """Guards: columns that do not fit their headings, the model's own speed called the other's, a peak that
    is not known shown as one.
    """
    unknown = replace(model("other", scale=2), peak_bytes=None)
    speeds, costs, about = FORMATS["md"](MACHINE, [model(), unknown]).split("\n\n")
    table = cells(speeds)
    assert {len(row) for row in table} == {9}
    assert len({len(line) for line in speeds.splitlines()}) == 1
    assert table[2] == [
        "some model",
        "deepseek 16.4B Q4_0",
        "9.00 GiB",
        "16.40 B",
        "6 of 64",
        "CPU",
        "4",
        "pp512",
        "384.00 ± 181.02",
    ]
    assert [row[-2] for row in table[2:]] == ["pp512", "tg128 @ d1000"] * 2
    table = cells(costs)
    assert table[2] == [
        "some model",
        "2B",
        "1.25 s",
        "3.22 GB",
        "tg128 @ d1000",
        "1.71 GB",
        "20.6",
        "51%",
        "1.00 x",
    ]
    # Both deviations are 0.471 of the rate.
    assert (table[3][0], table[3][3], table[3][-1]) == ("other", "", "0.50 ± 0.33 x")
    assert "40.0 GB/s read by 4 threads" in about
    assert "33.6 MB" in about


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 250])
def test_a_terminal_gets_whole_words(width: int) -> None:
    """Guards: lines longer than the terminal, which breaks them in the middle of words and columns; a figure
    of the tables that is left out.
    """
    models = [model("some-model-with-a-name"), model("other", scale=2)]
    found = as_text(MACHINE, models, width)
    assert max(map(len, found.splitlines())) <= width
    table = FORMATS["md"](MACHINE, models)
    if max(map(len, table.splitlines()[:-1])) <= width:
        assert found == table
    words = " ".join(found.split())
    for figure in ("384.00 ± 181.02", "9.00 GiB", "3.22 GB", "1.71 GB", "51%", "0.50 ± 0.33 x", "40.0 GB/s"):
        assert figure in words
    # One model is beside nothing.
    assert " x" not in as_text(MACHINE, models[:1], width)


def test_a_prompt_alone_and_a_model_alone() -> None:
    """Guards: a table without the model where no reply was timed, a model compared with itself."""
    only = model()
    _, costs, _ = FORMATS["md"](MACHINE, [replace(only, speeds=only.speeds[:1])]).split("\n\n")
    assert cells(costs)[2] == ["some model", "2B", "1.25 s", "3.22 GB", "", "1.5 GB", "", ""]
    _, costs, _ = FORMATS["md"](MACHINE, [only]).split("\n\n")
    assert cells(costs)[0][-1] == "of bandwidth"
    assert cells(costs)[2][-1] == "51%"


def test_hostile_names() -> None:
    """Guards: a file's name that ends a cell, a line or the terminal's patience, in any form."""
    hostile = model('a|b\x1b[31m\n"c",d')
    for name, write in FORMATS.items():
        text = write(MACHINE, [hostile])
        assert "\x1b" not in text, name
        if name == "md":
            assert "a\\|b" in text
            assert len(text.split("\n\n")[0].splitlines()) == 4
    (row, _) = csv.DictReader(io.StringIO(FORMATS["csv"](MACHINE, [hostile])))
    assert '"c",d' in row["model_filename"]
