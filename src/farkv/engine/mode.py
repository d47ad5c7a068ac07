"""What the passes of a cache are for, and how long its prompt is. The engine sets it; its parts look at it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Mode:
    """The state of one cache's engine between passes.

    drafted: of a pass of several tokens, how many of the newest are of an answer: each reads by its own choice.
    dense: a verifying pass: attend to everything, count nothing.  measures: a verified step: measure the attention mass
    that its choice holds.  prompt_tokens: of an announced prompt; 0: any pass of more than one token may be its end.
    """

    dense: bool = False
    measures: bool = False
    prompt_tokens: int = 0
    drafted: int = 0
