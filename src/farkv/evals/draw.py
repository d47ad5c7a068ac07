"""The random source of a task: one seeded generator, names that the training data does not contain, values.

In: a seed, words. Out: names of two words (`apple_river`, `apple-river`), numbers, identifiers, letters. The demo model
is trained on the tasks in code with other words, so that it knows the formats but not the names.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Sequence

from farkv.demo.recall import TEST_WORDS

# Enough distractors that a model must find one line among many; more would displace filler.
MOST_LINES = 40


def join_hyphen(rng: random.Random) -> str:
    """Return a name as plain text has it: `apple-river`."""
    return "-".join(rng.sample(TEST_WORDS, 2))


class Draw:
    """The random choices of one sample whose text has `length` tokens; `sample` is its number, from 0."""

    def __init__(
        self,
        seed: int,
        length: int,
        words: Sequence[str] = TEST_WORDS,
        name: Callable[[random.Random], str] | None = None,
        sample: int = 0,
    ):
        self.rng = random.Random(seed)
        self.sample = sample
        self.length = length
        self.words = words
        self._name = name or self._join_words
        self._taken: set[str] = set()

    def _join_words(self, rng: random.Random) -> str:
        return "_".join(rng.sample(list(self.words), 2))

    def names(self, n: int) -> list[str]:
        """Return `n` distinct names, none of which was drawn before."""
        found: list[str] = []
        while len(found) < n:
            name = self._name(self.rng)
            if name not in self._taken:
                self._taken.add(name)
                found.append(name)
        return found

    def value(self) -> str:
        """Return four digits."""
        return str(self.rng.randint(1000, 9999))

    def values(self, n: int) -> list[str]:
        """Return `n` distinct values."""
        return [str(v) for v in self.rng.sample(range(1000, 10_000), n)]

    def numbers(self, n: int) -> list[str]:
        """Return `n` distinct numbers of seven digits."""
        return [str(v) for v in self.rng.sample(range(1_000_000, 10_000_000), n)]

    def uuids(self, n: int) -> list[str]:
        """Return `n` identifiers of 128 bits."""
        return [str(uuid.UUID(int=self.rng.getrandbits(128), version=4)) for _ in range(n)]

    def letters(self, n: int, *, lower: bool = False) -> list[str]:
        """Return `n` distinct words of five random letters."""
        alphabet = string.ascii_lowercase if lower else string.ascii_uppercase
        found: dict[str, None] = {}
        while len(found) < n:
            found["".join(self.rng.choices(alphabet, k=5))] = None
        return list(found)

    def count_lines(self) -> int:
        """Return how many facts a text of this length contains: one per hundred tokens, 4 to 40."""
        return max(4, min(self.length // 100, MOST_LINES))
