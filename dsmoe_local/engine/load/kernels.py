"""Chooses how the CPU computes with each weight: repacked, or as it is stored in the file.

llama.cpp repacks every weight it can. On x86, its tiled matrix products (ggml/src/ggml-cpu/tiled) process
prompts faster, but only with weights that are not repacked. They exist for the types below; for other types,
repacked weights are faster.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from dsmoe_local.engine import native
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import TensorInfo
from dsmoe_local.model.layout import GroupKind, group_kind_of, layer_of

_X86 = frozenset({"x86_64", "amd64"})
_TILED = frozenset(kind for kind in GgmlType if re.fullmatch(r"Q[2-6]_K|IQ4_XS|IQ[123]_\w+", kind.name))
_EXPERTS = "_exps.weight"


class Kernels(StrEnum):
    """The user's choice.

    REPACK: repack all weights that can be, as llama.cpp does. AUTO: choose the form of each weight that is
    faster for prompts. PLAIN: repack none.
    """

    AUTO = "auto"
    REPACK = "repack"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """How weights are loaded for the CPU.

    `repack_all`: llama.cpp repacks every weight it can. Otherwise it repacks those whose names match one of
    the regular expressions in `repacked`. `about` tells the user.
    """

    repack_all: bool
    repacked: tuple[str, ...]
    about: str


REPACK_ALL = KernelChoice(True, (), "weights repacked")
PLAIN = KernelChoice(False, (), "weights as in the file")


def choose_kernels(wanted: Kernels, tensors: Iterable[TensorInfo], *, offloaded: bool) -> KernelChoice:
    """Choose for weights in main memory that need not be paged. `offloaded`: some layers are on a GPU."""
    if wanted is Kernels.PLAIN:
        return PLAIN
    # A buffer type for weights in main memory would also take them from the GPU.
    is_known = platform.machine().lower() in _X86 and native.repack_buffer() is not None
    if wanted is Kernels.REPACK or offloaded or not is_known:
        return REPACK_ALL
    faster = [tensor.name for tensor in tensors if _is_faster_repacked(tensor)]
    # A weight of an unknown kind may be used by other operations than products.
    if any(group_kind_of(name) is None for name in faster):
        return REPACK_ALL
    names = [name for name in faster if group_kind_of(name) is not GroupKind.EMBEDDING]
    if not names:
        return PLAIN
    return KernelChoice(False, _patterns(names), f"{len(names)} weights repacked, others as in the file")


def _is_faster_repacked(tensor: TensorInfo) -> bool:
    experts = tensor.name.endswith(_EXPERTS)
    # ggml repacks only matrices and stacks of experts.
    if tensor.type in _TILED or len(tensor.shape) != (3 if experts else 2):
        return False
    n_rows, n_columns = tensor.shape[-2:]
    return native.can_repack(tensor.type, n_columns, n_rows, experts=experts)


def _patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Return regular expressions that match exactly these names, one for each name without its layer."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layer = layer_of(name)
        kind = name if layer is None else name.removeprefix(f"blk.{layer}.")
        layers.setdefault(kind, []).append("" if layer is None else str(layer))
    return tuple(
        f"^{re.escape(kind)}$" if found == [""] else rf"^blk\.({'|'.join(found)})\.{re.escape(kind)}$"
        for kind, found in layers.items()
    )
