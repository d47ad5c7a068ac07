"""Common and frequent words (RULER): which words occur most often; all of the text matters, none of it is filler."""

from __future__ import annotations

from farkv.evals.draw import Draw
from farkv.evals.fillers import read_vocabulary
from farkv.evals.sample import Made, ask

COMMON, FREQUENT = 10, 3
PER_LINE = 10
# About the tokens of a numbered word, and of a coded one; `Maker.fit` corrects for the model's own.
WORD_TOKENS, CODE_TOKENS = 6, 5
# RULER's: common words 30 times and others 3 times; in short texts a third of that.
OFTEN, SELDOM = 10, 1
# The counts of coded words fall with this power of their rank.
ZETA = 2.0
CODES = 60


def make_common(draw: Draw) -> Made:
    """Ten words occur ten times as often as the others; they are numbered, and the answer is the ten."""
    n = max(40, draw.length // WORD_TOKENS)
    seldom = SELDOM if draw.length < 4096 else 3 * SELDOM
    often = max(2, min(OFTEN * seldom, n // (2 * COMMON)))
    vocabulary = list(read_vocabulary())
    draw.rng.shuffle(vocabulary)
    common, others = vocabulary[:COMMON], vocabulary[COMMON : COMMON + max(COMMON, (n - COMMON * often) // seldom)]
    words = common * often + others * seldom
    draw.rng.shuffle(words)
    numbered = [f"{i}. {word}" for i, word in enumerate(words, start=1)]
    lines = [" ".join(numbered[i : i + PER_LINE]) + "\n" for i in range(0, len(numbered), PER_LINE)]
    intro = "Below is a numbered list of words. Some of them occur much more often than the others; remember those.\n"
    instruction = f"Which {COMMON} words of the list occur most often? Answer with the words alone."
    answer = list(dict.fromkeys(word for word in words if word in common))
    turn = ask(instruction, f"The {COMMON} words that occur most often are", ", ".join(answer), tuple(answer))
    return Made([intro, *lines], [turn], filled=False)


def make_frequent(draw: Draw) -> Made:
    """Coded words among dots, their counts falling with a power of their rank; the answer is the first three."""
    n = max(60, draw.length // CODE_TOKENS)
    codes = draw.letters(CODES, lower=True)
    total = sum((i + 1) ** -ZETA for i in range(CODES))
    words = [c for i, c in enumerate(codes) for _ in range(max(1, round(n / total * (i + 1) ** -ZETA)))]
    draw.rng.shuffle(words)
    lines = [" ... ".join(words[i : i + PER_LINE]) + " ...\n" for i in range(0, len(words), PER_LINE)]
    intro = "The text below is coded. Watch how often each coded word occurs.\n"
    instruction = f"Which {FREQUENT} coded words of the text occur most often? Answer with the words alone."
    found = tuple(codes[:FREQUENT])
    turn = ask(instruction, f"The {FREQUENT} coded words that occur most often are", ", ".join(found), found)
    return Made([intro, *lines], [turn], filled=False)
