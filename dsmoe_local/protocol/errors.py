"""The error of an invalid request, and the code and message that a client gets for any error."""

from __future__ import annotations

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.text import safe_line


class RequestError(DsmoeError):
    """A request is not valid. `param` is the field at fault, if it is a single one; `kind` groups errors in
    the summary of a batch.
    """

    def __init__(
        self, what: str, *, remedy: str = "", kind: str = "invalid_request", param: str | None = None
    ) -> None:
        super().__init__(what, remedy=remedy)
        self.kind = kind
        self.param = param


def describe(error: DsmoeError) -> tuple[str, str]:
    """Return the code of an error, such as `prompt_error`, and its message on one line."""
    code = "invalid_request" if isinstance(error, RequestError | UsageError) else _code(error)
    return code, "; ".join(safe_line(line, 400) for line in str(error).splitlines())


def _code(error: DsmoeError) -> str:
    name = type(error).__name__.removesuffix("Error")
    return (
        "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_") + "_error"
    )
