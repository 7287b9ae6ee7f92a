"""Errors in terms of the Python API: the engine's messages name options of the command line."""

from __future__ import annotations

import re
from contextlib import ContextDecorator
from types import TracebackType

from dsmoe_local.base.errors import DsmoeError

PARAMETERS = {
    "-c": "n_context",
    "-b": "n_batch",
    "-ub": "n_ubatch",
    "-t": "n_threads",
    "-tb": "n_threads_batch",
    "-ngl": "n_gpu_layers",
    "-fa": "flash_attention",
    "-ctk": "cache_type_k",
    "-ctv": "cache_type_v",
    "--n-cpu-moe": "n_cpu_moe",
    "--tensor-override": "tensor_overrides",
    "--device": "devices",
    "--rpc": "workers",
    "--kernels": "kernels",
    "--parallel": "n_parallel",
    "--deterministic": "deterministic",
    "--active-experts": "n_experts_per_token",
    "--chat-template": "chat_template",
    "--log-file": "log_file",
}
"""The parameters of `open_model` that correspond to options which messages name."""

_FLAG = re.compile(rf"(?<![\w-])({'|'.join(PARAMETERS)})(?![\w-])")


def use_parameters(error: DsmoeError) -> None:
    """Replace the options that a message names by parameters."""
    error.what, error.remedy = (
        _FLAG.sub(lambda found: PARAMETERS[found[0]], text) for text in (error.what, error.remedy)
    )


class ParametersInErrors(ContextDecorator):
    """Lets the DsmoeErrors of a block, or of a function, name parameters in place of options."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DsmoeError):
            use_parameters(error)
