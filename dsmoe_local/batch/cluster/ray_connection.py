"""Connect to a Ray cluster, or start one on this machine."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import threading
from typing import Any

from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, MissingExtraError, UsageError
from dsmoe_local.base.text import safe_line

LOCAL = "local"
"""The address of a cluster that is started on this machine, and ends with the batch."""
AUTO = "auto"
"""The address of the cluster that RAY_ADDRESS names, or that this machine belongs to."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's handler of SIGTERM would replace ours, and print a stack.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    # Workers of a local cluster for which no GPU is reserved may still use what --device names.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_OBJECT_STORE = 256 << 20  # of a cluster on this machine; only large messages use it
_CONNECT_SECONDS = 5.0  # Ray itself waits for minutes
_POLL_SECONDS = 0.1
_AUTH_REMEDY = (
    "if the cluster asks for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"
)


def import_ray(address: str) -> Any:  # noqa: ANN401 - the module
    """Import Ray with the environment for a cluster at `address`. Raises MissingExtraError."""
    os.environ.update(_ENVIRONMENT)  # Ray reads it when it is imported
    if address == LOCAL:
        # Ray's ports are open on all interfaces. Without the token, nobody can use them. Ray reads it once,
        # so that all clusters of a process have the same.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "--ray") from error
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    return ray


def connect(ray: Any, address: str, stop: threading.Event, closed: threading.Event) -> None:  # noqa: ANN401
    """Connect to a cluster, or start one.

    This is done in a thread, because Ray would install a signal handler in the main thread, and so that
    `stop` can interrupt it. The thread lives until `closed` is set: on Linux, Ray's processes end with the
    thread that has started them.
    """
    if address == LOCAL:
        arguments = {
            "address": LOCAL,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
        }
    else:
        address = os.environ.get("RAY_ADDRESS", AUTO) if address == AUTO else address
        _check_reachable(address)
        arguments = {"address": address}
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **arguments)
            ended.put(None)
            closed.wait()
        except BaseException as error:  # noqa: BLE001 - raised again below
            ended.put(error)

    threading.Thread(target=work, name="dsmoe-ray", daemon=True).start()
    while True:
        try:
            error = ended.get(timeout=_POLL_SECONDS)
            break
        except queue.Empty:
            if stop.is_set():
                raise InterruptedRunError("interrupted: there was no connection to Ray yet") from None
    if isinstance(error, ConnectionError) and address == AUTO:
        raise DsmoeError(
            "no Ray cluster was found",
            remedy="start one (ray start --head), name its address (--ray HOST:PORT), or use --ray local",
        ) from error
    if error is not None:
        raise DsmoeError(
            f"Ray cannot be used: {safe_line(str(error), 300)}",
            where=address,
            remedy=_AUTH_REMEDY if address not in (LOCAL, AUTO) else "",
        ) from error


def _check_reachable(address: str) -> None:
    """Raise DsmoeError if nothing listens at HOST:PORT; UsageError for an address of Ray Client."""
    if "://" in address:
        raise UsageError(
            "a cluster cannot be used from outside, with Ray Client",
            where=address,
            remedy="run the command on a machine of the cluster, with --ray HOST:PORT of its head",
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # Ray looks for a cluster
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise DsmoeError(
            f"the Ray cluster cannot be reached: {error.strerror or error}",
            where=address,
            remedy="check the address; `ray start --head` prints it",
        ) from error
