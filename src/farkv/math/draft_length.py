"""How many tokens to draft before the next verification, from what was accepted and what the passes cost.

In: measured passes and acceptances. Out: the length whose tokens come fastest; 0 where drafting does not pay. Drafts
come from sparse steps, or are copied from the text, which costs nothing.

  tokens(k) = (1 - a^(k + 1)) / (1 - a),  seconds(k) = k draft_s + verify_s(k + 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

# A pass takes the middle one of so many measurements: the first draft builds an index, and other work may interfere.
_MEASURED = 5
# Weight of the newest drafted token in the acceptance.
_NEW_TOKEN = 0.06
# Tokens between two tries of drafting where it does not pay.
_RETRY = 64
_FIRST = 4
# Tokens drafted at a time, at most.
MOST_DRAFTED = 16
# Where drafts come from.
DRAFTED, COPIED = False, True


def count_tokens(acceptance: float, k: int) -> float:
    """Return the tokens that a verification of k drafted ones yields, one of its own included."""
    return k + 1.0 if acceptance >= 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


@dataclass
class DraftLength:
    """The state of one generation.

    most: tokens drafted at a time, at most.  fixed: always so many; None: as they pay.  draft_s: of sparse steps.
    verify_s: of passes over so many tokens.  acceptance: of a drafted token, and of a copied one.  plain: tokens since
    drafting was tried.
    """

    most: int = MOST_DRAFTED
    fixed: int | None = None
    acceptance: dict[bool, float] = field(default_factory=lambda: {DRAFTED: 0.8, COPIED: 0.5})
    draft_s: list[float] = field(default_factory=list)
    verify_s: dict[int, list[float]] = field(default_factory=dict)
    plain: int = 0

    def choose(self, n_copied: int = 0) -> tuple[int, bool]:
        """Return how many tokens to draft now, and whether they are copied.

        Args:
            n_copied: tokens that could be copied.
        """
        if self.fixed is not None:
            return self.fixed, DRAFTED
        if 1 not in self.verify_s:
            # What plain decoding costs is measured first: that is what drafting must beat.
            return 0, DRAFTED
        best, rate = (0, DRAFTED), self.estimate_rate(0, DRAFTED)
        for k in range(1, self.most + 1):
            for copied in (DRAFTED, COPIED) if k <= n_copied else (DRAFTED,):
                if (mine := self.estimate_rate(k, copied)) > rate:
                    best, rate = (k, copied), mine
        if best == (0, DRAFTED) and self.plain >= _RETRY:
            return min(2, self.most), DRAFTED
        if best[1] == DRAFTED and not self.draft_s:
            return min(_FIRST, self.most), DRAFTED
        return best

    def estimate_rate(self, k: int, copied: bool) -> float:
        """Return the tokens per second of rounds with k drafted tokens."""
        draft_s = 0.0 if copied or not self.draft_s else median(self.draft_s)
        return count_tokens(self.acceptance[copied], k) / (k * draft_s + self.estimate_verify_s(k + 1))

    def estimate_verify_s(self, n: int) -> float:
        """Return the seconds of a pass over n tokens: between two that were measured, on a line."""
        below = max((m for m in self.verify_s if m <= n), default=None)
        above = min((m for m in self.verify_s if m >= n), default=None)
        if below is None or above is None or below == above:
            known = above if below is None else below
            return math.inf if known is None else median(self.verify_s[known])
        share = (n - below) / (above - below)
        return (1 - share) * median(self.verify_s[below]) + share * median(self.verify_s[above])

    def note_draft(self, seconds: float) -> None:
        """Note a sparse step."""
        self.draft_s = [*self.draft_s[1 - _MEASURED :], seconds]

    def note_verification(self, n: int, seconds: float) -> None:
        """Note a pass over n tokens that reads everything."""
        self.verify_s[n] = [*self.verify_s.get(n, [])[1 - _MEASURED :], seconds]
        self.plain = self.plain + 1 if n == 1 else 0

    def note_acceptance(self, n_accepted: int, n_tried: int, *, copied: bool) -> None:
        """Note how many drafted tokens stood, of those that were looked at: one that did not is the last."""
        for i in range(n_tried):
            self.acceptance[copied] += _NEW_TOKEN * (float(i < n_accepted) - self.acceptance[copied])
