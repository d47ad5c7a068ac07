"""What the passes of a cache are for, and how long its prompt is. The engine sets it; its parts look at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Mode:
    """The state of one cache's engine between passes.

    drafted: of a pass of several tokens, how many of the newest are of an answer: each reads by its own choice.
    dense: a verifying pass: attend to everything, count nothing.  measures: a verified step: measure the attention mass
    that its choice holds.  prompt_tokens: of an announced prompt; 0: any pass of more than one token may be its end.
    reads_all: a pass of any number of tokens reads everything.  is_draft: what it makes will be forgotten.
    """

    dense: bool = False
    measures: bool = False
    prompt_tokens: int = 0
    drafted: int = 0
    reads_all: bool = False
    is_draft: bool = False

    @contextmanager
    def reading(self, *, whole: bool) -> Iterator[None]:
        """Let passes read everything, or else be drafts, which will be forgotten."""
        self.reads_all, self.is_draft = whole, not whole
        try:
            yield
        finally:
            self.reads_all = self.is_draft = False
