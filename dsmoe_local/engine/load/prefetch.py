"""Reads a token's routed experts ahead: once a layer's router has chosen, all of them are asked for at once.

Left to page faults, they would be read a few pages after another, each time with as much again of experts
that nobody chose. An observer of the graph that computes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import numpy as np

from dsmoe_local.base import progress
from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine.load.mapped_file import PAGE, Range, whole_pages
from dsmoe_local.engine.load.placement import Placement
from dsmoe_local.engine.load.resident import Resident, host_tensors, paging_note, plan_resident
from dsmoe_local.engine.native import Row, tensors
from dsmoe_local.engine.observe.observer import Observer
from dsmoe_local.model.gguf_file import GgufFile, TensorInfo
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import layer_of

_ORDER = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
"""As they are multiplied."""


def page_experts(
    file: GgufFile,
    hp: Hyperparameters,
    placement: Placement,
    budget: int,
    listen: progress.Listener,
    stop: threading.Event,
) -> Prefetch:
    """Keep in memory what every token reads, as far as `budget` bytes allow, page the experts, and tell how.

    Raises FileError, InterruptedRunError.
    """
    mine = host_tensors(file.tensors.values(), hp, placement)
    resident = Resident(file.path, plan_resident(mine.always, budget), listen, stop)
    room = max(0, budget - resident.n_bytes)
    listen(
        progress.Note(
            f"{format_size(resident.n_bytes)} that every token reads stay in memory: {resident.mode}"
        )
    )
    experts = mine.experts
    try:
        tensors.check_layout()
    except DsmoeError as error:
        listen(progress.Note(f"experts are not read ahead: {error.what}"))
        experts = ()
    note = paging_note(file.path, mine, hp, resident.n_bytes, room)
    if note:
        listen(progress.Note(note))
    return Prefetch(experts, hp.n_routed_experts, resident, room)


class Prefetch(Observer):
    """Owned by the engine's thread, and owns `resident`."""

    def __init__(self, experts: Sequence[TensorInfo], n_experts: int, resident: Resident, room: int) -> None:
        """`experts` are the tensors of `n_experts` each that are paged, with `room` bytes to share: a prompt
        that needs more at once fetches no more than that.
        """
        super().__init__()
        self._resident = resident
        self._room = room
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
        """See Observer."""
        self._reader.forget()
        self._resident.refresh()

    def close(self) -> None:
        """See Observer."""
        self._resident.close()

    def _fetch_chosen(self, experts: Sequence[TensorInfo], weights: int) -> None:
        # The first node that reads which experts were chosen: to be looked at, its sources are kept.
        chosen = self._reader.view(tensors.source_of(weights, 1))
        self.fetch(experts, np.unique(chosen).tolist())

    def fetch(self, tensors_of_layer: Sequence[TensorInfo], chosen: Sequence[int]) -> None:
        """Begin to read the `chosen` experts, ascending, in one layer's tensors."""
        room = self._room
        for tensor in tensors_of_layer:
            size = tensor.n_bytes // self._n_experts
            for first, last in _runs(chosen):
                start, end = whole_pages(tensor.offset + first * size, tensor.offset + last * size)
                pages = Range(start, min(end, start + room // PAGE * PAGE))
                room -= pages.size
                self._resident.file.fetch(pages)


def _place_in_order(tensor: TensorInfo) -> int:
    return next(index for index, kind in enumerate(_ORDER) if kind in tensor.name)


def _runs(ids: Sequence[int]) -> list[Range]:
    """Sorted numbers as ranges."""
    runs: list[Range] = []
    for one in ids:
        if runs and runs[-1].end == one:
            runs[-1] = Range(runs[-1].start, one + 1)
        else:
            runs.append(Range(one, one + 1))
    return runs
