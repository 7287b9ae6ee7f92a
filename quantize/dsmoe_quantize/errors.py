"""Errors of the quantizer, as branches of the base error tree.

DsmoeError
 ├─ UsageError
 │   └─ RequantizeError     the source is quantized already, and --allow-requantize was not given
 ├─ FormatError
 │   └─ WeightError         a weight that cannot be stored: NaN, infinite, or too large for the type
 └─ KernelError             ggml's library is missing or unusable
"""

from __future__ import annotations

from dsmoe_local.base.errors import DsmoeError, FormatError, UsageError


class KernelError(DsmoeError):
    """ggml's library is missing or unusable."""


class RequantizeError(UsageError):
    """The source is quantized already, and --allow-requantize was not given."""


class WeightError(FormatError):
    """A weight that cannot be stored: NaN, infinite, or too large for the type.

    `tensor` and `index` say where it is, so that a caller can translate them into its own names.
    """

    def __init__(self, what: str, *, tensor: str, index: tuple[int, ...], remedy: str = "") -> None:
        super().__init__(what, where=f"{tensor}[{', '.join(map(str, index))}]", remedy=remedy)
        self.tensor = tensor
        self.index = index
