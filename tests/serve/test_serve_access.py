"""Who may use the server: addresses, keys, hosts and web pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.serving import DEFAULTS, Serving, serving

from dsmoe_local.base.errors import UsageError
from dsmoe_local.serve.options import ServeOptions


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"host": "127.0.0.1"}, True),
        ({"host": "127.8.8.8"}, True),
        ({"host": "::1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"host": "192.168.0.7"}, False),
        ({"host": "laptop"}, False),
        ({"host": "0.0.0.0", "api_key": "k"}, True),
        ({"host": "0.0.0.0", "insecure": True}, True),
        ({"host": "127.0.0.1", "api_key": ""}, False),
        ({"host": "127.0.0.1", "api_key": "schl\xfcssel"}, False),
        ({"host": "127.0.0.1", "api_key": "key\n"}, False),
    ],
)
def test_other_computers_need_a_key(options: dict[str, Any], allowed: bool) -> None:
    """Guards: a model that the whole network can use by mistake; an empty variable taken for a key; a key
    that no request can have.
    """
    if allowed:
        ServeOptions(DEFAULTS, **options)
    else:
        with pytest.raises(UsageError):
            ServeOptions(DEFAULTS, **options)


@pytest.fixture(scope="module")
def locked() -> Iterator[Serving]:
    with serving(FakeEngine(), api_key="sesame") as server:
        yield server


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, False),
        ({"authorization": "Bearer sesame"}, True),
        ({"authorization": "bearer sesame"}, True),
        ({"x_api_key": "sesame"}, True),
        ({"authorization": "Bearer sesam"}, False),
        ({"authorization": "Bearer"}, False),
        ({"authorization": "Basic sesame"}, False),
        ({"x_api_key": "s\xe9same"}, False),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/nothing"])
def test_the_key(locked: Serving, headers: dict[str, str], allowed: bool, path: str) -> None:
    """Guards: a path without a check; a header that crashes the comparison; paths that leak without a key."""
    answer = locked.send(path, **headers)
    assert (answer.status != 401) == allowed
    if not allowed:
        assert answer.error["code"] == "invalid_api_key"
        assert "sesame" not in answer.body.decode()


def test_health_needs_no_key(locked: Serving) -> None:
    """Guards: a supervisor that kills a server because it has no key."""
    assert locked.send("/health").status == 200
    assert locked.chat().status == 401


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(FakeEngine(), allowed_hosts=("Models.example",)) as server:
        yield server


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        *((host, True) for host in ("127.0.0.1:1", "localhost", "LOCALHOST:80", "a.localhost", "[::1]:5")),
        *((host, True) for host in ("192.168.0.7:8080", "models.example", "models.example.:80")),
        *((host, False) for host in ("evil.example", "127.0.0.1.evil.example:8080", "evil.example:127", "")),
        *((host, False) for host in ("localhost.evil.example", "notlocalhost", "[evil", "x@localhost:1:2")),
    ],
)
def test_hosts(server: Serving, host: str, allowed: bool) -> None:
    """Guards: DNS rebinding, where a page's own name resolves to 127.0.0.1."""
    answer = server.send("/v1/models", host=host)
    assert answer.status == (200 if allowed else 403)
    if not allowed:
        assert answer.error["code"] == "host_not_allowed"
        assert "--allowed-host" in answer.error["message"]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_pages_of_other_sites(server: Serving, origin: str) -> None:
    """Guards: a page that sends a form to the server, whose answer it cannot read but which costs time."""
    answer = server.send("/v1/completions", {"prompt": "a"}, origin=origin)
    assert answer.status == 403
    assert "--cors-origin" in answer.error["message"]
    assert "access-control-allow-origin" not in answer.headers


def test_own_pages(server: Serving) -> None:
    """Guards: a page of the server itself that is refused, since browsers send its origin, too."""
    assert server.send("/v1/completions", {"prompt": "a"}, origin=server.url).status == 200


@pytest.mark.parametrize(
    ("chosen", "shown"),
    [("http://app.example", "http://app.example"), ("http://App.example/", "http://app.example"), ("*", "*")],
)
def test_cors(chosen: str, shown: str) -> None:
    """Guards: a preflight that needs the key, which browsers do not send; errors that pages cannot read."""
    with serving(FakeEngine(), cors_origins=(chosen,), api_key="k") as server:
        asked = {"origin": "http://app.example", "access_control_request_method": "POST"}
        preflight = server.send(
            "/v1/completions", method="OPTIONS", access_control_request_headers="authorization", **asked
        )
        assert preflight.status == 200
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        for key, status in (("Bearer k", 200), ("Bearer x", 401)):
            answer = server.send(
                "/v1/completions", {"prompt": "a"}, origin="http://app.example", authorization=key
            )
            assert answer.status == status
            assert answer.headers["access-control-allow-origin"] == shown
        other = server.send("/v1/completions", {"prompt": "a"}, origin="http://evil.example")
        assert other.status == (401 if chosen == "*" else 403)


def test_json_with_another_content_type(server: Serving) -> None:
    """Guards: `curl -d` told that its body is not JSON, without the header that it has to send."""
    answer = server.send("/v1/completions", {"prompt": "a"}, content_type="application/x-www-form-urlencoded")
    assert answer.status == 415
    assert "'application/x-www-form-urlencoded'" in answer.error["message"]
    assert "-H 'content-type: application/json'" in answer.error["message"]


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        ("/v1/completions", "POST", {"authorization": "Bearer wrong"}, 401),
        ("/v1/completions", "POST", {"host": "evil.example"}, 403),
        ("/v1/completions", "POST", {"content_type": "text/plain"}, 415),
        ("/completions", "POST", {}, 404),
        ("/health", "POST", {}, 405),
        ("/v1/completions", "POST", {}, 413),
    ],
)
def test_refused_before_the_body_is_read(
    locked: Serving, path: str, method: str, headers: dict[str, str], status: int
) -> None:
    """Guards: a connection that is reset while the client still sends, so that it does not see the reason."""
    body = b" " * (32 << 20)  # more than the system's buffers hold
    answer = locked.send(path, body, method, **{"authorization": "Bearer sesame", **headers})
    assert answer.status == status
    assert answer.error["message"]
