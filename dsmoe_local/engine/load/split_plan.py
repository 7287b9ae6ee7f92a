"""Predicts how a model is split over machines: what lies where, and how fast a reply is decoded.

The placement is that of a load with `--rpc`, and llama.cpp itself plans the buffers. No weights are needed:
the model may be a file, or hyper-parameters only. Machines compute one after another, so that the times of
their reads add up. `benchmarks/workers.py` compares predicted with measured speeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gguf.constants import GGUFValueType

from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import count
from dsmoe_local.engine.errors import OutOfMemoryError
from dsmoe_local.engine.load import network as networks
from dsmoe_local.engine.load.loaded_model import context_options
from dsmoe_local.engine.load.memory import PROCESS_BYTES
from dsmoe_local.engine.load.network import Network
from dsmoe_local.engine.load.placement import (
    HOST,
    DeviceMemory,
    Placement,
    PlacementOptions,
    place,
    weight_sizes,
)
from dsmoe_local.engine.load.probe import BufferSizes, Probe, sizes_by_context
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.cost import bytes_per_token
from dsmoe_local.model.ggml import Tensor
from dsmoe_local.model.gguf_file import DEFAULT_ALIGNMENT, Field, GgufFile, GgufPart, TensorInfo
from dsmoe_local.model.gguf_model import loaded_tensors, metadata_of
from dsmoe_local.model.gguf_writer import ARCHITECTURE_KEY
from dsmoe_local.model.hyperparameters import Hyperparameters, ModelOutline
from dsmoe_local.model.layout import Role, layer_of, role_of

_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine: bytes of memory for the model, and the least and most bytes per second that it reads."""

    n_bytes: int
    read_speed: tuple[float, float]


@dataclass(frozen=True, slots=True)
class MachineShare:
    """What a machine holds, in bytes. `read` are the bytes of weights that it reads to decode a token.

    `process` is what llama.cpp and Python need besides.
    """

    machine: Machine
    n_layers: int = 0
    has_output: bool = False
    weights: int = 0
    cache: int = 0
    buffers: int = 0
    read: float = 0.0
    process: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of memory."""
        return self.weights + self.cache + self.buffers + self.process

    def seconds(self, filled: float) -> tuple[float, float]:
        """Return the least and most time for a token. `filled` is the part of the context that is in use."""
        slow, fast = self.machine.read_speed
        read = self.read + filled * self.cache
        return read / fast, read / slow


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """A model on machines, this one first. A machine that is not needed has a share of 0 bytes.

    `network_bytes` cross the network to decode a token after a full context.
    """

    shares: tuple[MachineShare, ...]
    network: Network
    network_bytes: int

    @property
    def n_workers(self) -> int:
        """Number of workers that have layers. Each of them costs a round trip per token."""
        return sum(share.n_bytes > 0 for share in self.shares[1:])

    @property
    def network_seconds(self) -> tuple[float, float]:
        """The least and most time that the network takes for a token."""
        sending = self.network_bytes / self.network.bandwidth
        least, most = self.network.round_trip
        return sending + self.n_workers * least, sending + self.n_workers * most

    def tokens_per_second(self, filled: float) -> tuple[float, float]:
        """Return the least and most speed. `filled` is the part of the context that is in use."""
        times = [self.network_seconds, *(share.seconds(filled) for share in self.shares)]
        return 1 / sum(most for _, most in times), 1 / sum(least for least, _ in times)


def header_of(hp: Hyperparameters, tensors: Sequence[Tensor]) -> GgufFile:
    """Return the header of a file that does not exist."""
    metadata = {ARCHITECTURE_KEY: Field(hp.architecture, GGUFValueType.STRING), **metadata_of(hp)}
    infos = {each.name: TensorInfo(each.name, each.shape, each.type, 0) for each in tensors}
    part = GgufPart(Path(f"{hp.name}.gguf"), 0, (0, 0, 0))
    return GgufFile(metadata, infos, DEFAULT_ALIGNMENT, (part,))


def plan_split(
    file: GgufFile, outline: ModelOutline, machines: Sequence[Machine], network: Network, n_context: int
) -> SplitPlan:
    """Plan a model for `n_context` tokens of KV cache.

    Raises OutOfMemoryError if it does not fit, and ModelLoadError if llama.cpp refuses the model.
    """
    sizes = _buffers(file, outline, n_context)
    buffers = sizes.compute[HOST]
    here, *others = machines
    workers = [DeviceMemory(str(n), each.n_bytes, worker=str(n)) for n, each in enumerate(others, 1)]
    room = here.n_bytes - PROCESS_BYTES - buffers
    placement = place(
        weight_sizes(loaded_tensors(file, outline), outline),
        workers,
        PlacementOptions(main_memory=room),
        cache=sizes.cache // outline.n_layers,
        compute={worker.name: buffers for worker in workers},
    )
    if not placement.fits or placement.host.weights + placement.host.cache > room:
        raise _does_not_fit(file, outline, sizes, machines)
    return planned(file, outline, placement, machines, network, n_context, buffers)


def _buffers(file: GgufFile, outline: ModelOutline, n_context: int) -> BufferSizes:
    """Return the KV cache and the compute buffers of the model on one CPU."""
    options = partial(context_options, ModelOptions(file.path), "auto", unified=True)
    with Probe(file, outline) as probe:
        model = probe.open()
        try:
            return sizes_by_context(model, options)(n_context)
        finally:
            model.close()


def _does_not_fit(
    file: GgufFile, outline: ModelOutline, sizes: BufferSizes, machines: Sequence[Machine]
) -> OutOfMemoryError:
    weights = sum(tensor.n_bytes for tensor in loaded_tensors(file, outline))
    buffers = sizes.compute[HOST] * len(machines) + PROCESS_BYTES
    needed = weights + sizes.cache + buffers
    missing = needed - sum(machine.n_bytes for machine in machines)
    why = "layers are not divided, and this machine holds the embedding"
    if missing > 0:
        why = f"{format_size(missing)} are missing"
    return OutOfMemoryError(
        f"it does not fit on {count(len(machines), 'machine')}: {why}",
        where=f"needed: {format_size(needed)} (weights {format_size(weights)}, KV cache "
        f"{format_size(sizes.cache)}, buffers {format_size(buffers)})",
    )


def planned(
    file: GgufFile,
    outline: ModelOutline,
    placement: Placement,
    machines: Sequence[Machine],
    network: Network,
    n_context: int,
    buffers: int = 0,
) -> SplitPlan:
    """Return the plan of a placement. The devices of workers are named by their index in `machines`.

    `buffers` are the bytes of compute buffers on each machine that is used.
    """
    read = _reads(file, outline, placement)
    held = {int(share.name): share for share in placement.shares}
    shares = []
    for index, machine in enumerate(machines):
        share = held.get(index) if index else placement.host
        if share is None:
            shares.append(MachineShare(machine))
            continue
        shares.append(
            MachineShare(
                machine,
                share.n_layers,
                share.has_output,
                share.weights,
                share.cache,
                buffers,
                read[index],
                0 if index else PROCESS_BYTES,
            )
        )
    sent = networks.bytes_per_token(
        len(held),
        n_context,
        hidden_size=file.tensors[_EMBEDDING].shape[-1],
        n_vocab=outline.n_vocab,
        layers_here=placement.host.n_layers > 0,
    )
    return SplitPlan(tuple(shares), network, sent)


def _reads(file: GgufFile, outline: ModelOutline, placement: Placement) -> dict[int, float]:
    """Return the bytes of weights that each machine reads to decode a token, by its index."""
    # The index of the machine of each layer; that of the output is the last one.
    owners = [0] * (outline.n_stored_layers + 1 - placement.n_gpu_layers)
    for name, n_layers in zip(placement.devices, placement.split, strict=True):
        owners += [int(name)] * n_layers
    found = dict.fromkeys((0, *owners), 0.0)
    for tensor in loaded_tensors(file, outline):
        layer = layer_of(tensor.name)
        if layer is not None:
            owner = owners[layer]
        elif role_of(tensor.name) is Role.EMBEDDING and not outline.tied_embeddings:
            owner = 0
        else:
            owner = owners[-1]
        found[owner] += bytes_per_token(outline, [tensor])
    return found
