"""How fast llama.cpp multiplies by weights of each type, by kind of processor.

On x86, the tiled matrix products (ggml/src/ggml-cpu/tiled) process prompts fastest, but only with weights as
they are in the file. IQ4_NL and Q4_0 have no such products, and are faster repacked (ggml-cpu/repack.cpp).
`--kernels auto` loads each weight in the faster form, and the figures are for that form. On ARM, the list is
taken from repack.cpp (ggml_repack_get_optimal_repack_type) in llama-cpp-python 0.3.36; nothing was measured.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dsmoe_local.model.ggml import GgmlType

CPUS: Mapping[str, Mapping[GgmlType, int]] = MappingProxyType(
    {
        "x86-avx2": {
            GgmlType.Q4_0: 8,
            GgmlType.IQ4_NL: 8,
            GgmlType.Q3_K: 1,
            GgmlType.Q4_K: 1,
            GgmlType.Q5_K: 1,
            GgmlType.Q6_K: 1,
            GgmlType.IQ4_XS: 1,
        },
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


@dataclass(frozen=True, slots=True)
class Speed:
    """The time of one weight and one token, in picoseconds: in a prompt of 512 tokens, and in decoding."""

    prompt: float
    decode: float


_DENSE: Mapping[GgmlType, Speed] = MappingProxyType(
    {
        GgmlType.Q8_0: Speed(9.8, 49.4),
        GgmlType.Q6_K: Speed(4.5, 32.2),
        GgmlType.Q5_K: Speed(4.0, 30.7),
        GgmlType.Q5_1: Speed(25.1, 50.1),
        GgmlType.Q5_0: Speed(11.6, 43.1),
        GgmlType.IQ4_NL: Speed(7.4, 22.4),
        GgmlType.Q4_1: Speed(24.8, 52.9),
        GgmlType.Q4_0: Speed(7.8, 20.9),
        GgmlType.Q4_K: Speed(4.1, 30.7),
        GgmlType.IQ4_XS: Speed(3.8, 30.6),
        GgmlType.Q3_K: Speed(5.2, 29.9),
    }
)
_EXPERTS: Mapping[GgmlType, Speed] = MappingProxyType(
    {
        GgmlType.Q8_0: Speed(19.5, 43.8),
        GgmlType.Q6_K: Speed(8.4, 31.6),
        GgmlType.Q5_K: Speed(5.4, 29.9),
        GgmlType.Q5_1: Speed(25.9, 49.0),
        GgmlType.Q5_0: Speed(26.1, 44.8),
        GgmlType.IQ4_NL: Speed(16.7, 21.7),
        GgmlType.Q4_1: Speed(23.6, 50.5),
        GgmlType.Q4_0: Speed(16.2, 19.9),
        GgmlType.Q4_K: Speed(5.4, 28.0),
        GgmlType.IQ4_XS: Speed(5.1, 29.1),
        GgmlType.Q3_K: Speed(8.0, 25.9),
    }
)
_N_DIMENSIONS_OF_EXPERTS = 3

SPEEDS: Mapping[str, Mapping[bool, Mapping[GgmlType, Speed]]] = MappingProxyType(
    {"x86-avx2": MappingProxyType({False: _DENSE, True: _EXPERTS})}
)
"""Measured speeds, by kind of processor; then of routed experts (True) or of other matrices (False).

From `python -m benchmarks.products` on two cores of an AMD EPYC with AVX-512 VNNI, with llama-cpp-python
0.3.36. Those of experts are means over 2,048 and 1,408 columns where a type fits both. Only their ratios
matter. On other x86 processors they may differ.
"""


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


def speed_of(cpu: str, kind: GgmlType, shape: Sequence[int]) -> Speed | None:
    """Return the measured speed for a weight of this type and shape; None for an unknown processor.

    A type that was not measured, such as F16, counts as the slowest.
    """
    if cpu not in SPEEDS:
        return None
    types = SPEEDS[cpu][len(shape) == _N_DIMENSIONS_OF_EXPERTS]
    return types.get(kind) or max(types.values(), key=lambda speed: speed.prompt)
