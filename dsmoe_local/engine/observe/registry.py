"""The observers by name, with their parameters checked. What each of them does is its own module's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.native import Model
from dsmoe_local.engine.observe.activations import Activations
from dsmoe_local.engine.observe.divergence import Divergence
from dsmoe_local.engine.observe.logprobs import Logprobs
from dsmoe_local.engine.observe.observer import Observer
from dsmoe_local.engine.observe.reference import Reference
from dsmoe_local.engine.observe.routing import Routing
from dsmoe_local.engine.observe.routing_divergence import RoutingDivergence
from dsmoe_local.engine.observe.routing_reference import RoutingReference
from dsmoe_local.engine.types import ObserverOptions
from dsmoe_local.model.hyperparameters import Hyperparameters


@dataclass(frozen=True, slots=True)
class Entry:
    """One observer, made of a model, its hyper-parameters, and parameters of these types by keyword."""

    kind: type[Observer]
    parameters: Mapping[str, type] = field(default_factory=dict)
    required: tuple[str, ...] = ()


OBSERVERS: Mapping[str, Entry] = {
    "activations": Entry(Activations),
    "divergence": Entry(Divergence, {"path": str}, ("path",)),
    "logprobs": Entry(Logprobs),
    "reference": Entry(Reference, {"path": str, "top": int, "mass": float}, ("path",)),
    "routing": Entry(Routing, {"trace": int}),
    "routing_divergence": Entry(RoutingDivergence, {"path": str}, ("path",)),
    "routing_reference": Entry(RoutingReference, {"path": str}, ("path",)),
}


def check_observers(options: Sequence[ObserverOptions]) -> None:
    """UsageError for an observer or parameter that does not exist or is given twice. Needs no model."""
    names = [option.name for option in options]
    for option in options:
        if option.name not in OBSERVERS:
            raise UsageError(
                f"there is no observer {safe_line(option.name, 40)!r}",
                remedy=f"known: {', '.join(OBSERVERS)}",
            )
        if names.count(option.name) > 1:
            raise UsageError(f"the observer {option.name} is given twice")
        _check_parameters(option)


def _check_parameters(option: ObserverOptions) -> None:
    entry = OBSERVERS[option.name]
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
                remedy=f"it takes one value of the type {wanted.__name__}",
            )
    for name in entry.required:
        if name not in given:
            raise UsageError(f"the observer {option.name} needs the parameter {name!r}")


def make_observer(option: ObserverOptions, model: Model, hp: Hyperparameters) -> Observer:
    """The observer of options that were checked, for a loaded model. Raises UsageError, FileError,
    FormatError.
    """
    make: Callable[..., Observer] = OBSERVERS[option.name].kind
    return make(model, hp, **dict(option.parameters))


def n_outputs(options: Sequence[ObserverOptions], n_ubatch: int, n_sequences: int) -> int:
    """Rows of logits that a step may have: of all tokens if an observer scores prompts, else one each."""
    scores = any(OBSERVERS[option.name].kind.reads_logits for option in options)
    return max(n_ubatch, n_sequences) if scores else n_sequences
