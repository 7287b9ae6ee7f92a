"""Options of `dsmoe quantize` for rounding that is calibrated on text, and the text as token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from dsmoe_local.base.errors import MissingExtraError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.model_options import WINDOW_TOKENS
from dsmoe_local.cli.option_sources import flag_of, from_command_line
from dsmoe_local.cli.options import NUMBER, Group, all_of, choice, option, typed

if TYPE_CHECKING:
    from dsmoe_quantize.budget.target import Request
    from dsmoe_quantize.calibrated.calibration import Calibration

BUILT_IN = ""
"""The value of --calibrate without a value."""

_CALIBRATION = Group.CALIBRATION
_RECORD_BYTES = 320
"""The most that the record of a calibration adds to a file."""
_WITH_CALIBRATE = ("rounding", "calibration_tokens", "calibration_seed", "device")
"""Parameters that have no effect without --calibrate."""


def _text(context: click.Context, option: click.Parameter, value: Any) -> Any:  # noqa: ANN401 - of any source
    """Refuse a model: in `--calibrate MODEL`, it is meant as the argument."""
    if str(value).lower().endswith(".gguf"):
        shown = safe_line(str(value), 60)
        raise click.BadParameter(f"{shown!r} is a model, not a text: name it before --calibrate")
    return value


calibration_options = all_of(
    option(
        "--calibrate",
        "calibrate",
        "Round weights so that the outputs of each layer change least on a text. Needs torch, and much more"
        " time. Without a value: a built-in text, for a first try.",
        typed(click.Path(allow_dash=True), "[TEXT|-]"),
        _CALIBRATION,
        is_flag=False,
        flag_value=BUILT_IN,
        callback=_text,
    ),
    option(
        "--rounding",
        "rounding",
        "nearest: only weigh columns by their activations, as an importance matrix does. gptq: make up for"
        " errors in later columns. learned: train codes and scales; takes longest.",
        # dsmoe_quantize.calibrated.calibration.Rounding
        choice("nearest", "gptq", "learned"),
        _CALIBRATION,
        default="gptq",
    ),
    option(
        "--calibration-tokens",
        "calibration_tokens",
        "Tokens of the text to use, in windows from all of it.",
        typed(click.IntRange(WINDOW_TOKENS), "N"),
        _CALIBRATION,
        default=65_536,
    ),
    option(
        "--calibration-seed",
        "calibration_seed",
        "Seed that chooses the windows and their order.",
        NUMBER,
        _CALIBRATION,
        default=0,
    ),
    option(
        "--device",
        "device",
        "Device of torch to calibrate on.",
        choice("auto", "cpu", "cuda", "mps"),
        _CALIBRATION,
        default="auto",
        shown="auto: a GPU if there is one",
        # DSMOE_DEVICE, and the key at the top level of the config file, are llama.cpp's devices.
        section_only=True,
        envvar="DSMOE_QUANTIZE_DEVICE",
    ),
)
"""Adds the options of `CalibrationOptions`."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """The values of the options about calibration."""

    calibrate: str | None
    rounding: str
    calibration_tokens: int
    calibration_seed: int
    device: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Select them from the parameters of a command. UsageError for one without --calibrate."""
        found = cls(**{each.name: values[each.name] for each in fields(cls)})
        if found.calibrate is None:
            for name in _WITH_CALIBRATE:
                if from_command_line(name):
                    raise UsageError(f"{flag_of(name)} has no effect without --calibrate", remedy="add it")
        return found

    def check(self) -> None:
        """Raise, before any work, MissingExtraError without torch and UsageError for a missing device."""
        try:
            from dsmoe_quantize.calibrated.calibrator import device_of
        except ImportError as error:
            raise MissingExtraError("calibrate", error.name or "torch", "--calibrate") from error
        device_of(self.device)

    def calibration(self, model: Path) -> Calibration:
        """Read the text, and tokenize it with the model's vocabulary.

        Raises FileError and FormatError for the text, UsageError if it is too short, EngineError.
        """
        import numpy as np

        from dsmoe_local.engine.process.client import EngineClient
        from dsmoe_local.engine.types import NO_TEMPLATE, ModelOptions
        from dsmoe_local.evaluate.text import read_text
        from dsmoe_local.evaluate.windows import cut_windows
        from dsmoe_local.model.gguf_model import trained_context
        from dsmoe_quantize.calibrated.calibration import Calibration, Rounding

        text = read_text(self.calibrate or None)
        n_context = trained_context(model, WINDOW_TOKENS)
        options = ModelOptions(
            model,
            n_context=n_context,
            n_parallel=1,
            n_gpu_layers=0,
            devices=(),
            # Weights are mapped and never read: only the vocabulary is used.
            kernels="plain",
            chat_template=NO_TEMPLATE,
        )
        with EngineClient.load(options) as engine:
            try:
                windows = cut_windows(engine, text, n_context)
            except UsageError as error:
                error.remedy = "use a longer text"
                raise
        tokens = np.array(windows.tokens, np.int32)
        order = np.random.default_rng(self.calibration_seed).permutation(len(tokens))
        chosen = tokens[order[: max(1, self.calibration_tokens // n_context)]]
        rounding = Rounding(self.rounding)
        return Calibration(chosen, text.name, text.digest, rounding, self.calibration_seed)


def with_room_for_record(request: Request) -> Request:
    """Return a request for a file that is smaller by the record of a calibration in its metadata."""
    size = request.budget.size
    if size is None:
        return request
    return replace(request, budget=replace(request.budget, size=size - _RECORD_BYTES))
