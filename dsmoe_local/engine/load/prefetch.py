"""Prefetches the routed experts of a layer from disk, all at once, as soon as its router has chosen them.

Page faults would read them a few pages at a time, with read-ahead into experts that were not chosen. It is an
observer of the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import numpy as np

from dsmoe_local.base import progress
from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.sequences import runs
from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine.load.mapped_file import PAGE, whole_pages
from dsmoe_local.engine.load.placement import Placement
from dsmoe_local.engine.load.resident import Resident, host_tensors, plan_resident, speed_note
from dsmoe_local.engine.native import Row, tensors
from dsmoe_local.engine.observe.observer import Observer
from dsmoe_local.model.gguf_file import GgufFile, TensorInfo
from dsmoe_local.model.gguf_model import loaded_tensors
from dsmoe_local.model.hyperparameters import ModelOutline
from dsmoe_local.model.layout import layer_of

_ORDER = ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")  # the order of computation


def page_experts(
    file: GgufFile,
    outline: ModelOutline,
    placement: Placement,
    budget: int,
    listen: progress.Listener,
    stop: threading.Event,
) -> Prefetch:
    """Lock the weights that every token reads in memory, and return the observer that prefetches experts.

    `budget` is the memory for both in bytes. Passes notes to `listen`. Raises FileError, InterruptedRunError.
    """
    on_host = host_tensors(loaded_tensors(file, outline), outline, placement)
    resident = Resident(
        [part.path for part in file.parts], plan_resident(on_host.always, budget), listen, stop
    )
    left = max(0, budget - resident.n_bytes)
    kept = f"{format_size(resident.n_bytes)} of weights that every token reads stay in memory"
    listen(progress.Note(f"{kept}: {resident.mode}"))
    experts = on_host.experts
    try:
        tensors.check_layout()
    except DsmoeError as error:
        listen(progress.Note(f"experts are not prefetched: {error.what}"))
        experts = ()
    largest = max(file.parts, key=lambda part: part.size)
    note = speed_note(largest.path, on_host, outline, resident.n_bytes, left)
    if note:
        listen(progress.Note(note))
    return Prefetch(experts, outline.n_routed_experts, resident, left)


class Prefetch(Observer):
    """Prefetches the experts that the routers choose. It owns `resident`."""

    def __init__(self, experts: Sequence[TensorInfo], n_experts: int, resident: Resident, left: int) -> None:
        """Register a callback for each layer. `experts` are the paged tensors, of `n_experts` experts each.

        At most `left` bytes of a layer are prefetched, since a long prompt may choose more experts than fit
        into memory.
        """
        super().__init__()
        self._resident = resident
        self._left = left
        self._n_experts = n_experts
        self._reader = tensors.Reader()
        layers: dict[int | None, list[TensorInfo]] = {}
        for tensor in experts:
            layers.setdefault(layer_of(tensor.name), []).append(tensor)
        self.nodes = {
            f"ffn_moe_weights-{layer}".encode(): partial(
                self._fetch_chosen, sorted(of_layer, key=_place_in_order)
            )
            for layer, of_layer in layers.items()
        }
        self.reads_graph = bool(self.nodes)

    def before_step(self, rows: Sequence[Row]) -> None:
        self._reader.forget()
        self._resident.refresh()

    def close(self) -> None:
        self._resident.close()

    def _fetch_chosen(self, experts: Sequence[TensorInfo], weights: int) -> None:
        # This node is the first that reads the ids of the chosen experts, so their memory is not reused yet.
        chosen = self._reader.view(tensors.source_of(weights, 1))
        self.fetch(experts, np.unique(chosen).tolist())

    def fetch(self, tensors_of_layer: Sequence[TensorInfo], chosen: Sequence[int]) -> None:
        """Start reading the `chosen` experts, in ascending order, of one layer's tensors."""
        left = self._left
        for tensor in tensors_of_layer:
            size = tensor.n_bytes // self._n_experts
            for run in runs(chosen):
                start, end = (tensor.offset + edge * size for edge in (run.start, run.stop))
                pages = whole_pages(start, end, tensor.part)
                pages = pages._replace(end=min(pages.end, pages.start + left // PAGE * PAGE))
                left -= pages.size
                self._resident.files.fetch(pages)


def _place_in_order(tensor: TensorInfo) -> int:
    return next(index for index, kind in enumerate(_ORDER) if kind in tensor.name)
