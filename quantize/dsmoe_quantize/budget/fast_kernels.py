"""Which types llama.cpp has fast kernels for, by kind of processor: it interleaves ("repacks") the rows of a
tensor of such a type when it is loaded, and multiplies several rows at once.

Read from ggml/src/ggml-cpu/repack.cpp of llama.cpp (ggml_repack_get_optimal_repack_type) as llama-cpp-python
0.3.36 brings it. It matters most for decoding: of a prompt, forward_mul_mat_id there multiplies routed
experts by one token after another, which other types do in tiles.
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
"""By kind of processor: the types, and of which number the rows must be a multiple."""


def this_cpu() -> str:
    """The kind of the processor that this runs on; `none` if it has no fast kernels, or is not known."""
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
    """Whether a matrix of this type and shape, rows and columns last, has a fast kernel on `cpu`."""
    multiple = CPUS[cpu].get(kind)
    return multiple is not None and shape[-2] % multiple == 0
