"""The types for which llama.cpp has fast kernels, by kind of processor.

llama.cpp repacks (interleaves) the rows of tensors of such types when it loads them, and then multiplies
several rows at once. Taken from ggml/src/ggml-cpu/repack.cpp (ggml_repack_get_optimal_repack_type) in
llama-cpp-python 0.3.36. It helps decoding most: in prefill, forward_mul_mat_id multiplies repacked routed
experts by one token at a time, and other types in tiles.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from dsmoe_local.model.ggml import GgmlType

CPUS: Mapping[str, Mapping[GgmlType, int]] = MappingProxyType(
    {
        "x86-avx2": {GgmlType.Q4_0: 8, GgmlType.Q4_K: 8, GgmlType.IQ4_NL: 8},
        "arm-dotprod": {
            GgmlType.Q4_0: 4,
            GgmlType.Q4_K: 8,
            GgmlType.Q5_K: 8,
            GgmlType.Q6_K: 8,
            GgmlType.Q8_0: 4,
            GgmlType.IQ4_NL: 4,
        },
        "none": {},
    }
)
"""The types with fast kernels, by kind of processor, and the number that must divide a tensor's rows."""


def this_cpu() -> str:
    """Return the kind of this machine's processor; `none` if it has no fast kernels or is unknown."""
    machine = platform.machine().lower()
    if sys.platform == "darwin" and machine == "arm64":
        return "arm-dotprod"
    words: set[str] = set()
    with suppress(OSError):
        words = set(Path("/proc/cpuinfo").read_text(errors="replace").split())
    if machine in ("x86_64", "amd64") and "avx2" in words:
        return "x86-avx2"
    if machine == "aarch64" and "asimddp" in words:
        return "arm-dotprod"
    return "none"


def is_fast(cpu: str, kind: GgmlType, shape: Sequence[int]) -> bool:
    """True if `cpu` has a fast kernel for a matrix of this type and shape (rows and columns last)."""
    multiple = CPUS[cpu].get(kind)
    return multiple is not None and shape[-2] % multiple == 0
