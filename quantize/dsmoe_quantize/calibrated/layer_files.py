"""Finished layers in a hidden folder beside the output, so that an interrupted calibration can continue.

For each layer there is a file with its encoded tensors. The hidden states before the next layer are in
another file, in bf16. A layer counts once the journal has its line. The outputs of the unrounded layer, in
f32, are only for the layer at hand.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Listener, Note
from dsmoe_local.model.ggml import Tensor as TensorShape
from dsmoe_local.model.gguf_file import TensorInfo
from dsmoe_quantize.calibrated.blocks import Bytes
from dsmoe_quantize.quantize import GgufRows

_VERSION = 2
_STATE_BYTES = 2  # of one value of a hidden state
_OUTPUT_BYTES = 4  # of one value of an unrounded layer's output


def folder_of(out: Path) -> Path:
    """Return the folder for the layers of an unfinished `out`."""
    return out.with_name(f".{out.name}.calibrated")


class LayerFiles:
    """The folder of one output. Use as a context manager while holding its lock.

    `layers` are the tensors of each layer that are encoded here. `shape` is that of the hidden states,
    (n_sequences, n_tokens, width). `reports` has what `save` was given for each finished layer.
    `with_outputs` says whether `save_outputs` will be called, and so need room on the disk.
    """

    def __init__(
        self,
        folder: Path,
        layers: Sequence[Sequence[TensorShape]],
        shape: tuple[int, int, int],
        fingerprint: Mapping[str, object],
        listen: Listener,
        *,
        with_outputs: bool,
    ) -> None:
        self.folder = folder
        self.shape = shape
        self.reports: list[Any] = []
        self._layers = layers
        self._fingerprint = json.loads(json.dumps({"version": _VERSION, **fingerprint}))
        self._listen = listen
        self._with_outputs = with_outputs
        self._open = ExitStack()
        self._journal: durable.Journal

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            entries = self._entries()
            if entries and not self._changed(entries[0]):
                self.reports = entries[1:]
                self._listen(
                    Note(f"continuing: {len(self.reports)} of {len(self._layers)} layers are calibrated")
                )
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir()
                durable.sync_folder(self.folder.parent)
            self._journal = opening.enter_context(durable.Journal(self.folder / "journal"))
            if not self._journal.entries:
                self._journal.append(self._fingerprint)
                durable.sync_folder(self.folder)
            self.remove_outputs()
            self._require_space()
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _entries(self) -> list[Any]:
        path = self.folder / "journal"
        if not path.exists():
            return []
        try:
            with durable.Journal(path) as journal:
                return journal.entries
        except FileError:
            self._listen(Note("calibrating from the first layer: the journal of the last run is damaged"))
            return []

    def _changed(self, earlier: Any) -> bool:  # noqa: ANN401 - whatever the journal holds
        names = [name for name in self._fingerprint if earlier.get(name) != self._fingerprint[name]]
        if names:
            self._listen(Note(f"calibrating from the first layer: changed since then: {', '.join(names)}"))
        return bool(names)

    def _require_space(self) -> None:
        left = [tensor for layer in self._layers[len(self.reports) :] for tensor in layer]
        n_encoded = sum(tensor.n_bytes for tensor in left)
        # Beside the states before a layer, there are its outputs, and later the states before the next layer.
        n_beside = _OUTPUT_BYTES if self._with_outputs else _STATE_BYTES
        n_states = math.prod(self.shape) * (_STATE_BYTES + n_beside)
        n_there = sum(path.stat().st_size for path in self.folder.glob("states-*"))
        durable.require_space(self.folder, n_encoded + n_states - n_there if left else 0)

    @property
    def n_done(self) -> int:
        """Number of layers that are finished."""
        return len(self.reports)

    def states(self, layer: int) -> Tensor:
        """Return the hidden states before a layer, as a mapped file."""
        path, n_values = self._state_path(layer), math.prod(self.shape)
        return torch.from_file(str(path), size=n_values, dtype=torch.bfloat16).view(self.shape)

    def save_states(self, layer: int, states: Iterable[Tensor]) -> None:
        """Store the hidden states before a layer, which come in batches of sequences."""
        with self._new_file(self._state_path(layer)) as file:
            for batch in states:
                file.write(batch.bfloat16().contiguous().view(torch.int16).cpu().numpy().data)

    def outputs(self) -> Tensor:
        """Return what `save_outputs` has stored, as a mapped file."""
        return torch.from_file(str(self._outputs_path), size=math.prod(self.shape)).view(self.shape)

    def save_outputs(self, outputs: Iterable[Tensor]) -> None:
        """Store the outputs of the unrounded layer at hand. They come in batches of sequences, in f32."""
        with self._outputs_path.open("wb") as file:
            for batch in outputs:
                file.write(batch.contiguous().cpu().numpy().data)

    def remove_outputs(self) -> None:
        """Delete what `save_outputs` has stored."""
        self._outputs_path.unlink(missing_ok=True)

    @contextmanager
    def _new_file(self, path: Path) -> Iterator[BinaryIO]:
        temporary = self.folder / "part"
        with temporary.open("wb") as file:
            yield file
            file.flush()
            durable.sync(file.fileno())
        durable.replace(temporary, path)

    def save(self, layer: int, encoded: Mapping[str, Bytes], report: object) -> None:
        """Store the tensors of a layer. The hidden states before the next layer exist already."""
        with self._new_file(self._layer_path(layer)) as file:
            for tensor in self._layers[layer]:
                file.write(encoded[tensor.name].data)
        reach("calibration.layer")
        self._journal.append(report)
        reach("calibration.journaled")
        self.reports.append(report)
        self._state_path(layer).unlink(missing_ok=True)

    def rows(self) -> dict[str, GgufRows]:
        """Return the rows of all encoded tensors. They can be read until the context ends."""
        found = {}
        for layer, tensors in enumerate(self._layers):
            if not tensors:
                continue
            path = self._layer_path(layer)
            descriptor = os.open(path, os.O_RDONLY)
            self._open.callback(os.close, descriptor)
            offset = 0
            for tensor in tensors:
                info = TensorInfo(tensor.name, tensor.shape, tensor.type, offset)
                found[tensor.name] = GgufRows(path, descriptor, info)
                offset += tensor.n_bytes
        return found

    def _state_path(self, layer: int) -> Path:
        return self.folder / f"states-{layer:03}"

    @property
    def _outputs_path(self) -> Path:
        return self.folder / "outputs"

    def _layer_path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03}"
