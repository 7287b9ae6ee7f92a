"""Names of the files of a split model, such as NAME-00001-of-00003.gguf: llama.cpp finds files by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MAX_FILES = 500
"""The most files of a model: llama.cpp keeps all open, and most systems let a process open 1024."""

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL | re.ASCII)


@dataclass(frozen=True, slots=True)
class SplitName:
    """The name of a file of a split model. `number` counts from 1."""

    folder: Path
    name: str
    number: int
    count: int

    @classmethod
    def of(cls, path: Path) -> SplitName | None:
        """Return the parts of a file's name; None if it is not that of a file of a split model."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        number, count = int(match[2]), int(match[3])
        return cls(path.parent, match[1], number, count) if 0 < number <= count <= MAX_FILES else None

    def path(self, number: int) -> Path:
        """Return the path of another file of the same model."""
        return self.folder / f"{self.name}-{number:05}-of-{self.count:05}.gguf"

    @property
    def paths(self) -> list[Path]:
        """The paths of all files."""
        return [self.path(number) for number in range(1, self.count + 1)]


def model_stem(path: Path) -> str:
    """Return the name of a model by the name of its file, or of its first file, without the ending."""
    split = SplitName.of(path)
    return split.name if split else path.stem
