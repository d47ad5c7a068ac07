"""Common and frequent words (RULER): which words occur most often; the whole text is relevant, without filler."""

from __future__ import annotations

import string

from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Turn

COMMON = 10
FREQUENT = 3
PER_LINE = 8
# Approximate tokens of a two-word name with its space, and of a code word; `Maker.fit` adjusts to the actual length.
NAME_TOKENS = 7
CODE_TOKENS = 6


def make_common(draw: Draw) -> Made:
    """Ten words occur ten times as often as the others; the answer is the ten."""
    n = max(40, draw.length // NAME_TOKENS)
    seldom = 1 if draw.length < 4096 else 3
    often = max(3, min(10 * seldom, n // (2 * COMMON)))
    common = draw.names(COMMON)
    words = common * often + draw.names(max(COMMON, (n - COMMON * often) // seldom)) * seldom
    draw.rng.shuffle(words)
    chat = f"Which {COMMON} words occur most often in the lists? Answer with the words alone."
    answer = list(dict.fromkeys(w for w in words if w in common))
    turn = Turn(f"most_common({COMMON})  # ", chat, " ".join(answer), tuple(answer))
    return Made(write_lines(words), [turn], filled=False)


def make_frequent(draw: Draw) -> Made:
    """Code words whose counts fall with the square of their rank; the answer is the first three."""
    rng = draw.rng
    n = max(60, draw.length // CODE_TOKENS)
    codes: list[str] = []
    while len(codes) < 60:
        code = "".join(rng.choices(string.ascii_lowercase, k=4))
        if code not in codes:
            codes.append(code)
    total = sum(1 / (i + 1) ** 2 for i in range(len(codes)))
    words = [c for i, c in enumerate(codes) for _ in range(max(1, round(n / total / (i + 1) ** 2)))]
    rng.shuffle(words)
    chat = f"Which {FREQUENT} coded words occur most often in the lists? Answer with the words alone."
    found = tuple(codes[:FREQUENT])
    turn = Turn(f"most_common({FREQUENT})  # ", chat, " ".join(found), found)
    return Made(write_lines(words), [turn], filled=False)


def write_lines(words: list[str]) -> list[str]:
    """Write words as comment lines."""
    return [f"# {' '.join(words[i : i + PER_LINE])}\n" for i in range(0, len(words), PER_LINE)]
