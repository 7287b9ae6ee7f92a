"""Options of `dsmoe quantize` for a target, such as a size, and the tables that explain the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size, parse_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.option_sources import flag_of, from_command_line, source_in_errors
from dsmoe_local.cli.options import FILE, FLAG, Group, all_of, choice, option, text_value, typed
from dsmoe_local.cli.output import console, plain_table
from dsmoe_local.cli.type_options import TypeOptions

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from dsmoe_quantize.budget.cost_model import Budget
    from dsmoe_quantize.budget.explanation import Reason, TradeOff
    from dsmoe_quantize.budget.target import Request, Target

TARGETS = ("target_size", "target_bpw", "target_bytes_per_token")
"""The parameters that are targets."""

_WITH_TARGETS = ("sensitivity_file", "sample", "max_slow_share", "min_prompt_speed", "cpu")
"""Parameters that have no effect without a target."""

_CPUS = ("x86-avx2", "arm-dotprod", "none")

_LEAST_BYTES = 10_000
"""No target is smaller: such a number lacks its unit."""

_LEAST_WITH_SPEEDS = 80
"""The least columns for a trade-off with predicted speeds."""

_WIDE = 120
"""The least columns for a table with reasons."""

_TARGET = Group.TARGET

target_options = all_of(
    option(
        "--target-size",
        "target_size",
        "Choose the types for a file of at most this size, such as 9.2GiB.",
        text_value("SIZE"),
        _TARGET,
    ),
    option(
        "--target-bpw",
        "target_bpw",
        "Choose them for at most this many bits per weight, such as 4.7.",
        typed(click.FloatRange(1, 32), "BITS"),
        _TARGET,
    ),
    option(
        "--target-bytes-per-token",
        "target_bytes_per_token",
        "Choose them for at most this many bytes read per decoded token, such as 1.6GB.",
        text_value("SIZE"),
        _TARGET,
    ),
    option(
        "--max-slow-share",
        "max_slow_share",
        "Limit the share of bytes per token in types without a fast kernel.",
        typed(click.FloatRange(0, 100), "PERCENT"),
        _TARGET,
    ),
    option(
        "--min-prompt-speed",
        "min_prompt_speed",
        "Least predicted speed of prompts, relative to Q4_K_M: 1.2 is a fifth faster.",
        typed(click.FloatRange(0.1, 10), "RATIO"),
        _TARGET,
    ),
    option(
        "--cpu",
        "cpu",
        "Kind of CPU for the two options above.",
        choice(*_CPUS),
        _TARGET,
        shown="this machine's",
    ),
    option(
        "--sensitivity",
        "sensitivity_file",
        "File with the measured error of each type; missing errors are measured and added. Also accepts"
        " the result of dsmoe eval --sensitivity.",
        FILE,
        _TARGET,
        shown="in the cache",
    ),
    option(
        "--sample",
        "sample",
        "Number of weights of each tensor to measure; 0 = all.",
        typed(click.IntRange(0), "N"),
        _TARGET,
        # dsmoe_quantize.budget.sensitivity.SAMPLE. None, so that a file with another sample can be used.
        shown="262144",
    ),
    option("--explain", "explain", "Explain the type of each group of tensors.", FLAG, _TARGET),
    option("--recipe-out", "recipe_out", "Write the chosen types as a recipe file.", FILE, _TARGET),
)
"""Adds the options of `TargetOptions`."""


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """The values of the options about a target."""

    target_size: str | None
    target_bpw: float | None
    target_bytes_per_token: str | None
    max_slow_share: float | None
    min_prompt_speed: float | None
    cpu: str | None
    sensitivity_file: Path | None
    sample: int | None
    explain: bool
    recipe_out: Path | None

    @property
    def has_target(self) -> bool:
        """True if a target is given."""
        return any(getattr(self, name) is not None for name in TARGETS)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Select them from the parameters of a command."""
        return cls(**{each.name: values[each.name] for each in fields(cls)})

    def check(self, types: TypeOptions) -> None:
        """Raise UsageError for options that need others."""
        # From a variable or the config file, they are meant for runs with a target.
        alone = [name for name in _WITH_TARGETS if from_command_line(name)]
        if alone and not self.has_target:
            raise UsageError(
                f"{flag_of(alone[0])} needs a target", remedy=f"give {' or '.join(map(flag_of, TARGETS))}"
            )
        if types.pure and types.word is None:
            raise UsageError("--pure needs --type", remedy="leave --pure out")

    def request(self) -> Request:
        """Return the options as data. UsageError for a size that cannot be read."""
        from dsmoe_quantize.budget.cost_model import Budget
        from dsmoe_quantize.budget.kernel_speeds import this_cpu
        from dsmoe_quantize.budget.target import Request

        share = self.max_slow_share
        budget = Budget(
            size=self._bytes("target_size"),
            bits_per_weight=self.target_bpw,
            bytes_per_token=self._bytes("target_bytes_per_token"),
            slow_share=None if share is None else share / 100,
            prompt_speed=self.min_prompt_speed,
        )
        return Request(budget, self._name(), self.sensitivity_file, self.sample, self.cpu or this_cpu())

    def _bytes(self, name: str) -> int | None:
        """Read the size that an option gives."""
        text: str | None = getattr(self, name)
        if text is None:
            return None
        with source_in_errors(name):
            return parse_size(text, _LEAST_BYTES)

    def _name(self) -> str:
        """Return the part of the output's name that states the target."""
        if self.target_size is not None:
            return "".join(self.target_size.split())
        if self.target_bpw is not None:
            return f"{self.target_bpw:g}bpw"
        return f"{''.join((self.target_bytes_per_token or '').split())}-per-token"


def show_offers(target: Target, budget: Budget, *, to_stderr: bool) -> None:
    """Print the recipe that was found, and cheaper and better ones beside it."""
    from dsmoe_quantize.budget.explanation import trade_offs

    out = console(file_columns=160, stderr=to_stderr)
    solved = target.solved
    found = trade_offs(target.costs, solved, budget)
    with_speeds = found[0].speeds is not None and out.width >= _LEAST_WITH_SPEEDS
    out.print(_offer_table(found, with_speeds=with_speeds))
    exact = "no recipe is better" if solved.is_optimal else f"none is below {solved.bound:.4g}"
    out.print(
        f"predicted error {solved.total.error:.4g} ({exact}), from {target.sensitivity.share:.0%} of the"
        f" weights; costs of errors: {target.costs.error_weights}",
        soft_wrap=not out.is_terminal,
    )
    out.print(f"left of the budget: {_room(target, budget)}", soft_wrap=not out.is_terminal)


def _room(target: Target, budget: Budget) -> str:
    """Return the unused share of each limit, in words."""
    plan, costs = target.solved.plan, target.costs
    slow_share = target.solved.total.n_slow / costs.n_read if costs.n_read else 0.0
    speeds = costs.speeds(target.solved.total)
    parts = [
        f"{name} {1 - used / limit:.1%}"
        for name, used, limit in (
            ("size", target.solved.file_size, budget.size),
            ("bits", plan.bits_per_weight, budget.bits_per_weight),
            ("bytes per token", plan.n_bytes_per_token, budget.bytes_per_token),
            ("slow share", slow_share, budget.slow_share),
            ("prompt speed", budget.prompt_speed or 0, speeds and budget.prompt_speed and speeds[0]),
        )
        if limit
    ]
    return ", ".join(parts)


def _offer_table(trade_offs: Sequence[TradeOff], *, with_speeds: bool) -> Table:
    table = plain_table(
        "",
        "predicted\nerror",
        "weights",
        "bits\neach",
        "read per\ntoken",
        "slow\nshare",
        *(("prompt\nspeed", "decode\nspeed") if with_speeds else ()),
        left=("",),
    )
    for each in trade_offs:
        table.add_row(
            each.label,
            f"{each.total.error:.4g}",
            format_size(each.total.n_bytes),
            f"{each.bits_per_weight:.2f}",
            format_size(each.total.n_bytes_per_token),
            f"{each.slow_share:.0%}",
            *(f"{speed:.2f} x" for speed in (each.speeds or ()) if with_speeds),
        )
    return table


def show_reasons(reasons: Sequence[Reason]) -> None:
    """Print on stdout why each group of tensors gets its type."""
    out = console(file_columns=200)
    if out.width >= _WIDE:
        out.print(_reason_table(reasons))
        return
    for each in reasons:
        out.print(*_reason_paragraph(each), sep="\n")


def _reason_paragraph(reason: Reason) -> Iterator[RenderableType]:
    """Return a reason as a paragraph, for terminals too narrow for the table."""
    from rich.padding import Padding
    from rich.text import Text

    where = f"{safe_line(reason.kind)} {_layers(reason)}".strip()
    facts = [reason.type.name, format_size(reason.n_bytes)]
    if reason.error_share:
        facts.append(f"{reason.error_share:.1%} of the error")
    yield Text(f"{where}: {', '.join(facts)}", style="bold")
    yield Padding(Text(reason.why), (0, 0, 0, 2))


def _layers(reason: Reason) -> str:
    """Return the layers, with spaces so that lines can wrap."""
    return reason.layers.replace(",", ", ")


def _reason_table(reasons: Sequence[Reason]) -> Table:
    is_measured = any(each.error_share for each in reasons)
    headings = ("tensors", "layers", "type", "size", "of the error" if is_measured else "", "why")
    table = plain_table(*headings, left=("tensors", "type"), wrap=("layers", "why"))
    for each in reasons:
        table.add_row(
            safe_line(each.kind),
            _layers(each),
            each.type.name,
            format_size(each.n_bytes),
            f"{each.error_share:.1%}" if is_measured else "",
            each.why,
        )
    return table
