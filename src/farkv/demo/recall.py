"""Recall prompts in the format that the demo model was trained on: facts scattered through code, a question at the end.

In: lines of filler (code), a seed. Out: the text, the question, the answer. By default names are made from
`TEST_WORDS`, which no name in the training data contains.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

TEST_WORDS: tuple[str, ...] = tuple(
    """
    acorn amber anchor apple autumn bamboo basket beacon birch blossom bottle breeze bridge bronze
    candle canyon castle cedar cherry cliff clover cloud comet copper coral cotton crystal daisy
    desert dragon eagle ember falcon feather fern forest fountain galaxy garden ginger glacier
    granite harbor harvest hazel heron honey island ivory jasmine jungle kettle lagoon lantern
    lemon lily lotus maple marble meadow melon meteor mirror mountain nectar nutmeg oasis ocean
    olive onion orchid otter oyster panther peach pearl pebble pepper pine planet plum pond poppy
    prairie pumpkin quartz rabbit raven reef ribbon river robin rocket rose saddle saffron sailor
    salmon shadow silver sparrow spruce squirrel stone storm summer sunset swan temple thistle
    thunder tiger timber tulip tunnel turtle umbrella valley velvet violet walnut water willow
    winter wolf zebra
    """.split()
)


@dataclass(frozen=True)
class RecallPrompt:
    """One prompt: `text` holds the facts, `question` asks for one, `answer` is four digits."""

    text: str
    question: str
    answer: str
    name: str
    fact_line: int


def fact_line(name: str, value: str) -> str:
    """Return the line that states a fact."""
    return f"{name} = {value}\n"


def question_line(name: str) -> str:
    """Return the question; the demo model completes it with the value."""
    return f"print({name})  # "


def make_recall_prompt(
    filler: Sequence[str],
    n_facts: int,
    seed: int,
    words: Sequence[str] = TEST_WORDS,
) -> RecallPrompt:
    """Scatter `n_facts` facts between the lines of `filler` and ask for one of them.

    Args:
        filler: lines of code, each with its line ending.
        n_facts: number of facts, all with different names.
        seed: makes the prompt reproducible.
        words: a name is two of these, joined by an underscore.

    Returns:
        A prompt whose text is the filler plus `n_facts` lines.
    """
    rng = random.Random(seed)
    names: list[str] = []
    while len(names) < n_facts:
        name = "_".join(rng.sample(words, 2))
        if name not in names:
            names.append(name)
    values = [str(rng.randint(1000, 9999)) for _ in names]
    cuts = sorted(rng.randint(0, len(filler)) for _ in names)
    lines: list[str] = []
    where: list[int] = []
    start = 0
    for cut, name, value in zip(cuts, names, values, strict=True):
        lines += filler[start:cut]
        where.append(len(lines))
        lines.append(fact_line(name, value))
        start = cut
    lines += filler[start:]
    asked = rng.randrange(n_facts)
    return RecallPrompt(
        text="".join(lines),
        question=question_line(names[asked]),
        answer=values[asked],
        name=names[asked],
        fact_line=where[asked],
    )


def make_chain_prompt(
    filler: Sequence[str],
    n_facts: int,
    seed: int,
    hops: int = 1,
    words: Sequence[str] = TEST_WORDS,
) -> RecallPrompt:
    """Scatter facts and a chain of assignments that lead to one of them, and ask for the chain's last name.

    Args:
        filler: lines of code, each with its line ending.
        n_facts: number of plain facts, not counting the chain.
        seed: makes the prompt reproducible.
        hops: number of lines like `stone_cloud = apple_river` between the question and the fact, in text order.
        words: a name is two of these, joined by an underscore.

    Returns:
        A prompt; its text is the filler plus `n_facts + hops` lines, `fact_line` is the plain fact's line.
    """
    base = make_recall_prompt(filler, n_facts, seed, words)
    rng = random.Random(seed + 1_000_003)
    lines = base.text.splitlines(keepends=True)
    taken = {line.split(" = ")[0] for line in lines}
    at, source = base.fact_line, base.name
    for _ in range(hops):
        name = source
        while name == source or name in taken:
            name = "_".join(rng.sample(words, 2))
        taken.add(name)
        at = rng.randint(at + 1, len(lines))
        lines.insert(at, fact_line(name, source))
        source = name
    return RecallPrompt("".join(lines), question_line(source), base.answer, source, base.fact_line)
