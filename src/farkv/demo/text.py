"""A text with hidden facts and a question about one of them, for the demo model: its first prompt.

In: a length in tokens, a seed. Out: a `RecallPrompt` over the interpreter's own library.
"""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer

from farkv.demo import MODEL_PATH
from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import RecallPrompt, make_recall_prompt

# A fact's line takes about so many tokens.
FACT_TOKENS = 14


def draw_prompt(tokens: int, facts: int = 30, seed: int = 0) -> RecallPrompt:
    """Hide `facts` facts in about `tokens` tokens of code that the demo model never saw; ask for one of them."""
    tokenizer = Tokenizer.from_file(str(MODEL_PATH / "tokenizer.json"))
    room = max(20, tokens - FACT_TOKENS * facts - 20)
    filler = draw_filler(read_library(), room, seed, lambda line: len(tokenizer.encode(line).ids))
    return make_recall_prompt(filler, facts, seed)


@cache
def read_library() -> dict[str, str]:
    """Read the library's held-out sources, once."""
    return read_sources(STDLIB, held_out=True)
