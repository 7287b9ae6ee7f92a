"""Find model files by name: in the working folder, the models folder, the demo's, and those used recently.

The caller gives the models folder. Listing names opens no files; `describe` reads a file's header.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base.durable import make_folders, write_file
from dsmoe_local.base.errors import DsmoeError, FileError, UsageError
from dsmoe_local.base.paths import absolute, data_folder, demo_folder
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.split_name import SplitName, model_stem

MAX_RECENT = 20
IMATRIX_ENDING = ".imatrix.gguf"
"""The ending of importance matrices, which are not models but are often beside them."""

_ENDING = ".gguf"
_UNFINISHED = ".part"
_DIGITS = 12
_RECENT = "recent"
_SHOWN = 3
_REPOSITORY = re.compile(r"(?!.*\.gguf$)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model file with its name. `group` says where it was found.

    If the model is split into several files, `path` is the first.
    """

    name: str
    path: Path
    group: str


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model's size in bytes and, from its header, the name of its type, trained context and title.

    If the file cannot be used, `reason` says why, and only the size is set.
    """

    model: KnownModel
    n_bytes: int = 0
    type: str = ""
    n_context: int = 0
    title: str = ""
    reason: str = ""


def known_models(folder: Path) -> list[KnownModel]:
    """Return the model files in the working folder, in `folder` and its subfolders, the demo's, the recent.

    Recent files are listed newest first. Each model is listed once, also if it is split into several files;
    importance matrices are left out. No file is opened.
    """
    models = [
        *_models("this folder", _in_folder(Path(), "*")),
        *models_in(folder),
        *_models("demo", _in_folder(demo_folder(), "*")),
        *_models(_RECENT, recent_models()),
    ]
    found: dict[str, KnownModel] = {}
    for model in models:
        found.setdefault(os.path.realpath(model.path), model)
    return list(found.values())


def models_in(folder: Path) -> list[KnownModel]:
    """Return the models in the models folder and its subfolders. No file is opened."""
    return _models("models folder", _in_folder(folder, "*", "*/*"))


def _models(group: str, paths: Iterable[Path]) -> list[KnownModel]:
    """Return the models among `paths`: no importance matrices, and only the first file of a split model."""
    return [
        KnownModel(model_stem(path), path, group)
        for path in paths
        if not f".{path.name.casefold()}".endswith(IMATRIX_ENDING) and not _is_continued(path)
    ]


def _is_continued(path: Path) -> bool:
    """True if this is a file of a split model, but not the first."""
    split = SplitName.of(path)
    return split is not None and split.number != 1


def unfinished_path(path: Path, digest: str) -> Path:
    """Return the name of a download until it is complete. `digest` is that of its content, in hex digits."""
    return path.with_name(f".{path.name}.{digest[:_DIGITS]}{_UNFINISHED}")


def unfinished_downloads(folder: Path) -> dict[Path, list[Path]]:
    """Return the unfinished downloads in the models folder, by the path that the model will have.

    If the model is split into several files, that is the path of the first.
    """
    found: dict[Path, list[Path]] = {}
    for part in sorted(folder.glob(f".*{_ENDING}.*{_UNFINISHED}")):
        final = part.with_name(part.name[1 : -len(_UNFINISHED) - _DIGITS - 1])
        split = SplitName.of(final)
        found.setdefault(split.path(1) if split else final, []).append(part)
    return found


def _in_folder(folder: Path, *places: str) -> Iterator[Path]:
    for place in places:
        yield from sorted(path for path in folder.glob(f"{place}{_ENDING}") if _is_file(path))


def find_known(word: str, folder: Path) -> list[KnownModel]:
    """Return the models with a name, or with a unique prefix of it, in any case, with or without .gguf.

    All results have the same name; the first one is the one to use, as it comes first in `known_models`. The
    list is empty if there is none. Raises UsageError if several names match, or two files of that name in one
    group.
    """
    wanted = word.casefold()
    if wanted.endswith(_ENDING) and os.sep not in wanted:
        wanted = model_stem(Path(wanted))
    known = known_models(folder)
    matches = [model for model in known if model.name.casefold() == wanted] or [
        model for model in known if model.name.casefold().startswith(wanted)
    ]
    names = {model.name.casefold(): model.name for model in reversed(matches)}
    if len(names) > 1:
        raise UsageError(
            f"the names of {len(names)} models begin with {safe_line(word, 60)!r}",
            where=_listed(sorted(names.values())),
            remedy="type more of the name",
        )
    nearest = [model for model in matches if model.group == matches[0].group]
    if len(nearest) > 1 and nearest[0].group != _RECENT:
        raise UsageError(
            f"{len(nearest)} models are called {safe_line(word, 60)!r}",
            where=_listed([str(model.path) for model in nearest]),
            remedy="name one of them by its path",
        )
    return matches


def find_model_files(word: str, folder: Path, others: Iterable[str] = ()) -> list[Path]:
    """Return the files that a path or a name means: the one to use, then others of the same name.

    Raises UsageError for an unknown or ambiguous name, and FileError for a path that is not a file. `others`
    are words that the caller accepts besides models; the error may suggest one.
    """
    path = Path(os.path.expanduser(word))
    if os.path.exists(path) and not path.is_dir():
        return [path]
    known = find_known(word, folder)
    if known:
        return [model.path for model in known]
    if os.path.isdir(path):
        raise FileError("a folder is not a model", where=path, remedy=_use_of_folder(path))
    raise unknown_model(word, folder, others)


def _use_of_folder(folder: Path) -> str:
    inside = sorted(folder.glob("*.gguf"))
    if inside:
        return f"name a file in it, such as {inside[0]}"
    if (folder / "config.json").exists():
        return f"convert it first: dsmoe convert {folder}"
    return "there is no GGUF file in it"


def several_of_one_name(paths: Sequence[Path]) -> str:
    """Return a note about which of several files of one name is used."""
    used, *hidden = paths
    listed = safe_line(", ".join(map(str, hidden)))
    return (
        f"{len(paths)} models are called {safe_line(model_stem(used), 60)}: using {safe_line(str(used))};"
        f" to use another, give its path: {listed}"
    )


def _listed(words: list[str]) -> str:
    return ", ".join([*words[:_SHOWN], *(["…"] if len(words) > _SHOWN else [])])


def nearest_names(word: str, folder: Path, others: Iterable[str] = ()) -> list[str]:
    """Return names of known models, or of `others`, that are similar to `word`, the most similar first."""
    names = {name.casefold(): name for name in (*others, *(model.name for model in known_models(folder)))}
    near = difflib.get_close_matches(word.casefold().removesuffix(_ENDING), names, n=_SHOWN)
    return [names[name] for name in near]


def unknown_model(word: str, folder: Path, others: Iterable[str] = ()) -> UsageError | FileError:
    """Return the error for a word that is neither a file nor a known name. It suggests similar names."""
    near = nearest_names(word, folder, others)
    if os.sep in word:
        pulls = _REPOSITORY.fullmatch(word) is not None
        return FileError(
            "there is no such model",
            where=safe_line(word),
            remedy=f"if it is a repository on the Hugging Face hub, download it: dsmoe pull {word}"
            if pulls
            else "make one with dsmoe-convert, or dsmoe demo",
        )
    return UsageError(
        f"no model is called {safe_line(word, 60)!r}",
        where="" if Path(word).suffix != _ENDING else "there is no such file here either",
        remedy=f"did you mean {' or '.join(map(safe_line, near))}?" if near else "dsmoe models lists them",
    )


def recent_models() -> list[Path]:
    """Return the files that were loaded recently and still exist, the latest first."""
    try:
        listed = json.loads(_recent_path().read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(listed, list):
        return []
    paths = [Path(item) for item in listed[:MAX_RECENT] if isinstance(item, str)]
    return [path for path in paths if path.is_absolute() and _is_file(path)]


def note_use(path: Path) -> None:
    """Remember a model that was loaded. Errors while writing are ignored: the list is a convenience."""
    latest = absolute(path)
    same = os.path.realpath(latest)
    paths = [latest, *(other for other in recent_models() if os.path.realpath(other) != same)]
    target = _recent_path()
    try:
        content = json.dumps([str(each) for each in paths[:MAX_RECENT]], indent=2)
        make_folders(target.parent, 0o700)
        write_file(target, content.encode(), 0o600)
    except (OSError, UnicodeEncodeError):
        pass


def describe(model: KnownModel) -> ModelDescription:
    """Read a model's header. If the file cannot be used, the result gives the reason."""
    from dsmoe_local.model.file_type import file_type_name
    from dsmoe_local.model.gguf_model import read_any_model

    try:
        file, outline = read_any_model(model.path)
    except DsmoeError as error:
        return ModelDescription(model, size_of_files(model.path), reason=error.what)
    return ModelDescription(model, file.size, file_type_name(file), outline.n_context, outline.name)


def size_of_files(path: Path) -> int:
    """Return the size in bytes of all files of a model. A file that is missing counts as 0."""
    split = SplitName.of(path)
    return sum(map(_size, split.paths if split else [path]))


def _recent_path() -> Path:
    return data_folder() / "recent.json"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
