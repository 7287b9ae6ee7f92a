"""This package's branches of the error tree.

FormatError
 ├─ CheckpointError    the weights: a shard, the index, a tensor that is missing, extra or has another shape
 └─ TokenizerError     tokenizer.json and the files that belong to it
FileError
 └─ HubError           a model repository cannot be reached, or lacks a file
"""

from __future__ import annotations

from dsmoe_local.base.errors import FileError, FormatError


class CheckpointError(FormatError):
    """The weights of a checkpoint are malformed, incomplete or not supported."""


class TokenizerError(FormatError):
    """A checkpoint's tokenizer is malformed, or llama.cpp has no equivalent."""


class HubError(FileError):
    """A model repository cannot be reached, or lacks a file."""
