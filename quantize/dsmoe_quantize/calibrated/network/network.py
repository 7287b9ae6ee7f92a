"""A whole model: reads the weights of one layer at a time, and computes the layer for all tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import GgufFile, TensorInfo
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import layer_of
from dsmoe_quantize.calibrated.network.attention import attention
from dsmoe_quantize.calibrated.network.feed_forward import feed_forward
from dsmoe_quantize.calibrated.network.layer import Layer, Tap, Weights, rms_norm
from dsmoe_quantize.calibrated.network.rope import rotation
from dsmoe_quantize.quantize import OpenGguf, opened
from dsmoe_quantize.write.encoder import Slab, SlabEncoder, TensorJob, check_job, slabs

_FFN_NORMS = ("ffn_norm", "post_attention_norm")


@contextmanager
def open_network(file: GgufFile, hp: Hyperparameters) -> Iterator[Network]:
    """Open a model that `read_model` has read.

    Raises FileError if a file cannot be opened or has changed since.
    """
    with opened(file) as source:
        yield Network(source, hp)


class Network:
    """Computes a model layer by layer. It holds no weights but those that it is given.

    Hidden states are f32, shape (n_sequences, n_tokens, width). Sequences begin at position 0, and have the
    same number of tokens.
    """

    def __init__(self, source: OpenGguf, hp: Hyperparameters) -> None:
        self._source = source
        self._hp = hp
        self.n_layers = hp.n_layers
        tensors = source.file.tensors
        # Llama 3.1 divides frequencies by these.
        self._divisors = self._read(tensors["rope_freqs.weight"]) if "rope_freqs.weight" in tensors else None

    def weights(self, layer: int, device: torch.device) -> dict[str, Tensor]:
        """Return a layer's tensors as f32 by their GGUF names, with norms, routers and biases.

        Raises FileError, or WeightError if a weight is not finite.
        """
        tensors = self._source.file.tensors.values()
        return {info.name: self._read(info).to(device) for info in tensors if layer_of(info.name) == layer}

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the first hidden states of tokens, shape (n_sequences, n_tokens)."""
        info = self._source.file.tensors["token_embd.weight"]
        known, places = tokens.unique(return_inverse=True)
        rows = self._read(info, [Slab(row, 1) for row in known.tolist()])
        return rows.to(tokens.device)[places]

    def forward(self, layer: int, weights: Weights, hidden: Tensor, tap: Tap | None = None) -> Tensor:
        """Return the hidden states after a layer. Differentiable in the weights and in `hidden`."""
        turn = rotation(self._hp, hidden.shape[1], self._divisors, hidden.device)
        this = Layer(self._hp, f"blk.{layer}.", weights, turn, tap)
        hidden = hidden + attention(this, this.norm("attn_norm", hidden))
        ffn_norm = next(name for name in _FFN_NORMS if name in this)
        normed = this.norm(ffn_norm, hidden)
        return hidden + feed_forward(this, normed.flatten(0, 1)).view_as(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the hidden states after the last layer. Each call reads the output matrix."""
        norm, output = (self._read(info).to(hidden.device) for info in self._ends())
        return rms_norm(hidden, norm, self._hp.rms_norm_eps) @ output.T

    def _ends(self) -> tuple[TensorInfo, TensorInfo]:
        tensors = self._source.file.tensors
        output = "token_embd.weight" if self._hp.tied_embeddings else "output.weight"
        return tensors["output_norm.weight"], tensors[output]

    def _read(self, info: TensorInfo, part: Sequence[Slab] | None = None) -> Tensor:
        """Return a tensor, or the rows of a matrix that are given."""
        job = TensorJob(info.name, info.shape, GgmlType.F32, self._source.rows(info))
        check_job(job)
        wanted = list(slabs(job)) if part is None else part
        floats = np.empty((sum(slab.n_rows for slab in wanted), job.n_columns), np.float32)
        encoder, done = SlabEncoder(), 0
        for slab in wanted:
            decoded = encoder.encode(job, slab, encoder.read(job, slab), lambda: False)
            assert decoded is not None
            floats[done : done + slab.n_rows] = decoded.view(np.float32).reshape(slab.n_rows, -1)
            done += slab.n_rows
        return torch.from_numpy(floats if part is not None else floats.reshape(info.shape))
