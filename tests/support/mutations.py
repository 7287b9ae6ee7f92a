"""Damaged copies of files, and a judge of what a reader makes of them: an error of ours, or a result.

Each mutant has a seed of its own, so a failure names what reproduces it.
"""

from __future__ import annotations

import copy
import json
import random
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import safe_line

SECONDS = 5
"""What one reading may take, in time of the processor: others may use it, too."""
MEMORY = 1 << 30
"""What readings may add to the process's address space."""

_EDGES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, 1 << 62)
_EDGES_64 = (*_EDGES, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    1.5,
    1e308,
    -0.0,
    1 << 31,
    1 << 63,
    10**30,
    "",
    "0",
    "\x00",
    "\x1b[2J\u202e",
    "\ud800",
    "../x",
    "a" * 300,
    [],
    [[]],
    [0],
    {},
    {"": None},
)
_ODD_TEXTS = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\xff",
    b"\x00",
    b"",
)


class TookTooLongError(AssertionError):
    """A reading did not end in time."""


@dataclass(frozen=True)
class Outcome:
    """How many mutants were accepted, and how many refused."""

    accepted: int
    refused: int


def try_mutants(read: Callable[[random.Random], object], n: int, seed: int) -> Outcome:
    """Call `read` with n generators, each to make a mutant and read it.

    Fails for any exception but ours, messages that are too long or not printable, a reading that takes more
    than SECONDS, memory beyond MEMORY, and mutants that are all accepted, or all refused: those are no test.
    """
    accepted = 0
    with _bounded_memory(), _alarms():
        for number in range(n):
            name = f"{seed}:{number}"
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                read(random.Random(name))
                accepted += 1
            except DsmoeError as error:
                _check_message(error, name)
            except BaseException as error:
                signal.setitimer(signal.ITIMER_PROF, 0)
                raise AssertionError(f"the mutant {name!r} raises {type(error).__name__}: {error}") from error
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    outcome = Outcome(accepted, n - accepted)
    assert outcome.accepted, "every mutant is refused"
    assert outcome.refused, "no mutant is refused"
    return outcome


def _check_message(error: DsmoeError, name: str) -> None:
    lines = str(error).split("\n")
    assert len(lines) <= 3, f"the message for the mutant {name!r} is too long"
    for line in lines:
        assert line == safe_line(line, len(line)), f"the message for the mutant {name!r} is not safe"


@contextmanager
def _alarms() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise TookTooLongError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """A MemoryError for what takes more than MEMORY. Where /proc is missing there is no limit."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """`content` with one to four changes: bits, bytes, numbers at their limits, spans cut out or doubled."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _damage(data, rng)
    return bytes(data)


def _damage(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data)) if data else 0
    span = slice(at, at + rng.choice((1, 2, 4, 8, 16, rng.randrange(1, 200))))

    def number(size: int, edges: tuple[int, ...]) -> None:
        data[at : at + size] = (rng.choice(edges) % (1 << 8 * size)).to_bytes(size, "little")

    def flip() -> None:
        if data:
            data[at] ^= 1 << rng.randrange(8)

    def another_place() -> None:
        data[at:at] = data[rng.randrange(len(data) + 1) :][: span.stop - span.start]

    changes: tuple[Callable[[], object], ...] = (
        flip,
        lambda: data.__setitem__(slice(at, at + 1), rng.randbytes(1)),
        lambda: number(4, _EDGES),
        lambda: number(8, _EDGES_64),
        lambda: data.__delitem__(span),
        another_place,
        lambda: data.__setitem__(slice(at, at), rng.randbytes(rng.randrange(1, 9))),
        lambda: data.__delitem__(slice(at, None)),
    )
    # Cutting leaves little to look at: seldom.
    rng.choices(changes, weights=(4, 4, 4, 4, 2, 2, 2, 1))[0]()


def damaged_text(content: bytes, rng: random.Random, odd: tuple[bytes, ...] = _ODD_TEXTS) -> bytes:
    """As `damaged_bytes`, of a text: words take the place of others, or something `odd` comes in."""
    kind = rng.random()
    if kind < 0.2:
        return damaged_bytes(content, rng)
    if kind < 0.3:
        at = rng.randrange(len(content) + 1)
        return content[:at] + rng.choice(odd) + content[at + rng.choice((0, 0, 1, 4)) :]
    words = list(re.finditer(rb"[\w.-]+|\n+", content))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        (start, end), word = rng.choice(words).span(), rng.choice(words)[0]
        content = content[:start] + word + content[end:]
    return content


def damaged_json(value: object, rng: random.Random) -> bytes:
    """A JSON text of `value` with a few nodes changed; sometimes the text itself is damaged."""
    if rng.random() < 0.25:
        return damaged_text(json.dumps(value).encode(), rng)
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changed = _change_node(changed, rng)
    return json.dumps(changed).encode()


def _change_node(root: Any, rng: random.Random) -> Any:
    """`root` with one node replaced, removed, renamed or doubled; any depth is as likely as any other."""
    node = root
    while True:
        if not isinstance(node, dict | list) or not node:
            return _odd_value(rng)
        key: Any = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        _change_entry(node, key, rng)
        return root


def _change_entry(node: Any, key: Any, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice((f"{key}x", "", "type", str(key)[::-1]))] = node.pop(key)
    elif kind == 2 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[key]))
    elif kind == 3 and isinstance(node, dict) and len(node) > 1:
        node[key] = copy.deepcopy(node[rng.choice(list(node))])
    elif kind == 4 and type(node[key]) in (int, float):
        node[key] = rng.choice((node[key] + 1, -node[key], node[key] * 1000, 0, float(node[key])))
    else:
        node[key] = _odd_value(rng)


def _odd_value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_ODD_VALUES))
