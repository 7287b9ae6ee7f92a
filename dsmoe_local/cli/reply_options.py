"""The options that say what replies are like, for every command that generates, and what they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.cli.configuration import choose_preset, complete_preset, told_origin
from dsmoe_local.cli.model_options import add_options
from dsmoe_local.engine.parameters import SamplingParameters

F = TypeVar("F", bound=Callable[..., Any])

_NO_LIMIT = -1
_NEW_SEED = -1
_DEFAULTS = SamplingParameters()


def _sampling(*flags: str, about: str) -> Callable[[F], F]:
    """The option for the sampling parameter that the last of `flags` names."""
    default: float = getattr(_DEFAULTS, flags[-1])
    kind = type(default)
    metavar = "X" if kind is float else "N"
    return click.option(*flags, type=kind, default=default, metavar=metavar, help=f"{about} [{default:g}].")


_OPTIONS = [
    click.option(
        "-n",
        "--predict",
        "--n-predict",
        "--max-tokens",
        "max_tokens",
        type=int,
        default=_NO_LIMIT,
        metavar="N",
        help="Longest reply in tokens [-1: no limit].",
    ),
    click.option(
        "-r",
        "--reverse-prompt",
        "--stop",
        "stop",
        multiple=True,
        metavar="TEXT",
        help="End replies before TEXT. Repeatable.",
    ),
    _sampling("--temp", "--temperature", "temperature", about="Temperature; 0 is greedy"),
    _sampling("--top-k", "top_k", about="Sample among the N likeliest; 0 = all"),
    _sampling("--top-p", "top_p", about="Nucleus sampling; 1 = off"),
    _sampling("--min-p", "min_p", about="Least share of the likeliest; 0 = off"),
    _sampling("--typical", "--typical-p", "typical_p", about="Locally typical; 1 = off"),
    _sampling("--repeat-penalty", "repeat_penalty", about="1 = off"),
    _sampling("--repeat-last-n", "repeat_last_n", about="Penalties look back N"),
    _sampling("--presence-penalty", "presence_penalty", about="0 = off"),
    _sampling("--frequency-penalty", "frequency_penalty", about="0 = off"),
    _sampling("--mirostat", "mirostat", about="1 or 2: hold the surprise steady; 0 = off"),
    _sampling("--mirostat-ent", "--mirostat-tau", "mirostat_tau", about="The surprise it holds"),
    _sampling("--mirostat-lr", "--mirostat-eta", "mirostat_eta", about="How fast it learns"),
    click.option(
        "-s",
        "--seed",
        "seed",
        type=int,
        default=_NEW_SEED,
        metavar="N",
        help="Seed; -1 = a new one each time [-1].",
    ),
    click.option(
        "--preset",
        "preset",
        metavar="NAME",
        is_eager=True,
        expose_value=False,
        callback=choose_preset,
        shell_complete=complete_preset,
        help="Settings kept under a name: /set save NAME in a chat. Other flags count more.",
    ),
]


def reply_options(function: F) -> F:
    """Add the options that say how long replies are and how their tokens are chosen."""
    return add_options(function, _OPTIONS)


def reply_limit(max_tokens: int) -> int | None:
    """The longest reply; None for no limit. UsageError out of range."""
    if max_tokens == _NO_LIMIT:
        return None
    if max_tokens < 1:
        with told_origin("max_tokens"):
            raise UsageError(
                f"-n {max_tokens} is out of range", remedy="it takes 1 or more, or -1 for no limit"
            )
    return max_tokens


def check_stop(stop: tuple[str, ...]) -> None:
    """UsageError for an empty -r: nothing would ever be generated."""
    if not all(stop):
        raise UsageError("-r: the stop text is empty", remedy="leave it out")


def sampling_parameters(values: dict[str, Any]) -> SamplingParameters:
    """The sampling that options ask for; takes its own options out of `values`. UsageError out of range."""
    given = {item.name: values.pop(item.name) for item in fields(SamplingParameters)}
    if given["seed"] == _NEW_SEED:
        given["seed"] = None
    for name, value in given.items():
        with told_origin(name):
            SamplingParameters(**{name: value})
    return SamplingParameters(**given)
