"""`dsmoe pull`: download a GGUF model from the Hugging Face hub. dsmoe_convert.pull does the work."""

from __future__ import annotations

import click

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.hub_options import check_hub_options, hub_options
from dsmoe_local.cli.model_argument import models_folder
from dsmoe_local.cli.options import FLAG, option, text_value
from dsmoe_local.cli.output import show_result
from dsmoe_local.cli.progress import run_with_progress


@define_command(
    "pull",
    ("dsmoe pull unsloth/Qwen3-30B-A3B-GGUF", "Download a model of about 4 bits."),
    ("dsmoe pull unsloth/Qwen3-30B-A3B-GGUF:Q8_0", "Download the model of a type."),
)
@click.argument("source", metavar="OWNER/REPO[:TYPE]")
@hub_options
@option(
    "--as",
    "name",
    "Name that the model gets, such as when another one has the name of its file.",
    text_value("NAME"),
    default="",
)
@option("--force", "force", "Replace a file of the same name that has other content.", FLAG)
def command(source: str, revision: str | None, token: str | None, name: str, force: bool) -> None:
    """Download a GGUF model from the Hugging Face hub to the models folder.

    TYPE is the type that the file's name ends with, such as Q4_K_M, or the whole name. Without it, the model
    of about 4 bits is downloaded, preferably Q4_K_M. The address of a page on huggingface.co works, too. Run
    the same command again to continue an interrupted download. The digest of each file is checked before it
    gets its name.
    """
    from dsmoe_convert.hub import HubRequest
    from dsmoe_convert.pull import parse_source, pull
    from dsmoe_local.model.discovery import KnownModel, describe
    from dsmoe_local.model.split_name import model_stem

    check_hub_options(revision, token)
    repository, named_revision, wanted = parse_source(source)
    request = HubRequest(repository, revision or named_revision, token)
    folder, _ = models_folder()
    pulled = run_with_progress(
        lambda listen, stop: pull(request, wanted, folder, listen, stop, name=name, force=force)
    )
    name = model_stem(pulled.path)
    found = describe(KnownModel(name, pulled.path, ""))
    if found.reason:
        raise FormatError(
            f"the model is downloaded, but cannot be used: {found.reason}",
            where=pulled.path,
            remedy=f"dsmoe rm {name} deletes it",
        )
    state = "downloaded" if pulled.is_new else "is there already"
    show_result(f"{name} {state}: {found.type}, {format_size(found.n_bytes)}, {safe_line(str(pulled.path))}")
    show_result(f"chat with it: dsmoe run {name}")
