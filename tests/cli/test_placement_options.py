"""The options that say where a model lies, in our spelling and llama.cpp's."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dsmoe_local.base.errors import UsageError
from dsmoe_local.cli.model_options import loading_options, model_options
from dsmoe_local.engine.types import ALL_LAYERS, ModelOptions


def parsed(*arguments: str) -> ModelOptions:
    found: list[ModelOptions] = []

    @click.command()
    @model_options
    def command(**values: object) -> None:
        found.append(loading_options(Path("m.gguf"), values))

    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return found[0]


def test_the_defaults_are_those_of_the_engine() -> None:
    """Guards: a default of the command line that is not the engine's, as experts on the CPU."""
    assert parsed() == ModelOptions(Path("m.gguf"))


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("-ngl 7", "n_gpu_layers", 7),
        ("--n-gpu-layers all", "n_gpu_layers", ALL_LAYERS),
        ("-ngl auto", "n_gpu_layers", None),
        ("-ncmoe 3", "n_cpu_moe", 3),
        ("--n-cpu-moe auto", "n_cpu_moe", None),
        ("-cmoe", "n_cpu_moe", ALL_LAYERS),
        ("--cpu-moe", "n_cpu_moe", ALL_LAYERS),
        ("-dev CUDA0,CUDA1", "devices", ("CUDA0", "CUDA1")),
        ("--device none", "devices", ()),
        ("--rpc a:1,b=2GiB", "workers", ("a:1", "b=2GiB")),
        ("-nkvo", "offload_cache", False),
        ("-ot exps=CPU", "tensor_overrides", (("exps", "CPU"),)),
        ("--override-tensor a=CPU,b{1,2}=CUDA0", "tensor_overrides", (("a", "CPU"), ("b{1,2}", "CUDA0"))),
        ("-ot a=b=CPU --tensor-override c=GPU", "tensor_overrides", (("a=b", "CPU"), ("c", "GPU"))),
        ("-ot x=RPC0[127.0.0.1:5]", "tensor_overrides", (("x", "RPC0[127.0.0.1:5]"),)),
    ],
)
def test_spellings(arguments: str, name: str, value: object) -> None:
    """Guards: an option of llama.cpp's that is read as another one; commas and = within a pattern."""
    assert getattr(parsed(*arguments.split()), name) == value


@pytest.mark.parametrize(
    "arguments",
    [
        "-ngl -3",
        "-ngl few",
        "-ot exps",
        "-ot =CPU",
        "-ot a=",
        "-dev a,,b",
        "--rpc a:b",
        "--rpc a:1,,b:2",
        "-ngl ²",
    ],
)
def test_nonsense_is_refused(arguments: str) -> None:
    """Guards: half an override that is dropped in silence."""
    with pytest.raises(click.UsageError):
        parsed(*arguments.split())


def test_two_counts_of_experts() -> None:
    """Guards: one of two contradicting options that wins in silence."""
    with pytest.raises(UsageError, match="--cpu-moe and --n-cpu-moe"):
        parsed("--cpu-moe", "--n-cpu-moe", "3")
