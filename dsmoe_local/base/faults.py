"""Named points at which tests kill the process, to prove that nothing is lost.

`DSMOE_FAULT=point` or `DSMOE_FAULT=point:3` sends SIGKILL when the point is reached for the first or third
time. Without the variable, `reach` does nothing. All points are declared here, so that tests can visit each.
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
    "split.renamed": "a file of a split output has its final name, the first has not",
    "output.renamed": "the final name exists, the journal is still there",
    "calibration.outputs": "the outputs of an unrounded layer are stored",
    "calibration.states": "the hidden states before a layer are stored, the layer before is not",
    "calibration.layer": "a calibrated layer is stored, the journal does not say so yet",
    "calibration.journaled": "the journal names a calibrated layer, its inputs are still there",
    "shards.spent": "all tensors of a downloaded shard are journaled, the shard is still there",
    "pull.downloaded": "a file of a model is downloaded, not verified",
    "pull.verified": "all files of a model are verified and synced, none has its final name",
    "pull.renamed": "a file of a split model has its final name, the first has not",
    "batch.spooled": "standard input is saved, nothing is answered",
    "batch.created": "the batch's output exists, empty, without a journal",
    "batch.begun": "the batch's journal exists, without a record",
    "batch.announced": "a group of records is in the journal, not in the output",
    "batch.record": "one record of a group is written, not synced",
    "batch.written": "all records of a group are written, not synced",
    "batch.synced": "a group is synced, the journal does not say so yet",
    "batch.committed": "the journal says that a group is synced, it is not reported yet",
    "batch.complete": "every record is journaled, nothing is cleaned up",
    "parquet.verified": "the batch's Parquet file is verified, but has its temporary name",
    "parquet.renamed": "the batch's Parquet file has its name, nothing is uploaded or cleaned up",
    "upload.sent": "the batch's output is uploaded under a temporary name",
    "imatrix.written": "a part of an importance matrix is synced, under its temporary name",
    "imatrix.saved": "a part of an importance matrix has its final name",
    "imatrix.complete": "an importance matrix is complete, but still has the name of a part",
    "session.turn": "a turn is in the transaction of a save, which is not committed",
    "session.saved": "a save is committed, it is not reported yet",
    "session.grown": "the finished part of a growing reply is stored",
    "state.written": "a KV state is written under its temporary name",
    "state.renamed": "a KV state has its name, but no row in the database",
    "state.recorded": "a KV state is in the database, it is not reported yet",
}

_wanted, _, _ordinal = os.environ.get("DSMOE_FAULT", "").partition(":")
_visits_left = threading.Semaphore(int(_ordinal or "1") - 1 if _wanted else 0)


def reach(point: str) -> None:
    """Kill the process if the environment names this point."""
    if point == _wanted and not _visits_left.acquire(blocking=False):
        os.kill(os.getpid(), signal.SIGKILL)
