"""Finds observers by name, checks their parameters and creates them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.observe.activations import ActivationObserver
from dsmoe_local.engine.observe.logprobs import LogprobObserver
from dsmoe_local.engine.observe.observer import Observer
from dsmoe_local.engine.observe.routing import RoutingObserver
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.model.architectures import no_table
from dsmoe_local.model.hyperparameters import Hyperparameters, ModelOutline

if TYPE_CHECKING:
    from dsmoe_local.engine.native import Model


@dataclass(frozen=True, slots=True)
class Entry:
    """An observer's class, the types of its parameters by name, and the names of the required ones.

    The class is called with the model, its outline, and the parameters by keyword.
    """

    kind: type[Observer]
    parameters: Mapping[str, type] = field(default_factory=dict)
    required: tuple[str, ...] = ()


OBSERVERS: Mapping[str, Entry] = {
    "activations": Entry(ActivationObserver),
    "logprobs": Entry(LogprobObserver),
    "routing": Entry(RoutingObserver, {"trace": int}),
}
"""The engine's own observers. A module that `ObserverOptions.module` names has a table like this one."""


def _entry(option: ObserverOptions) -> Entry:
    """Return the table entry of an observer. Raises UsageError if its module or name is unknown."""
    known = OBSERVERS
    if option.module is not None:
        try:
            known = importlib.import_module(option.module).OBSERVERS
        except (ImportError, AttributeError) as error:
            raise UsageError(f"{safe_line(option.module, 80)} is not a module with observers") from error
    if option.name not in known:
        raise UsageError(
            f"there is no observer {safe_line(option.name, 40)!r}", remedy=f"known: {', '.join(known)}"
        )
    return known[option.name]


def check_observers(options: Sequence[ObserverOptions]) -> None:
    """Raise UsageError for an unknown or repeated observer, or a wrong parameter. Needs no model."""
    names = [option.name for option in options]
    for option in options:
        entry = _entry(option)
        if names.count(option.name) > 1:
            raise UsageError(f"the observer {option.name} is given twice", remedy="give it once")
        _check_parameters(option, entry)


def _check_parameters(option: ObserverOptions, entry: Entry) -> None:
    given = [name for name, _ in option.parameters]
    for name, value in option.parameters:
        wanted = entry.parameters.get(name)
        if wanted is None:
            raise UsageError(
                f"the observer {option.name} takes no {safe_line(name, 40)!r}",
                remedy=f"it takes {', '.join(entry.parameters) or 'no parameters'}",
            )
        if given.count(name) > 1 or type(value) is not wanted:
            raise UsageError(
                f"{option.name}: {name} = {safe_line(str(value), 40)} is not valid",
                remedy=f"give one value of the type {wanted.__name__}",
            )
    for name in entry.required:
        if name not in given:
            raise UsageError(f"the observer {option.name} needs the parameter {name!r}")


def check_supported(
    options: Sequence[ObserverOptions], outline: ModelOutline, where: str | Path = ""
) -> None:
    """Raise UsageError if an observer needs Hyperparameters, and the model has none. `where` is its file."""
    for option in options:
        purpose = _entry(option).kind.needs_table
        if purpose and not isinstance(outline, Hyperparameters):
            raise no_table(purpose, outline.architecture, where)


def make_observer(option: ObserverOptions, model: Model, outline: ModelOutline) -> Observer:
    """Create an observer from checked options. Raises UsageError, FileError, FormatError."""
    check_supported([option], outline)
    make: Callable[..., Observer] = _entry(option).kind
    return make(model, outline, **dict(option.parameters))


ECHO_ROWS = 64
"""Rows of logits for prompts that requests score themselves. They take 50 MB for a 16B model."""


def n_outputs(
    options: Sequence[ObserverOptions], n_ubatch: int, n_sequences: int, *, scores_prompts: bool
) -> int:
    """Return the largest number of rows of logits in a step.

    There is one for each sequence. An observer that reads the logits of prompts needs one for each token.
    With `scores_prompts`, requests that score their prompts are processed in steps of ECHO_ROWS tokens.
    """
    if any(_entry(option).kind.reads_logits for option in options):
        return max(n_ubatch, n_sequences)
    return max(min(n_ubatch, ECHO_ROWS), n_sequences) if scores_prompts else n_sequences
