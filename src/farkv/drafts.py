"""What drafting cost and gave: the counts of exact generation. In: rounds. Out: figures of a receipt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Drafts:
    """Counts of one cache's rounds of drafting and verifying.

    Those of `DraftFigures`; plain_rounds, plain_s: rounds without drafts, and their seconds: plain decoding's.
    """

    rounds: int = 0
    drafted: int = 0
    tried: int = 0
    accepted: int = 0
    tokens: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0
    plain_rounds: int = 0

    def note_row(self, n_accepted: int, n_tried: int) -> None:
        """Note one row of a verification."""
        self.accepted += n_accepted
        self.tried += n_tried

    def note_round(self, n_drafted: int, n_tokens: int, draft_s: float, verify_s: float) -> None:
        """Note one round over all rows."""
        self.rounds += 1
        self.drafted += n_drafted
        self.tokens += n_tokens
        self.draft_s += draft_s
        self.verify_s += verify_s
        if n_drafted == 0:
            self.plain_rounds += 1
            self.plain_s += verify_s

    def describe(self) -> DraftFigures | None:
        """Return the figures; None where nothing was drafted or verified."""
        if not self.rounds:
            return None
        seconds, plain_s = self.draft_s + self.verify_s, 0.0
        if self.plain_rounds:
            plain_s = self.plain_s / self.plain_rounds
        return DraftFigures(
            rounds=self.rounds,
            drafted=self.drafted,
            tried=self.tried,
            accepted=self.accepted,
            acceptance=self.accepted / self.tried if self.tried else None,
            tokens=self.tokens,
            draft_s=self.draft_s,
            verify_s=self.verify_s,
            speedup=self.tokens * plain_s / seconds if plain_s and seconds > 0 else None,
        )


@dataclass(frozen=True)
class DraftFigures:
    """What a receipt says of drafts.

    rounds: passes over everything.  drafted: tokens, by sparse steps or copied.  tried, accepted: of them, those that
    full attention was asked about, and those that stood; acceptance: their ratio, None where none was tried.  tokens:
    decided, over all rows.  draft_s, verify_s: seconds of both kinds of passes.  speedup: what as many rounds without
    drafts take, by those that were measured, over draft_s + verify_s; None where none was measured.
    """

    rounds: int
    drafted: int
    tried: int
    accepted: int
    acceptance: float | None
    tokens: int
    draft_s: float
    verify_s: float
    speedup: float | None
