"""`dsmoe rm`: delete a model, or an unfinished download, from the models folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from dsmoe_local.base.durable import locked, same_file, sync_folder
from dsmoe_local.base.errors import DsmoeError, FileError, UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import models_folder
from dsmoe_local.cli.options import FLAG, option
from dsmoe_local.cli.output import show_result
from dsmoe_local.model.split_name import SplitName, model_stem


@dataclass(frozen=True, slots=True)
class _Removal:
    """The files to delete, in this order, of the model `path`, or of its unfinished download."""

    path: Path
    paths: Sequence[Path]
    is_unfinished: bool = False

    @property
    def n_bytes(self) -> int:
        """What the files occupy; a link does not count with its target."""
        return sum(path.lstat().st_size for path in self.paths)

    @property
    def what(self) -> str:
        """The model in words."""
        kind = "the unfinished download of " if self.is_unfinished else ""
        files = f"{len(self.paths)} files, " if len(self.paths) > 1 else ""
        name, folder = safe_line(model_stem(self.path), 80), safe_line(str(self.path.parent))
        return f"{kind}{name} ({files}{format_size(self.n_bytes)}, in {folder})"


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of the models in the models folder."""
    from dsmoe_local.model.discovery import models_in

    if os.sep in incomplete:
        return [CompletionItem(incomplete, type="file")]
    try:
        names = [model.name for model in models_in(models_folder()[0])]
    except DsmoeError:
        # The config file is broken. The command itself will report it.
        return []
    return [CompletionItem(name) for name in names if name.casefold().startswith(incomplete.casefold())]


@define_command("rm", ("dsmoe rm Qwen3-30B-A3B-Q4_K_M", "Delete a model after asking."))
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=_complete)
@option("-y, --yes", "yes", "Do not ask.", FLAG)
def command(names: tuple[str, ...], yes: bool) -> None:
    """Delete models from the models folder, with all files of a split model.

    NAME is a whole name as `dsmoe models` lists it, or a path in that folder. An unfinished download is
    deleted by the name that the model would have. Files elsewhere are never deleted.
    """
    folder, _ = models_folder()
    # A model that is named twice is deleted once.
    removals = {found.path: found for found in [_find(name, folder) for name in names]}
    for removal in removals.values():
        if not yes:
            if not _has_terminal():
                raise UsageError("there is no terminal to ask in", remedy="--yes deletes without asking")
            if not click.confirm(f"Delete {removal.what}?", err=True):
                show_result("nothing was deleted")
                continue
        what = removal.what
        with locked(removal.path):
            for path in removal.paths:
                path.unlink(missing_ok=True)
                sync_folder(path.parent)
        show_result(f"deleted {what}")


def _has_terminal() -> bool:
    return sys.stdin.isatty()


def _find(word: str, folder: Path) -> _Removal:
    """Return what to delete. UsageError if nothing or more than one model has that name."""
    from dsmoe_local.model.discovery import known_models, models_in, unfinished_downloads, unknown_model

    wanted = word.casefold().removesuffix(".gguf")
    typed = Path(os.path.expanduser(word))
    # Not through links: a folder in the models folder may be elsewhere.
    inside = [model for model in models_in(folder) if _is_within(model.path, folder)]
    found = [model for model in inside if os.sep in word and same_file(model.path, typed)] or [
        model for model in inside if model.name.casefold() == wanted
    ]
    if len(found) > 1:
        paths = ", ".join(str(model.path) for model in found)
        raise UsageError(
            f"{len(found)} models are called {safe_line(word, 60)!r}",
            where=paths,
            remedy="name one of them by its path",
        )
    if found:
        split = SplitName.of(found[0].path)
        # The first file is deleted last: until then, the model is listed and can be deleted again.
        files = reversed(split.paths) if split else [found[0].path]
        return _Removal(found[0].path, [path for path in files if os.path.lexists(path)])
    for final, parts in unfinished_downloads(folder).items():
        if model_stem(final).casefold() == wanted:
            return _Removal(final, parts, is_unfinished=True)
    for model in known_models(folder):
        if model.name.casefold() == wanted or same_file(model.path, typed):
            raise FileError(
                "the model is not in the models folder, and only files there are deleted",
                where=model.path,
                remedy="delete the file itself if nothing needs it",
            )
    raise unknown_model(word, folder)


def _is_within(path: Path, folder: Path) -> bool:
    """True if a file's real folder is the models folder or inside it."""
    return path.parent.resolve().is_relative_to(folder.resolve())
