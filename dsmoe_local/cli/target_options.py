"""The options of `dsmoe quantize` that choose the bits, and the tables that explain the choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size, parse_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.configuration import from_command_line, told_origin
from dsmoe_local.cli.type_options import TypeOptions, all_of, refuse_several

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from dsmoe_quantize.budget.cost_model import Budget
    from dsmoe_quantize.budget.explanation import Offer, Reason
    from dsmoe_quantize.budget.target import Request, Target

TARGETS = ("target_size", "target_bpw", "target_bytes_per_token")
"""The parameters that are targets."""

_WITH_TARGETS = {
    "--sensitivity": "sensitivity_file",
    "--sample": "sample",
    "--max-slow-share": "max_slow_share",
    "--cpu": "cpu",
}
"""Options, and their parameters, that say nothing without a target."""

_CPUS = ("x86-avx2", "arm-dotprod", "none")

_WIDE = 120
"""Columns from which on reasons are a column of a table."""

target_options = all_of(
    click.option(
        "--target-size",
        metavar="SIZE",
        help="Choose types so that the file has this size at most, as in 9.2GiB.",
    ),
    click.option(
        "--target-bpw",
        type=click.FloatRange(1, 32),
        metavar="BITS",
        help="… so many bits per weight at most, as in 4.7.",
    ),
    click.option(
        "--target-bytes-per-token",
        metavar="SIZE",
        help="… so many bytes read to decode a token at most, as in 1.6GB.",
    ),
    click.option(
        "--max-slow-share",
        type=click.FloatRange(0, 100),
        metavar="PERCENT",
        help="… so much of what a token reads in types without fast kernels for decoding at most.",
    ),
    click.option(
        "--cpu",
        type=click.Choice(_CPUS),
        help="The kind of processor whose fast kernels count.  [default: this machine's]",
    ),
    click.option(
        "--sensitivity",
        "sensitivity_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Keep what is measured for a target here, and use what is there; of a file of another "
        "importance matrix, what errors cost alone.  [default: in the cache]",
    ),
    click.option(
        "--sample",
        type=click.IntRange(0),
        metavar="N",
        help="Try types on so many weights of each tensor; 0: on all.  [default: 262144]",
    ),
    click.option("--explain", is_flag=True, help="Say why each group of tensors gets its type."),
    click.option(
        "--recipe-out",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write the types chosen as a recipe file, to use again or to edit.",
    ),
)
"""Adds the options that `TargetOptions` has."""


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """The options as they are given."""

    target_size: str | None
    target_bpw: float | None
    target_bytes_per_token: str | None
    max_slow_share: float | None
    cpu: str | None
    sensitivity_file: Path | None
    sample: int | None
    explain: bool
    recipe_out: Path | None

    @property
    def has_target(self) -> bool:
        """Whether types are to be chosen for a budget."""
        return any(getattr(self, name) is not None for name in TARGETS)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Those among a command's parameters."""
        return cls(**{each.name: values[each.name] for each in fields(cls)})

    def check(self, types: TypeOptions) -> None:
        """UsageError if more than one thing says what the types are, or the rest does not go with it."""
        refuse_several({**types.ways, "a target": self.has_target})
        # What a variable or the config file says is for those runs that have a target.
        lonely = [
            flag
            for flag, name in _WITH_TARGETS.items()
            if getattr(self, name) is not None and from_command_line(name)
        ]
        if lonely and not self.has_target:
            raise UsageError(
                f"{lonely[0]} needs a target",
                remedy="--target-size, --target-bpw or --target-bytes-per-token",
            )
        if types.pure and types.word is None:
            raise UsageError("--pure goes with --type alone")

    def request(self) -> Request:
        """The options about a target as data. UsageError for what is no size."""
        from dsmoe_quantize.budget.cost_model import Budget
        from dsmoe_quantize.budget.fast_kernels import this_cpu
        from dsmoe_quantize.budget.target import Request

        share = self.max_slow_share
        budget = Budget(
            size=self._bytes("target_size"),
            bits_per_weight=self.target_bpw,
            bytes_per_token=self._bytes("target_bytes_per_token"),
            slow_share=None if share is None else share / 100,
        )
        return Request(budget, self._name(), self.sensitivity_file, self.sample, self.cpu or this_cpu())

    def _bytes(self, name: str) -> int | None:
        """A size that is given as text; an empty text is none."""
        text = getattr(self, name)
        with told_origin(name):
            return None if text is None else parse_size(text)

    def _name(self) -> str:
        """What the file is called after: the first budget that is given."""
        if self.target_size is not None:
            return "".join(self.target_size.split())
        if self.target_bpw is not None:
            return f"{self.target_bpw:g}bpw"
        return f"{''.join((self.target_bytes_per_token or '').split())}-per-token"


def show_offers(target: Target, budget: Budget, *, to_stderr: bool) -> None:
    """Print the trade-off around a recipe."""
    from rich.console import Console

    from dsmoe_quantize.budget.explanation import offers

    console = Console(stderr=to_stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    solved = target.solved
    console.print(_offer_table(offers(target.costs, solved, budget)))
    exact = "no recipe is better" if solved.is_optimal else f"none is below {solved.bound:.4g}"
    console.print(
        f"predicted error {solved.total.error:.4g} ({exact}), from {target.sensitivity.share:.0%} of the"
        f" weights; costs of errors: {target.costs.error_weights}",
        soft_wrap=not console.is_terminal,
    )
    console.print(f"left of the budget: {_room(target, budget)}", soft_wrap=not console.is_terminal)


def _room(target: Target, budget: Budget) -> str:
    """What is not used of each budget."""
    plan, costs = target.solved.plan, target.costs
    slow_share = target.solved.total.n_slow / costs.n_read if costs.n_read else 0.0
    parts = [
        f"{name} {1 - used / limit:.1%}"
        for name, used, limit in (
            ("size", target.solved.file_size, budget.size),
            ("bits", plan.bits_per_weight, budget.bits_per_weight),
            ("bytes per token", plan.n_bytes_per_token, budget.bytes_per_token),
            ("slow share", slow_share, budget.slow_share),
        )
        if limit
    ]
    return ", ".join(parts)


def _offer_table(offers: Sequence[Offer]) -> Table:
    table = _table("", "predicted\nerror", "weights", "bits\neach", "read per\ntoken", "no fast\nkernel")
    for each in offers:
        table.add_row(
            each.label,
            f"{each.total.error:.4g}",
            format_size(each.total.n_bytes),
            f"{each.bits_per_weight:.2f}",
            format_size(each.total.n_bytes_per_token),
            f"{each.slow_share:.0%}",
        )
    return table


def show_reasons(reasons: Sequence[Reason]) -> None:
    """Print on stdout why each group of tensors gets its type."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    if console.width >= _WIDE:
        console.print(_reason_table(reasons))
        return
    for each in reasons:
        console.print(*_reason_paragraph(each), sep="\n")


def _reason_paragraph(reason: Reason) -> Iterator[RenderableType]:
    """Where a column would leave little room for the reason."""
    from rich.padding import Padding
    from rich.text import Text

    from dsmoe_local.model.ggml import type_name

    where = f"{safe_line(reason.kind)} {_layers(reason)}".strip()
    facts = [type_name(reason.type), format_size(reason.n_bytes)]
    if reason.error_share:
        facts.append(f"{reason.error_share:.1%} of the error")
    yield Text(f"{where}: {', '.join(facts)}", style="bold")
    yield Padding(Text(reason.why), (0, 0, 0, 2))


def _layers(reason: Reason) -> str:
    """With spaces, where a line may end."""
    return reason.layers.replace(",", ", ")


def _reason_table(reasons: Sequence[Reason]) -> Table:
    from dsmoe_local.model.ggml import type_name

    is_measured = any(each.error_share for each in reasons)
    table = _table("tensors", "layers", "type", "size", "of the error" if is_measured else "", "why")
    for index in (0, 1, 2, 5):
        table.columns[index].justify = "left"
    for index in (1, 5):
        table.columns[index].no_wrap = False
    for each in reasons:
        table.add_row(
            safe_line(each.kind),
            _layers(each),
            type_name(each.type),
            format_size(each.n_bytes),
            f"{each.error_share:.1%}" if is_measured else "",
            each.why,
        )
    return table


def _table(*headings: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table
