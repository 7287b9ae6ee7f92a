"""Named points at which a test may kill the process, to prove that nothing is lost there.

`DSMOE_FAULT=point` or `DSMOE_FAULT=point:3` sends SIGKILL when the point is reached for the first or third
time. Without the variable `reach` does nothing. Every point is declared here, so that tests visit them all.
"""

from __future__ import annotations

import os
import signal
import threading

POINTS = {
    "output.created": "the temp file and its empty journal exist",
    "output.header": "the header is written, no tensor yet",
    "output.slab": "a slab of a tensor is written, not synced",
    "output.synced": "tensors are synced, the journal does not say so yet",
    "output.journaled": "the journal names finished tensors",
    "output.complete": "all tensors are written and synced, nothing is verified",
    "output.verified": "the temp file is verified, not renamed",
    "output.renamed": "the final name exists, the journal is still there",
    "shards.spent": "what was made of a downloaded shard is journaled, the shard is still there",
    "batch.spooled": "standard input is kept, nothing is answered",
    "batch.created": "the batch's output exists, empty, without a journal",
    "batch.begun": "the batch's journal exists, without a record",
    "batch.announced": "a group of records is in the journal, not in the output",
    "batch.record": "one record of a group is written, not synced",
    "batch.written": "all records of a group are written, not synced",
    "batch.synced": "a group is synced, the journal does not say so yet",
    "batch.committed": "the journal says that a group is synced, nobody knows yet",
    "batch.complete": "every record counts, nothing is cleaned up",
    "imatrix.written": "a part of an importance matrix is synced, under its temporary name",
    "imatrix.saved": "a part of an importance matrix counts",
    "imatrix.complete": "an importance matrix is complete, and still called a part",
    "session.turn": "a turn is in the transaction of a save, which is not committed",
    "session.saved": "a save is committed, nobody knows yet",
    "session.grown": "a reply that is not finished is stored as far as it came",
    "state.written": "a KV state is written under its temporary name",
    "state.renamed": "a KV state has its name, but no row in the database",
    "state.recorded": "a KV state counts, nobody knows yet",
}

_wanted, _, _ordinal = os.environ.get("DSMOE_FAULT", "").partition(":")
_visits_left = threading.Semaphore(int(_ordinal or "1") - 1 if _wanted else 0)


def reach(point: str) -> None:
    """Die here if the environment says so."""
    if point == _wanted and not _visits_left.acquire(blocking=False):
        os.kill(os.getpid(), signal.SIGKILL)
