"""The reads of all requests of a run, and a check that they were fewer than a full cache's.

In: one account per request. Out: means over decode steps, and an error if a request read the whole cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from farkv.account import Account
from farkv.errors import CacheStateError

# Shorter contexts may be read in full: they consist of recent window and sinks only.
SHORT_TOKENS = 64


@dataclass
class Tally:
    """Sums over requests.

    requests: answered.  unproven: those among them that read everything because the context was short, or had no decode
    step.  steps: decode steps.  dense_tokens: scored during prefill, without the cache.
    """

    is_sparse: bool
    requests: int = 0
    unproven: int = 0
    steps: int = 0
    dense_tokens: int = 0
    read: float = 0.0
    index: float = 0.0

    def add(self, account: Account, n_dense: int = 0) -> None:
        """Add one request.

        Raises:
            CacheStateError: a sparse method read all records of a long context.
        """
        read, steps = account.read_fraction(), account.decode_steps
        if self.is_sparse and steps and read >= 1 and account.context_tokens >= SHORT_TOKENS:
            raise CacheStateError(
                f"lm_eval: expected decode steps to read less than the cache holds, got all of its "
                f"{account.context_tokens} tokens in {steps} steps, so the result is the full cache's; lower fraction, "
                "or use method=full"
            )
        self.requests += 1
        self.unproven += self.is_sparse and (not steps or read >= 1)
        self.steps += steps
        self.dense_tokens += n_dense
        self.read += read * steps
        self.index += account.index_fraction() * steps

    def to_dict(self) -> dict[str, float]:
        """Return the means per decode step, and the counts."""
        steps = max(1, self.steps)
        return {
            "requests": self.requests,
            "unproven": self.unproven,
            "decode_steps": self.steps,
            "dense_tokens": self.dense_tokens,
            "read_fraction": self.read / steps,
            "index_fraction": self.index / steps,
        }

    def __str__(self) -> str:
        """Return the summary line of a run."""
        means = self.to_dict()
        return (
            f"read fraction {means['read_fraction']:.4f} + index fraction {means['index_fraction']:.4f} over "
            f"{self.steps} decode steps of {self.requests} requests; unproven (too short): {self.unproven}; "
            f"tokens scored without the cache: {self.dense_tokens}"
        )
