"""The order of work: common beginnings together, long jobs early. Pure: no files, no engine."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import groupby, pairwise

from dsmoe_local.batch.workload import BYTES_A_TOKEN, UNSET_TOKENS, prompt_bytes
from dsmoe_local.engine.types import Message, Prompt, Request

_PREFIX_BYTES = (64, 256, 1024, 4096)
_BITS = 16
_MOST_COST = 2**32 - 1


def prefix_signature(prompt: Prompt) -> int:
    """Hashes of ever longer beginnings of a prompt, the shortest in the highest bits.

    Sorted by it, prompts that share more lie closer. A chance collision costs speed only.
    """
    text = b"".join(_pieces(prompt, _PREFIX_BYTES[-1]))
    digest = blake2b(digest_size=_BITS // 8)
    signature = begin = 0
    for end in _PREFIX_BYTES:
        digest.update(text[begin:end])
        signature = signature << _BITS | int.from_bytes(digest.digest(), "little")
        begin = end
    return signature


def shared_bytes(order: Iterable[int], signatures: Sequence[int], lengths: Sequence[int]) -> int:
    """How much of the prompts, about, is a beginning of the one before: at most 4 KiB of each is seen."""
    shared = 0
    for before, after in pairwise(order):
        differing = (signatures[before] ^ signatures[after]).bit_length()
        n_common = len(_PREFIX_BYTES) - -(-differing // _BITS)
        if n_common:
            shared += min(_PREFIX_BYTES[n_common - 1], lengths[before], lengths[after])
    return shared


def cost_of(request: Request) -> int:
    """A guess at the work: what may be generated, and what must be read, a tenth as dear."""
    n_generated = request.n * (request.max_tokens or UNSET_TOKENS)
    return min(10 * n_generated + prompt_bytes(request.prompt) // 4, _MOST_COST)


def _pieces(prompt: Prompt, limit: int) -> Iterator[bytes]:
    if isinstance(prompt, str):
        yield prompt[:limit].encode()
        return
    for item in prompt[:limit]:
        if isinstance(item, Message):
            yield f"{item.role}\n{item.content[:limit]}\n".encode()
        else:
            # As many bytes as `shared_bytes` takes for a token.
            yield item.to_bytes(BYTES_A_TOKEN, "little", signed=True) if -(2**31) <= item < 2**31 else b"????"


def work_order(
    positions: Iterable[int], signatures: Sequence[int], costs: Sequence[int], *, ordered: bool
) -> array[int]:
    """`positions` in the order in which to start them; `ordered`: as they come.

    Lines that share a beginning form a group, groups in it likewise. Groups, and lines in the innermost, go
    by their longest job, longest first: what is still running in the end is short.
    """
    if ordered:
        return array("I", positions)
    by_signature = sorted(positions, key=signatures.__getitem__)
    return array("I", _arranged(by_signature, signatures, costs, level=len(_PREFIX_BYTES) - 1))


def _arranged(
    positions: list[int], signatures: Sequence[int], costs: Sequence[int], level: int
) -> Iterator[int]:
    if level < 0 or len(positions) < 2:
        yield from sorted(positions, key=lambda position: -costs[position])
        return
    shift = level * _BITS
    starts = array("I")
    longest: list[int] = []
    begin = 0
    for _, members in groupby(positions, key=lambda position: signatures[position] >> shift):
        group = list(members)
        starts.append(begin)
        longest.append(max(costs[position] for position in group))
        begin += len(group)
    starts.append(begin)
    for at in sorted(range(len(longest)), key=lambda at: -longest[at]):
        group = positions[starts[at] : starts[at + 1]]
        yield from _arranged(group, signatures, costs, level - 1)
