"""Packs numpy arrays into plain JSON values, for observations too large for lists of numbers."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.errors import FormatError

_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("int16", "int64", "float32")}


def pack(array: npt.NDArray[Any], dtype: str) -> dict[str, Any]:
    """Return an array as a JSON value. `dtype` is int16, int64 or float32."""
    values = np.ascontiguousarray(array, _DTYPES[dtype])
    return {
        "dtype": dtype,
        "shape": list(values.shape),
        "base64": base64.b64encode(values.tobytes()).decode(),
    }


def unpack(value: dict[str, Any]) -> npt.NDArray[Any]:
    """Return the array of a packed value. Raises FormatError."""
    try:
        raw = base64.b64decode(value["base64"], validate=True)
        return np.frombuffer(raw, _DTYPES[value["dtype"]]).reshape(value["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError("not a packed array") from error
