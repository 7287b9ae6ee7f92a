"""Run a model from Python: `open_model` and `open_model_async`. docs/python.md has examples."""

from dsmoe_local.api.async_model import AsyncModel, AsyncStream, open_model_async
from dsmoe_local.api.model import Model, Stream, open_model
from dsmoe_local.api.options import LoadOptions, ReplyOptions
from dsmoe_local.api.requests import Messages, Result
from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.engine.errors import EngineCrashError, PromptError
from dsmoe_local.protocol.replies import Choice, Reply

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
