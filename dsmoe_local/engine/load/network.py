"""Networks between machines, and what llama.cpp's RPC protocol sends over them to decode a token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import parse_size
from dsmoe_local.base.text import safe_line

_PAYLOAD = 0.94  # of the bits on an Ethernet; the rest are headers of Ethernet, IP and TCP
_BITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}

_TENSOR_MESSAGE = 314  # bytes of a message that sets a tensor, besides the tensor's data
_COMPUTE_MESSAGE = 13
_ASK_MESSAGE = 321  # asks for a tensor
_ANSWER_HEADER = 8
_POSITION, _CELL_INDEX, _MASK_VALUE, _FLOAT = 4, 8, 2, 4
_FROM_HOST = 3
"""Vectors that a worker gets from a layer in main memory: the results of its routed experts, of its shared
experts and of its attention, which the worker adds up. Other layers pass on one vector.
"""


@dataclass(frozen=True, slots=True)
class Network:
    """A network: bytes per second, and the least and most seconds of a round trip.

    A round trip includes the time in which sleeping threads wake up on both machines.
    """

    bandwidth: float
    round_trip: tuple[float, float]


_WIRED = (0.4e-3, 1.0e-3)
_NAMED: Mapping[str, Network] = {
    "wifi": Network(30e6, (2e-3, 10e-3)),
    "loopback": Network(2e9, (0.2e-3, 0.6e-3)),
}
FORMS = "1GbE, 2.5GbE, 100Mbit/s, 40MB/s or WiFi"


def parse_network(text: str) -> Network:
    """Return the network of a bandwidth in one of `FORMS`. Raises UsageError."""
    word = text.strip().lower()
    if word in _NAMED:
        return _NAMED[word]
    bits = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gbe|([kmg]?)(?:bits?(?:/s|ps)?|bps))", word)
    # In MBps, the case of the B tells bytes from bits.
    in_bytes = re.fullmatch(r"([\d.]+\s*[kmgt]?i?b)(?:/s|ps)", word) if "B" in text else None
    bandwidth = 0.0
    if in_bytes is not None:
        bandwidth = parse_size(in_bytes[1])
    elif bits is not None:
        bandwidth = float(bits[1]) * _BITS["g" if bits[2] == "gbe" else bits[3]] / 8 * _PAYLOAD
    if bandwidth <= 0:
        raise UsageError(f"{safe_line(text, 40)!r} is not a bandwidth", remedy=f"write it as {FORMS}")
    return Network(bandwidth, _WIRED)


def bytes_per_token(
    n_workers: int, n_cells: int, *, hidden_size: int, n_vocab: int, layers_here: bool
) -> int:
    """Return the bytes that cross the network to decode a token after `n_cells` tokens of context.

    A worker gets vectors of the hidden size, positions and the attention mask. It sends one vector back,
    which this machine passes on to the next worker; the last one sends the logits. `layers_here`: the first
    layers are on this machine.

    Not counted: the graph, 25 KB for each layer. llama.cpp sends it again after every 256 tokens.
    """
    if not n_workers:
        return 0
    inputs = _POSITION + 2 * _CELL_INDEX + _MASK_VALUE * n_cells
    asked = 4 * _TENSOR_MESSAGE + inputs + _COMPUTE_MESSAGE + _ASK_MESSAGE + _ANSWER_HEADER
    vector = _FLOAT * hidden_size
    n_vectors = n_workers + (_FROM_HOST - 1 if layers_here else 0)
    sent = n_vectors * (_TENSOR_MESSAGE + vector)
    answers = (n_workers - 1) * vector + _FLOAT * n_vocab
    last = _TENSOR_MESSAGE + _POSITION  # the row whose logits are wanted
    return n_workers * asked + sent + answers + last
