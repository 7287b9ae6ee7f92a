"""The web page at `/`: one HTML file, which uses the server's own API."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

_PAGE = Path(__file__).with_name("page.html")


async def show(http: Request) -> Response:
    """GET /: the page."""
    body, headers = _page()
    return Response(body, media_type="text/html", headers=headers)


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    """Return the page and its headers.

    The policy allows its one script and one style sheet, by their digests, and requests to this server. It
    forbids the script to make elements from text (`require-trusted-types-for`): text of a model stays text.
    """
    # Browsers normalize newlines before they compute the digests. Git may have written CRLF.
    body = _PAGE.read_bytes().replace(b"\r\n", b"\n")
    policy = {
        "default-src": "'none'",
        "script-src": _digest(body, b"script"),
        "style-src": _digest(body, b"style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return body, {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }


def _digest(body: bytes, tag: bytes) -> str:
    """Return the digest of the content of the only element `tag`, as a source of the policy."""
    content = body.partition(b"<" + tag + b">")[2].partition(b"</" + tag + b">")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
