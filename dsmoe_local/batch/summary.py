"""Count what a batch has done, and describe it in one line."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from typing import Any

from dsmoe_local.base.text import count
from dsmoe_local.batch.records import Failure, Outcome

_SPEED_SECONDS = 15.0
_MOST_KINDS = 4
# Kinds of failures: those of RequestError, and the error codes of records.
_KINDS = {
    "not_json": "not JSON",
    "not_utf8": "not UTF-8",
    "not_csv": "not a row of the table",
    "too_long": "too long",
    "missing_field": "with a field missing",
    "invalid_request": "with an invalid request",
    "context_length_error": "with a prompt that is longer than the context",
    "prompt_error": "with a prompt that the model cannot take",
    "template_error": "with messages that the chat template refuses",
    "native_error": "because llama.cpp failed",
    "engine_crash_error": "because the engine crashed",
    "worker_lost_error": "because their workers were lost",
}


def failures_in_words(failures: Counter[str]) -> str:
    """Describe failures, as in "3 lines failed (2 not JSON, 1 with a field missing)"."""
    kinds = [f"{n:,} {_KINDS.get(kind, kind.replace('_', ' '))}" for kind, n in failures.most_common()]
    if len(kinds) > _MOST_KINDS:
        kinds[_MOST_KINDS:] = ["and others"]
    return f"{count(failures.total(), 'line')} failed ({', '.join(kinds)})"


@dataclass(slots=True)
class WorkerSummary:
    """What a worker of a cluster has done. `n_tokens` are generated ones, `seconds` the time until its last
    report.
    """

    node: str
    n_records: int = 0
    n_tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class BatchSummary:
    """What a batch has done.

    `n_records` counts the synced records; `n_resumed` of them are from earlier runs. `failures` counts the
    lines of the input whose record has no reply, by kind. Token counts and seconds are those of this run.
    `workers` are those of a cluster, by name.
    """

    n_requests: int = 0
    n_records: int = 0
    n_resumed: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_completion_tokens: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    workers: dict[str, WorkerSummary] = field(default_factory=dict)

    @property
    def n_failed(self) -> int:
        """Lines whose record has no reply."""
        return self.failures.total()

    def count_tokens(self, outcome: Outcome) -> None:
        """Add the tokens of one outcome."""
        if not isinstance(outcome, Failure):
            self.n_prompt_tokens += outcome.n_prompt_tokens
            self.n_cached_tokens += outcome.n_cached_tokens
            self.n_completion_tokens += outcome.n_completion_tokens

    @property
    def cached_share(self) -> float:
        """The share of prompt tokens that were in the KV cache, from 0 to 1."""
        return self.n_cached_tokens / self.n_prompt_tokens if self.n_prompt_tokens else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        seconds = self.seconds or 1.0
        values = asdict(self)
        workers = [
            {**worker, "tokens_per_second": round(worker["n_tokens"] / (worker["seconds"] or 1.0), 2)}
            for worker in values.pop("workers").values()
        ]
        return {
            **values,
            "n_failed": self.n_failed,
            # asdict does not copy a Counter correctly.
            "failures": dict(self.failures),
            "seconds": round(self.seconds, 3),
            "prompt_tokens_per_second": round(self.n_prompt_tokens / seconds, 2),
            "completion_tokens_per_second": round(self.n_completion_tokens / seconds, 2),
            "cached_share": round(self.cached_share, 4),
            **({"workers": workers} if workers else {}),
        }

    def in_words(self) -> str:
        """Return the summary as one line of text."""
        seconds = self.seconds or 1.0
        parts = [count(self.n_records, "record")]
        if self.n_resumed:
            parts.append(f"{self.n_resumed:,} of them from earlier runs")
        if self.failures:
            parts.append(failures_in_words(self.failures))
        return (
            f"{', '.join(parts)}; {self.seconds:.1f} s: "
            f"{count(self.n_prompt_tokens, 'token')} read ({self.n_prompt_tokens / seconds:.0f}/s, "
            f"{self.cached_share:.0%} cached), {self.n_completion_tokens:,} generated "
            f"({self.n_completion_tokens / seconds:.0f}/s)"
            + (f", by {count(len(self.workers), 'worker')}" if self.workers else "")
        )


class Speedometer:
    """Tokens per second over the last _SPEED_SECONDS."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque([(time.perf_counter(), 0, 0)])

    def detail(self, summary: BatchSummary, n_running: int) -> str:
        """Return the current speeds. `n_running` counts the tokens of unfinished replies."""
        n_out = summary.n_completion_tokens + n_running
        self._samples.append((time.perf_counter(), summary.n_prompt_tokens, n_out))
        while len(self._samples) > 2 and self._samples[-1][0] - self._samples[0][0] > _SPEED_SECONDS:
            self._samples.popleft()
        (began, read, generated), (now, _, _) = self._samples[0], self._samples[-1]
        seconds = max(now - began, 1e-3)
        parts = [
            f"in {(summary.n_prompt_tokens - read) / seconds:.0f}/s",
            f"out {max(n_out - generated, 0) / seconds:.0f}/s",
            f"cached {summary.cached_share:.0%}",
        ]
        if summary.n_failed:
            parts.insert(0, f"{summary.n_failed} failed")
        return " ".join(parts)
