"""Options of the commands that download from a Hugging Face hub."""

from __future__ import annotations

from dsmoe_local.base.errors import UsageError
from dsmoe_local.cli.options import Group, all_of, option, text_value

hub_options = all_of(
    option(
        "--revision",
        "revision",
        "Branch, tag or commit of the repository.",
        text_value("REV"),
        Group.INPUT,
    ),
    option(
        "--token",
        "token",
        "Access token of the hub.",
        text_value("TOKEN"),
        Group.INPUT,
        secret=True,
        shown="HF_TOKEN",
    ),
)
"""Adds --revision and --token to a command."""


def check_hub_options(revision: str | None, token: str | None) -> None:
    """Raise UsageError if an option is empty, most likely because a variable in the command line was."""
    for name, value in (("--revision", revision), ("--token", token)):
        if value == "":
            raise UsageError(f"{name} is empty", remedy="leave it out, or check the variable it came from")
