"""From running sequences to the rows of a step: which tokens, which get logits. Decides no order."""

from __future__ import annotations

from collections.abc import Sequence as Several

from dsmoe_local.engine.schedule.plan import Sequence, StepRow


def decode_rows(decoding: Several[Sequence]) -> tuple[StepRow, ...]:
    """The newest token of each."""
    return tuple(StepRow(sequence, sequence.n_cached, 1, 1) for sequence in decoding)


def prefill_rows(reading: Several[Sequence], room: int) -> tuple[StepRow, ...]:
    """Tokens of prompts, one prompt after another, while there is `room`; at least one."""
    rows = []
    room = max(1, room)
    for sequence in reading:
        if room <= 0:
            break
        start, end = sequence.n_cached, len(sequence.tokens)
        count = min(room, end - start)
        n_outputs = int(start + count == end)
        if sequence.score_from is not None:
            n_outputs = max(n_outputs, start + count - max(start, sequence.score_from))
        rows.append(StepRow(sequence, start, count, n_outputs))
        room -= count
    return tuple(rows)
