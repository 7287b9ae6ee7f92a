"""Chooses how the CPU computes with each weight: repacked, or as it is stored in the file.

llama.cpp repacks every weight it can, which is the fastest form for decoding. On x86, its tiled matrix
products (ggml/src/ggml-cpu/tiled) process prompts faster, but only with weights that are not repacked. They
exist for the types in `_TILED`; weights of other types are faster repacked.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine import native
from dsmoe_local.engine.types import CHAT_RATIO
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import TensorInfo
from dsmoe_local.model.layout import GroupKind, group_kind_of, layer_of

_X86 = frozenset({"x86_64", "amd64"})
_TILED = frozenset(kind for kind in GgmlType if re.fullmatch(r"Q[2-6]_K|IQ4_XS|IQ[123]_\w+", kind.name))
_EXPERTS = "_exps.weight"
_MIN_RATIO = 2.0
"""Prompt tokens per token of a reply from which tiled products save more time than they cost, as measured
with Q4_K (docs/performance.md)."""
_REPACKED_ROWS = 4  # repacked weights are multiplied by groups of so many rows, and by the other rows singly
_TILED_ROWS = 8  # ggml's tiled products take experts with at least so many rows


class Kernels(StrEnum):
    """The form of the weights in main memory.

    REPACK: all that can be are repacked, as in llama.cpp. TILED: weights with tiled products are as in the
    file, others are repacked. PLAIN: all are as in the file. AUTO: the fastest of these for the job.
    """

    AUTO = "auto"
    REPACK = "repack"
    TILED = "tiled"
    PLAIN = "plain"


FORMS = (Kernels.REPACK, Kernels.TILED, Kernels.PLAIN)


@dataclass(frozen=True, slots=True)
class FormSpeed:
    """Tokens per second with a form of the weights, above 0."""

    prompt: float
    decode: float


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """How weights are loaded for the CPU.

    `repack_all`: llama.cpp repacks every weight it can. Otherwise it repacks those whose names match one of
    the regular expressions in `repacked`. `about` says what was chosen, and `reason` why.
    """

    repack_all: bool
    repacked: tuple[str, ...]
    about: str
    reason: str


def choose_kernels(
    wanted: Kernels,
    tensors: Sequence[TensorInfo],
    *,
    offloaded: bool,
    prompt_ratio: float = CHAT_RATIO,
    measured: Mapping[Kernels, FormSpeed] | None = None,
) -> KernelChoice:
    """Choose for weights in main memory that need not be paged.

    `offloaded`: some layers are on a GPU. `prompt_ratio`: see `ModelOptions`. `measured` are the speeds of
    the model on this machine.
    """
    form, reason = wanted, "as requested"
    if wanted is Kernels.AUTO:
        form, reason = _fastest(prompt_ratio, measured or {})
    if form is Kernels.PLAIN:
        return plain(reason)
    if form is Kernels.REPACK:
        return _repack_all(reason)
    obstacle = _obstacle(tensors, offloaded=offloaded)
    if obstacle:
        return _repack_all(obstacle)
    names = [tensor.name for tensor in tensors if _is_faster_repacked(tensor)]
    if not names:
        return plain(reason)
    return KernelChoice(
        False, _patterns(names), f"{len(names)} weights repacked, others as in the file", reason
    )


def plain(reason: str) -> KernelChoice:
    """Return the choice to repack nothing."""
    return KernelChoice(False, (), "weights as in the file", reason)


def _repack_all(reason: str) -> KernelChoice:
    return KernelChoice(True, (), "weights repacked", reason)


def fastest_form(prompt_ratio: float, measured: Mapping[Kernels, FormSpeed]) -> Kernels:
    """Return the form with which a reply token and `prompt_ratio` prompt tokens take the least time."""
    return min(measured, key=lambda form: prompt_ratio / measured[form].prompt + 1 / measured[form].decode)


def _fastest(prompt_ratio: float, measured: Mapping[Kernels, FormSpeed]) -> tuple[Kernels, str]:
    """Return the fastest form for a job, and the reason."""
    if measured:
        return fastest_form(prompt_ratio, measured), "the fastest for this job, as measured on this machine"
    if prompt_ratio >= _MIN_RATIO:
        return Kernels.TILED, "faster for prompts"
    return Kernels.REPACK, "faster for replies"


def _obstacle(tensors: Iterable[TensorInfo], *, offloaded: bool) -> str:
    """Return why tiled products cannot be used; "" if they can."""
    if not _is_x86():
        return "this processor has no tiled products"
    # A buffer type for weights in main memory would also take them from the GPU.
    if offloaded:
        return "a part of the model is on a GPU"
    if native.repack_buffer() is None:
        return "this build of llama.cpp has other kernels"
    # A weight of an unknown kind may be used by other operations than products.
    if any(group_kind_of(tensor.name) is None and _can_repack(tensor) for tensor in tensors):
        return "the model has weights of an unknown kind"
    return ""


def _is_x86() -> bool:
    return platform.machine().lower() in _X86


def _is_faster_repacked(tensor: TensorInfo) -> bool:
    is_embedding = group_kind_of(tensor.name) is GroupKind.EMBEDDING
    return tensor.type not in _TILED and not is_embedding and _can_repack(tensor)


def _can_repack(tensor: TensorInfo) -> bool:
    # ggml repacks only matrices and stacks of experts.
    experts = tensor.name.endswith(_EXPERTS)
    if len(tensor.shape) != (3 if experts else 2):
        return False
    n_rows, n_columns = tensor.shape[-2:]
    return native.can_repack(tensor.type, n_columns, n_rows, experts=experts)


def check_deterministic(choice: KernelChoice, tensors: Iterable[TensorInfo], n_parallel: int) -> None:
    """Raise UsageError if the number of rows computed together would change the last digits of a reply.

    In the deterministic mode each step decodes `n_parallel` rows. The number of rows of an expert varies.
    """
    tensors = list(tensors)
    if n_parallel <= _REPACKED_ROWS:
        return
    is_repacked = choice.repack_all or choice.repacked
    if is_repacked and n_parallel % _REPACKED_ROWS and any(map(_can_repack, tensors)):
        raise UsageError(
            f"--deterministic with --parallel {n_parallel}: the place of a request would change its reply",
            remedy=f"use a multiple of {_REPACKED_ROWS}",
        )
    stored = (each for each in tensors if not (choice.repack_all and _can_repack(each)))
    is_tiled = _is_x86() and any(each.type in _TILED and each.name.endswith(_EXPERTS) for each in stored)
    if is_tiled and n_parallel >= _TILED_ROWS:
        raise UsageError(
            f"--deterministic with --parallel {n_parallel}: other requests would change a reply, since"
            f" experts with {_TILED_ROWS} rows or more are computed in another way",
            remedy=f"use --parallel {_REPACKED_ROWS}",
        )


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
