"""Long generation: the full cache writes, every method is held to its words; KL along the way, no right answer."""

from __future__ import annotations

from farkv.evals.draw import Draw
from farkv.evals.sample import Made, ask

# Tokens that are generated, at most; in short texts half of the length.
MOST_TOKENS = 2048


def make(draw: Draw) -> Made:
    """A text, of which a long account is to be given."""
    instruction = (
        "Write a long and detailed account of this text for somebody who has not read it: part by part, in full "
        "sentences, with examples."
    )
    turn = ask(instruction, "Here is what the text says, part by part:", "", (), "none")
    return Made([], [turn], n_written=min(MOST_TOKENS, draw.length // 2))
