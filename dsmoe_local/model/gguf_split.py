"""Read the headers of a model that may be split into several files, and check that they belong together.

The first file has the metadata. Every file has the keys split.no (from 0), split.count, and
split.tensors.count (the tensors of all files). llama.cpp finds the other files by the name of the first, and
checks only split.no.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gguf.constants import GGUFValueType

from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.gguf_file import GgufFile, TensorInfo, read_gguf
from dsmoe_local.model.split_name import SplitName

NUMBER, COUNT, N_TENSORS = "split.no", "split.count", "split.tensors.count"

KEY_TYPES = {NUMBER: GGUFValueType.UINT16, COUNT: GGUFValueType.UINT16, N_TENSORS: GGUFValueType.INT32}
"""The keys of split models, and the only types in which llama.cpp accepts them."""

_TOGETHER = "all files of the model must be in one folder, as they were downloaded"


def read_parts(path: Path) -> GgufFile:
    """Return the header of the model in `path`, which is its only or its first file.

    The result has no `split.*` keys. Raises FileError if a file cannot be read; FormatError if a file is
    malformed, is not the first, or does not belong to the model.
    """
    first = read_gguf(path)
    count = _number(first, COUNT) if COUNT in first.metadata else 1
    # Files that were merged from several have the count 0.
    if count < 2:
        return _without_keys(first)
    number = _number(first, NUMBER)
    name = SplitName.of(path)
    if number != 0:
        raise FormatError(
            f"this is file {number + 1} of the {count} files of a model",
            where=path,
            remedy=f"name the first one{f', {safe_line(name.path(1).name)}' if name else ''}",
        )
    if name is None or (name.number, name.count) != (1, count):
        raise FormatError(
            f"this is the first of {count} files of a model, but its name does not say so",
            where=path,
            remedy=f"rename it to NAME-00001-of-{count:05}.gguf: the others are found by this name",
        )
    others = [_read_part(first, name, index) for index in range(1, count)]
    return _joined(first, others, _number(first, N_TENSORS))


def _read_part(first: GgufFile, name: SplitName, index: int) -> GgufFile:
    path = name.path(index + 1)
    try:
        part = read_gguf(path)
    except FileError as error:
        raise FileError(
            f"file {index + 1} of the {name.count} files of the model: {error.what}",
            where=path,
            remedy=_TOGETHER,
        ) from error
    expected = {NUMBER: index, COUNT: name.count, N_TENSORS: _number(first, N_TENSORS)}
    for key, value in expected.items():
        if (found := _number(part, key)) != value:
            raise FormatError(
                f"the file belongs to another model, or to another place: {key} = {found}, not {value}",
                where=path,
                remedy=_TOGETHER,
            )
    return part


def _joined(first: GgufFile, others: list[GgufFile], n_tensors: int) -> GgufFile:
    tensors: dict[str, TensorInfo] = dict(first.tensors)
    for index, part in enumerate(others, 1):
        for name, info in part.tensors.items():
            if name in tensors:
                raise FormatError(
                    f"the tensor {safe_line(name, 60)} is in two files of the model",
                    where=part.path,
                    remedy=_TOGETHER,
                )
            tensors[name] = replace(info, part=index)
    if len(tensors) != n_tensors:
        raise FormatError(
            f"the files of the model have {len(tensors)} tensors, not {n_tensors}",
            where=first.path,
            remedy="download them again",
        )
    parts = (*first.parts, *(part.parts[0] for part in others))
    return replace(_without_keys(first), tensors=tensors, parts=parts)


def _without_keys(file: GgufFile) -> GgufFile:
    metadata = {key: field for key, field in file.metadata.items() if key not in KEY_TYPES}
    return replace(file, metadata=metadata)


def _number(file: GgufFile, key: str) -> int:
    field = file.metadata.get(key)
    kind = KEY_TYPES[key]
    if field is None or field.type is not kind:
        raise FormatError(
            f"{key} is missing"
            if field is None
            else f"{key} has the type {field.type.name}, not {kind.name}",
            where=file.path,
            remedy="download all files of the model again",
        )
    return int(field.value)
