"""Options of `dsmoe batch` for a Ray cluster, and the run of a batch on it."""

from __future__ import annotations

import re
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import parse_size
from dsmoe_local.cli.model_options import loading_options
from dsmoe_local.cli.option_sources import flag_of, from_command_line
from dsmoe_local.cli.options import FLAG, Group, all_of, option, parsed, typed
from dsmoe_local.cli.progress import run_with_progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsmoe_local.base.progress import Listener
    from dsmoe_local.batch.cluster.placement import RayOptions
    from dsmoe_local.batch.job import Job
    from dsmoe_local.engine.types import ModelOptions

_AUTO = "auto"
_LEAST_MEMORY = 1 << 20  # a smaller number without a unit is a mistake
_ADDRESS = re.compile(r"local|auto|[\w.\-]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}")
_OTHERS = ("ray_workers", "ray_gpus", "ray_memory", "ship_model")


def _address(text: str) -> str:
    """Read the address of a cluster."""
    if not _ADDRESS.fullmatch(text):
        if Path(text).exists():
            raise ValueError(f"{text!r} is a file: write --ray=auto, or --ray as the last word")
        raise ValueError(f"{text!r} is not the address of a Ray cluster: local, auto, or HOST:PORT")
    return text


def _n_workers(text: str) -> int:
    """Read a number, or `auto` (0)."""
    if text.lower() == _AUTO:
        return 0
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"{text!r} is neither a number from 1 nor auto")
    return int(text)


def _memory(text: str) -> int:
    """Read a size in bytes."""
    return parse_size(text, _LEAST_MEMORY)


ray_options = all_of(
    option(
        "--ray",
        "ray",
        "Let a Ray cluster answer: the one that RAY_ADDRESS names or this machine belongs to, the one at"
        " HOST:PORT, or local: one that is started on this machine.",
        parsed(_address, "[local|HOST:PORT]"),
        Group.CLUSTER,
        is_flag=False,
        flag_value=_AUTO,
    ),
    option(
        "--ray-workers",
        "ray_workers",
        "Number of workers. auto: as many as have room; one for each node without -t.",
        parsed(_n_workers, "N|auto"),
        Group.CLUSTER,
        default=_AUTO,
    ),
    option(
        "--ray-gpus",
        "ray_gpus",
        "GPUs of each worker. -t sets its CPUs.",
        typed(click.IntRange(0), "N"),
        Group.CLUSTER,
        shown="its part of the node's, at least 1 if it has some",
    ),
    option(
        "--ray-memory",
        "ray_memory",
        "Memory that Ray reserves for each worker.",
        parsed(_memory, "SIZE"),
        Group.CLUSTER,
        shown="none",
    ),
    option(
        "--ship-model",
        "ship_model",
        "Copy the model to the cache of nodes that do not have it.",
        FLAG,
        Group.CLUSTER,
    ),
)
"""Adds the options."""


def take_ray_options(values: dict[str, Any]) -> RayOptions | None:
    """Remove the options of a cluster from `values`; None without --ray. UsageError for a conflict."""
    address, n_workers, n_gpus, memory, ship_model = (values.pop(name) for name in ("ray", *_OTHERS))
    if address is None:
        given = next((name for name in _OTHERS if from_command_line(name)), None)
        if given is not None:
            raise UsageError(f"{flag_of(given)} is for --ray", remedy="add --ray, or --ray local")
        return None
    if values["workers"]:
        raise UsageError("--ray and --rpc are both given", remedy="leave one of them out")
    from dsmoe_local.batch.cluster.placement import RayOptions

    return RayOptions(address, n_workers or None, values["n_threads"], n_gpus, memory, ship_model)


def run_on_ray(
    options: RayOptions,
    model: Path,
    values: dict[str, Any],
    complete: Callable[[ModelOptions], ModelOptions],
    n_parallel: int,
    job: Job,
    stop: threading.Event,
) -> None:
    """Answer a job on a Ray cluster. `values` are the options about loading the model."""
    from dsmoe_local.batch.cluster.ray_cluster import RayCluster
    from dsmoe_local.batch.cluster.run import run_on_cluster
    from dsmoe_local.batch.cluster.worker import WorkerOptions
    from dsmoe_local.model.discovery import note_use

    log_file: Path | None = values.pop("log_file")
    template = Path(values["chat_template"] or "")
    workload, n_workers = job.workload, options.n_workers or 1
    worker = WorkerOptions(
        # Workers read no input. Addresses may contain passwords, which must stay on this machine.
        batch=replace(job.options, sources=(), address=None, settings={}, names={}),
        model=complete(loading_options(model.absolute(), values)),
        identity=job.options.settings["model"],
        workload=replace(
            workload,
            n_sequences=-(-workload.n_sequences // n_workers),
            n_total=-(-workload.n_total // n_workers),
        ),
        n_parallel=n_parallel or None,
        template=template.read_bytes() if template.is_file() else None,
        log_file=log_file.absolute() if log_file else None,
    )

    def work(listen: Listener, stop: threading.Event) -> None:
        with closing(RayCluster(options, worker, listen, stop)) as cluster:
            note_use(model)
            run_on_cluster(cluster, job, listen, stop)

    run_with_progress(work, stop)
