"""This package's branches of the error tree.

FormatError
 ├─ CheckpointError    the weights: a shard, the index, a tensor that is missing, extra or misshapen
 └─ TokenizerError     tokenizer.json and its companions
FileError
 └─ HubError           a model repository cannot be reached, or does not have what is needed
"""

from __future__ import annotations

from dsmoe_local.base.errors import FileError, FormatError


class CheckpointError(FormatError):
    """The weights of a checkpoint are malformed, incomplete or of a kind that is not supported."""


class TokenizerError(FormatError):
    """A checkpoint's tokenizer is malformed, or llama.cpp has no counterpart for it."""


class HubError(FileError):
    """A model repository cannot be reached, or does not have what is needed."""
