"""What a batch has done so far: counts, speeds, and one line of each for people. Draws nothing."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from dsmoe_local.batch.responses import Failure, Outcome

_SPEED_SECONDS = 15.0


@dataclass(slots=True)
class BatchSummary:
    """What came of it. Records count once they are on the disk; `n_resumed` of them were there before. Tokens
    are this run's.
    """

    n_requests: int = 0
    n_records: int = 0
    n_failed: int = 0
    n_resumed: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_completion_tokens: int = 0
    seconds: float = 0.0

    def count_tokens(self, outcome: Outcome) -> None:
        """Add what one reply took."""
        if not isinstance(outcome, Failure):
            self.n_prompt_tokens += outcome.n_prompt_tokens
            self.n_cached_tokens += outcome.n_cached_tokens
            self.n_completion_tokens += outcome.n_completion_tokens

    @property
    def cached_share(self) -> float:
        """Prompt tokens that had been read before, of all."""
        return self.n_cached_tokens / self.n_prompt_tokens if self.n_prompt_tokens else 0.0

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        seconds = self.seconds or 1.0
        return {
            **asdict(self),
            "seconds": round(self.seconds, 3),
            "prompt_tokens_per_second": round(self.n_prompt_tokens / seconds, 2),
            "completion_tokens_per_second": round(self.n_completion_tokens / seconds, 2),
            "cached_share": round(self.cached_share, 4),
        }

    def in_words(self) -> str:
        """For people."""
        seconds = self.seconds or 1.0
        resumed = f", {self.n_resumed} of them before" if self.n_resumed else ""
        return (
            f"{self.n_records} records ({self.n_failed} failed){resumed} in {self.seconds:.1f} s: "
            f"{self.n_prompt_tokens} tokens read ({self.n_prompt_tokens / seconds:.0f}/s, "
            f"{self.cached_share:.0%} cached), {self.n_completion_tokens} generated "
            f"({self.n_completion_tokens / seconds:.0f}/s)"
        )


class Speedometer:
    """Tokens per second over the last moments."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque([(time.perf_counter(), 0, 0)])

    def detail(self, summary: BatchSummary, n_running: int) -> str:
        """Speeds now, given totals and the tokens of replies that are not finished."""
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
