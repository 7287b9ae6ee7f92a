"""How fast ggml multiplies by weights of each type, on this CPU: single matrix products, without a model.

    python -m benchmarks.products
    python -m benchmarks.products --types Q4_K,IQ4_NL --rounds 5

The roles are those of the 16B: a dense matrix, the routed gate or up projections (2,048 columns, which 256
divides), and the routed down projections (1,408 columns, which it does not). A prompt is one product with 512
tokens. Decoding goes through more weights than the caches hold, one token at a time. Each product is measured
with the weights as in the file and repacked, where ggml can repack them; `auto` marks the form that
`--kernels auto` loads.

The solver's model of speed has these figures (quantize/dsmoe_quantize/budget/kernel_speeds.py).

Prints a table, then one JSON line. Lower is faster.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.make_checkpoint import Pool, make_pool
from benchmarks.support import arguments
from benchmarks.support.random_models import encoded
from benchmarks.support.runner import say
from benchmarks.support.tables import show
from dsmoe_local.engine.load.kernels import Kernels, choose_kernels
from dsmoe_local.engine.load.machine import cpu_name, physical_cores
from dsmoe_local.engine.native.devices import cpu_device
from dsmoe_local.engine.native.library import arena, backend_function
from dsmoe_local.engine.native.repack import can_repack, repack_buffer
from dsmoe_local.model.ggml import GgmlType, block_size, tensor_bytes
from dsmoe_local.model.gguf_file import TensorInfo

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "IQ4_NL", "Q4_1", "Q4_0", "Q4_K", "IQ4_XS", "Q3_K")
_PROMPT, _CHOSEN = 512, 6
_WORKING_SET = 192 << 20
"""Bytes of weights that decoding goes through: more than the caches hold."""
_PLAIN, _REPACKED = "plain", "repacked"
_CONTEXT_BYTES = 1 << 22
_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t


@dataclass(frozen=True, slots=True)
class RoleShape:
    """Weights of one role: `name` as in a file, and the shape, slowest dimension first."""

    role: str
    name: str
    shape: tuple[int, ...]

    @property
    def is_experts(self) -> bool:
        """True if there is a matrix for each expert."""
        return len(self.shape) == 3


ROLES = (
    RoleShape("dense", "blk.1.attn_q.weight", (2048, 2048)),
    RoleShape("experts, 2,048 columns", "blk.1.ffn_gate_exps.weight", (64, 1408, 2048)),
    RoleShape("experts, 1,408 columns", "blk.1.ffn_down_exps.weight", (64, 2048, 1408)),
)


_SIGNATURES: Mapping[str, tuple[Any, ...]] = {
    "backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
    "backend_buffer_free": (None, _POINTER),
    "backend_cpu_buffer_type": (_POINTER,),
    "backend_dev_backend_reg": (_POINTER, _POINTER),
    "backend_dev_init": (_POINTER, _POINTER, ctypes.c_char_p),
    "backend_graph_compute": (_INT, _POINTER, _POINTER),
    "backend_reg_get_proc_address": (_POINTER, _POINTER, ctypes.c_char_p),
    "backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "build_forward_expand": (None, _POINTER, _POINTER),
    "mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "mul_mat_id": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    "nbytes": (_SIZE, _POINTER),
    "new_graph": (_POINTER, _POINTER),
    "new_tensor_3d": (_POINTER, _POINTER, _INT, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
}
"""The results and the arguments of ggml's functions."""


@cache
def ggml(name: str) -> Callable[..., Any]:
    """Return a function of ggml."""
    return backend_function(f"ggml_{name}", *_SIGNATURES[name])


def _backend(n_threads: int) -> int:
    """Return a CPU backend with so many threads."""
    device = cpu_device()
    backend: int = ggml("backend_dev_init")(device, None)
    registry = ggml("backend_dev_backend_reg")(device)
    address = ggml("backend_reg_get_proc_address")(registry, b"ggml_backend_set_n_threads")
    ctypes.CFUNCTYPE(None, _POINTER, _INT)(address)(backend, n_threads)
    return backend


def _tensor(context: int, kind: int, *sizes: int) -> int:
    """Return a new tensor. The fastest dimension is the first."""
    made: int = ggml("new_tensor_3d")(context, kind, *(*sizes, 1, 1)[:3])
    return made


@contextmanager
def _allocated(context: int, buffer_type: int) -> Iterator[None]:
    """Allocate all tensors of the context in one buffer."""
    buffer = ggml("backend_alloc_ctx_tensors_from_buft")(context, buffer_type)
    try:
        yield
    finally:
        ggml("backend_buffer_free")(buffer)


def _set(tensor: int, data: np.ndarray[Any, Any]) -> None:
    ggml("backend_tensor_set")(tensor, data.ctypes.data, 0, data.nbytes)


@dataclass(frozen=True, slots=True)
class Product:
    """Weights of one type and role in one form, whose products can be timed."""

    backend: int
    weights: Sequence[int]
    role: RoleShape

    def picoseconds(self, n_tokens: int, n_products: int, rounds: int) -> float:
        """Return the time of one weight and token: the fastest of the rounds, after a warm-up."""
        with arena(_CONTEXT_BYTES, allocate=False) as context:
            graph = ggml("new_graph")(context)
            inputs = [
                self._add(context, graph, self.weights[at % len(self.weights)], n_tokens)
                for at in range(n_products)
            ]
            with _allocated(context, ggml("backend_cpu_buffer_type")()):
                for each in inputs:
                    self._fill(each, n_tokens)
                seconds = [self._compute(graph) for _ in range(rounds + 1)][1:]
        n_weights = self.role.shape[-1] * self.role.shape[-2] * (_CHOSEN if self.role.is_experts else 1)
        return 1e12 * min(seconds) / (n_weights * n_tokens * n_products)

    def _add(self, context: int, graph: int, weight: int, n_tokens: int) -> list[int]:
        """Add a product to the graph. Return its inputs: activations, and the chosen experts if any."""
        n_rows, n_columns = self.role.shape[-2:]
        if self.role.is_experts:
            # Down projections have an input for each chosen expert, the others have one for all.
            inner = _CHOSEN if n_rows > n_columns else 1
            activations = _tensor(context, GgmlType.F32, n_columns, inner, n_tokens)
            inputs, name = [activations, _tensor(context, GgmlType.I32, _CHOSEN, n_tokens)], "mul_mat_id"
        else:
            inputs, name = [_tensor(context, GgmlType.F32, n_columns, n_tokens)], "mul_mat"
        ggml("build_forward_expand")(graph, ggml(name)(context, weight, *inputs))
        return inputs

    def _fill(self, inputs: Sequence[int], n_tokens: int) -> None:
        random = np.random.default_rng(0)
        _set(inputs[0], random.standard_normal(ggml("nbytes")(inputs[0]) // 4, np.float32))
        for tensor in inputs[1:]:
            ids = np.tile(np.arange(self.role.shape[0], dtype=np.int32), (n_tokens, 1))
            _set(tensor, np.ascontiguousarray(random.permuted(ids, axis=1)[:, :_CHOSEN]))

    def _compute(self, graph: int) -> float:
        began = time.perf_counter()
        ggml("backend_graph_compute")(self.backend, graph)
        return time.perf_counter() - began


def forms_of(kind: GgmlType, role: RoleShape) -> Mapping[str, int]:
    """Return the buffer type of each form in which ggml multiplies by such weights."""
    if role.shape[-1] % block_size(kind):
        return {}
    forms = {_PLAIN: ggml("backend_cpu_buffer_type")()}
    repacked = repack_buffer()
    if repacked and can_repack(kind, role.shape[-1], role.shape[-2], experts=role.is_experts):
        forms[_REPACKED] = repacked
    return forms


def auto_form(kind: GgmlType, role: RoleShape) -> str:
    """Return the form that `--kernels auto` loads."""
    choice = choose_kernels(Kernels.AUTO, [TensorInfo(role.name, role.shape, kind, 0)], offloaded=False)
    return _REPACKED if choice.repacked else _PLAIN


def measure(
    backend: int, kind: GgmlType, role: RoleShape, buffer_type: int, pool: Pool, rounds: int
) -> tuple[float, float]:
    """Return picoseconds for each weight and token: of a prompt, and of decoding."""
    n_bytes = tensor_bytes(kind, role.shape)
    data = np.resize(encoded(kind, role.shape[-1], pool), n_bytes)
    with arena(_CONTEXT_BYTES, allocate=False) as context:
        weights = [_tensor(context, kind, *role.shape[::-1]) for _ in range(-(-_WORKING_SET // n_bytes))]
        with _allocated(context, buffer_type):
            for weight in weights:
                _set(weight, data)
            product = Product(backend, weights, role)
            n_read = n_bytes * (_CHOSEN / role.shape[0] if role.is_experts else 1)
            return (
                product.picoseconds(_PROMPT, 1 if role.is_experts else 4, rounds),
                product.picoseconds(1, int(_WORKING_SET / n_read), rounds),
            )


def main() -> None:
    """Measure and print."""
    given = arguments.parse(__doc__, types=TYPES, rounds=3, threads=physical_cores())
    backend, pool = _backend(given.threads), make_pool(0)
    rows, record = [], {}
    for word in given.types:
        kind = GgmlType.__members__[word]
        cells = [word]
        for role in ROLES:
            found = {
                form: measure(backend, kind, role, buffer_type, pool, given.rounds)
                for form, buffer_type in forms_of(kind, role).items()
            }
            auto = auto_form(kind, role)
            cells += [_cell(found, auto, at) for at in range(2)]
            record[f"{word}, {role.role}"] = {**found, "auto": auto} if found else {}
        say(f"  {cells}")
        rows.append(cells)
    heads = ("type", *(f"{role.role}, {what}" for role in ROLES for what in ("prompt", "decode")))
    show(f"{cpu_name()}, {given.threads} threads, ps for each weight and token", heads, "lrrrrrr", rows)
    print(json.dumps({"cpu": cpu_name(), "threads": given.threads, "rounds": given.rounds, "result": record}))


def _cell(found: Mapping[str, tuple[float, float]], auto: str, at: int) -> str:
    marks = {form: " auto" if form == auto and len(found) > 1 else "" for form in found}
    return " / ".join(f"{times[at]:.1f}{marks[form]}" for form, times in found.items())


if __name__ == "__main__":
    main()
