"""Keyword options of the Python API: of a model, the fields of ModelOptions; of a reply, OpenAI's fields."""

from __future__ import annotations

import difflib
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from dsmoe_local.base.config_file import models_folder
from dsmoe_local.base.paths import absolute
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.discovery import find_model_files, several_of_one_name
from dsmoe_local.model.gguf_model import trained_context


class LoadOptions(TypedDict, total=False):
    """How to load a model: the fields of ModelOptions, which `dsmoe chat --help` describes as options.

    `n_parallel` requests are decoded at once. `n_gpu_layers` -1 means all. `workers` are addresses of
    `dsmoe worker`. `log_file` gets llama.cpp's log. `prompt_ratio` is the number of prompt tokens for each
    token of a reply; `kernels` "auto" depends on it.
    """

    n_context: int | None
    n_batch: int
    n_ubatch: int
    n_threads: int | None
    n_threads_batch: int | None
    n_gpu_layers: int | None
    flash_attention: str
    cache_type_k: str
    cache_type_v: str
    n_experts_per_token: int | None
    chat_template: str | None
    n_parallel: int
    unified: bool | None
    deterministic: bool
    n_cpu_moe: int | None
    tensor_overrides: Sequence[tuple[str, str]]
    devices: Sequence[str] | None
    offload_cache: bool
    kernels: str
    prompt_ratio: float
    workers: Sequence[str]
    log_file: str | Path | None


class ReplyOptions(TypedDict, total=False):
    """How to reply: the fields of OpenAI's requests. docs/batch.md lists those that work, with their names in
    other programs. `n` replies are generated at once.
    """

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    seed: int | None
    stop: str | Sequence[str]
    n: int
    logprobs: bool
    top_logprobs: int
    logit_bias: Mapping[int, float]
    response_format: Mapping[str, Any]
    json_schema: Mapping[str, Any] | str
    grammar: str
    reasoning_budget: int
    chat_template_kwargs: Mapping[str, Any]
    continue_final_message: bool


Warn: TypeAlias = Callable[[str], None]
"""Shows a warning to the user."""

NOT_OPTIONS = frozenset({"path", "observers", "scores_prompts"})
"""Fields of ModelOptions that are not keyword options."""


def warning_at_caller() -> Warn:
    """Return a function that warns at the line that called the caller of this one, in any thread."""
    place = traceback.extract_stack(limit=3)[0]
    return lambda text: warnings.warn_explicit(text, UserWarning, place.filename, place.lineno or 0)


def model_options(model: str | Path, options: Mapping[str, Any], warn: Warn) -> ModelOptions:
    """Return how to load the model with a path or a name.

    Raises UsageError or FileError if there is none, FormatError if its file cannot be used, TypeError for an
    unknown option. `warn` is told if the context is shortened to what the model was trained for.
    """
    known = [field.name for field in fields(ModelOptions) if field.name not in NOT_OPTIONS]
    check_names(options, known, "open_model")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    paths = find_model_files(str(model), models_folder()[0])
    if len(paths) > 1:
        warn(several_of_one_name(paths))
    asked = ModelOptions(absolute(paths[0]), **options)
    # As in the commands, 0 means what the model was trained for.
    n_context = asked.n_context or None
    if n_context is not None and (n_trained := trained_context(asked.path, n_context)) < n_context:
        warn(f"n_context is {n_trained}: the model was trained for no more")
        n_context = n_trained
    return ModelOptions(asked.path, **{**options, "n_context": n_context})


def check_names(given: Iterable[str], known: Iterable[str], function: str) -> None:
    """Raise TypeError for an option that does not exist, with a similar one."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(known)}"
            raise TypeError(f"{function}() has no option {name!r}{hint}")
