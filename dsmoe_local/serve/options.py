"""Options of the server, and which of them go together."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from dsmoe_local.base.errors import UsageError
from dsmoe_local.protocol.requests import RequestDefaults


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to serve. Sizes are in bytes, times in seconds.

    - `allowed_hosts`: names under which browsers may reach the server, besides addresses and localhost.
    - `cors_origins`: web pages that may use the API; `*` means all.
    - `max_queued`: replies that may wait for a slot; more are refused.
    - `max_seconds` limits a request, `body_seconds` the upload of its body.
    - `stall_seconds`: a client that reads nothing for so long is dropped.
    - `grace`: how long running requests may go on after SIGTERM.
    - `log_text`: log the bodies of requests.
    - `experts`: keep the activity of the routed experts of the last reply.
    """

    defaults: RequestDefaults
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body: int = 16 << 20
    max_queued: int = 256
    max_seconds: float = 1800.0
    body_seconds: float = 30.0
    stall_seconds: float = 30.0
    grace: float = 10.0
    log_text: bool = False
    experts: bool = False

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key:
            raise UsageError("the API key is empty", remedy="leave it out, or set a long random text")
        if self.api_key is not None and not _fits_a_header(self.api_key):
            raise UsageError(
                "the API key has characters that an HTTP header cannot have",
                remedy="use letters, digits and punctuation of ASCII",
            )
        # Browsers send origins in lower case and without a slash.
        origins = tuple(origin.lower().rstrip("/") for origin in self.cors_origins)
        object.__setattr__(self, "cors_origins", origins)
        if not (is_loopback(self.host) or self.api_key or self.insecure):
            raise UsageError(
                f"{self.host} can be reached from other computers",
                remedy="set --api-key KEY, or --insecure to let everybody use the model",
            )


def _fits_a_header(key: str) -> bool:
    """True if the value of an HTTP header can be this text: space around it would get lost."""
    return key.isascii() and key.isprintable() and key == key.strip()


def is_loopback(host: str) -> bool:
    """True if only this computer can connect to the address."""
    if host == "localhost":
        return True
    address = as_address(host)
    return address is not None and address.is_loopback


def as_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return a literal IP address; None for a name."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
