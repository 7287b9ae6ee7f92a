"""dsmoe-local: convert, quantize and run mixtures of experts on a laptop.

`open_model` and `open_model_async` run a model from Python (docs/python.md). They are imported on use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsmoe_local.api import (
        AsyncModel,
        AsyncStream,
        Choice,
        DsmoeError,
        EngineCrashError,
        LoadOptions,
        Messages,
        Model,
        PromptError,
        Reply,
        ReplyOptions,
        Result,
        Stream,
        open_model,
        open_model_async,
    )

__version__ = "0.1.0"

__all__ = [
    "AsyncModel",
    "AsyncStream",
    "Choice",
    "DsmoeError",
    "EngineCrashError",
    "LoadOptions",
    "Messages",
    "Model",
    "PromptError",
    "Reply",
    "ReplyOptions",
    "Result",
    "Stream",
    "open_model",
    "open_model_async",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module("dsmoe_local.api"), name)
