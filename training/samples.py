"""Make training samples: exactly `length` tokens and the kind of each.

In: tokenised lines, a word list, a random generator. Out: (tokens, kinds) arrays. A kind is ANSWER
on the digits that answer a question, COPY on the repeated part of a random sequence, TEXT on
everything else that is learned, and NOTHING where there is nothing to learn.
"""

from __future__ import annotations

import random
import string
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from farkv.demo.recall import fact_line, question_line
from farkv.evals.code_tasks import CODE_TASKS
from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Turn, lay

NOTHING, TEXT, ANSWER, COPY = 0, 1, 2, 3
DIGITS = 4
FACT, QUESTION = 12, 16  # tokens that a fact's line and a question's line cost, about
COUNTED = ("cwe", "fwe")  # tasks whose lines are the whole text
# How often each other task is drawn; single needles and many turns are what `recall` trains.
TASK_SHARES = {
    "niah_multikey": 1, "niah_multivalue": 3, "niah_multiquery": 3, "vt": 2, "qa": 3, "extraction": 2, "longgen": 4,
}  # fmt: skip


def encode_lines(tokenizer: Tokenizer, files: dict[str, str], cache: Path | None = None):
    """Tokenise every line of the files: all tokens end to end, and where each line starts."""
    if cache is not None and cache.exists():
        stored = np.load(cache)
        return stored["tokens"], stored["starts"]
    lines = [line for text in files.values() for line in text.splitlines(keepends=True)]
    pieces: list[np.ndarray] = []
    starts = [np.zeros(1, np.int64)]
    for i in range(0, len(lines), 20_000):
        ids = [e.ids for e in tokenizer.encode_batch(lines[i : i + 20_000])]
        pieces.append(np.fromiter((t for line in ids for t in line), np.int16))
        starts.append(starts[-1][-1] + np.cumsum([len(line) for line in ids]))
    tokens, places = np.concatenate(pieces), np.concatenate(starts)
    if cache is not None:
        np.savez(cache, tokens=tokens, starts=places)
    return tokens, places


class Sampler:
    """Draws samples of the three kinds: `copy`, `recall` and `code`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        lines: tuple[np.ndarray, np.ndarray],
        words: list[str],
        seed: int,
    ):
        self.tokenizer = tokenizer
        self.words = words
        self.rng = random.Random(seed)
        self.vocabulary = tokenizer.get_vocab_size()
        self.tokens, self.starts = lines

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def draw_filler(self, n_tokens: int) -> list[np.ndarray]:
        """Take consecutive lines from a random place until they hold `n_tokens`."""
        n_lines = len(self.starts) - 1
        at = self.rng.randrange(n_lines)
        if self.starts[-1] - self.starts[at] <= n_tokens:
            at = int(np.searchsorted(self.starts, self.starts[-1] - n_tokens - 1000)) - 1
        end = int(np.searchsorted(self.starts, self.starts[at] + n_tokens))
        cuts = self.starts[at : end + 1]
        return [self.tokens[a:b].astype(np.int32) for a, b in pairwise(cuts)]

    def draw_word(self) -> str:
        """Draw a word of the library, two of its words' halves joined, or random letters."""
        kind = self.rng.random()
        if kind < 0.55:
            return self.rng.choice(self.words)
        if kind < 0.8:
            a, b = self.rng.choice(self.words), self.rng.choice(self.words)
            return a[: self.rng.randint(2, 4)] + b[-self.rng.randint(2, 4) :]
        return "".join(self.rng.choices(string.ascii_lowercase, k=self.rng.randint(2, 7)))

    def draw_names(self, n: int) -> list[str]:
        """Draw `n` different names; sometimes from few words: only the whole name decides."""
        shared = [self.draw_word() for _ in range(max(3, int(1.6 * n**0.5) + 2))]
        few = self.rng.random() < 0.3
        names: list[str] = []
        while len(names) < n:
            if few:
                a, b = self.rng.choice(shared), self.rng.choice(shared)
            else:
                a, b = self.draw_word(), self.draw_word()
            name = f"{a}_{b}"
            if name not in names:
                names.append(name)
        return names

    def make_copy(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Random tokens, then the same tokens again: the shortest way to an induction head."""
        period = self.rng.randint(4, max(8, length // (2 if length > 64 else 4)))
        block = np.asarray([self.rng.randrange(self.vocabulary) for _ in range(period)], np.int32)
        tokens = np.tile(block, length // period + 1)[:length]
        kinds = np.full(length, COPY, np.int8)
        kinds[: period + 1] = NOTHING
        return tokens, kinds

    def make_code(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Consecutive lines of one place in the library."""
        tokens = np.concatenate(self.draw_filler(length))[:length]
        return tokens, np.full(length, TEXT, np.int8)

    def plan_recall(self, length: int, sparse: bool) -> tuple[list[np.ndarray], int, int]:
        """Choose the filler's lines and how many facts and questions the sample holds."""
        rng = self.rng
        budget = length - 16
        filled = (rng.uniform(0.5, 0.96) if sparse else rng.uniform(0.0, 0.6)) * budget
        filler = self.draw_filler(int(filled)) if filled > 24 else []
        room = budget - sum(map(len, filler))
        n_facts = max(1, min(int(room / (FACT + QUESTION * (0.3 if sparse else 0.8))), 80))
        if sparse:
            n_facts = min(n_facts, int(2 ** rng.uniform(*(0, 6.3) if length < 1024 else (2, 6.2))))
        n_questions = max(1, int((room - FACT * n_facts) / QUESTION))
        if sparse:
            n_questions = min(n_questions, int(2 ** rng.uniform(0, 5 if length < 1024 else 6)))
        return filler, n_facts, n_questions

    def place_facts(self, names: list[str], chains: float):
        """Give each name a value and a place in [0, 0.97); some repeat an earlier name's value."""
        rng = self.rng
        values = {n: str(rng.randint(1000, 9999)) for n in names}
        place: dict[str, float] = {}
        parts: list[tuple[float, list[tuple[str, int]]]] = []
        for i, name in enumerate(names):
            place[name] = rng.random() * 0.97
            line = fact_line(name, values[name])
            if i and rng.random() < chains:
                source = rng.choice(names[:i])
                values[name] = values[source]
                place[name] = place[source] + (0.97 - place[source]) * rng.random()
                line = fact_line(name, source)
            parts.append((place[name], [(line, TEXT)]))
        return values, place, parts

    def make_recall(self, length: int, *, chains: float, sparse: bool) -> tuple[np.ndarray, np.ndarray]:
        """Facts between lines of code, questions among and after them; an answer comes last."""
        rng = self.rng
        filler, n_facts, n_questions = self.plan_recall(length, sparse)
        names = self.draw_names(n_facts)
        values, place, parts = self.place_facts(names, chains)
        late = (1.0 if rng.random() < 0.6 else 0.3) if sparse else 0.5
        asked = rng.sample(names, len(names)) if sparse else []
        while len(asked) < n_questions and not (sparse and late == 1.0):
            asked.append(rng.choice(names))
        asked = asked[:n_questions]
        for name in asked[1:]:
            at = 0.98 + 0.02 * rng.random() if rng.random() < late else rng.uniform(place[name], 1.0)
            parts.append((at, self.ask(name, values[name])))
        for i, line in enumerate(filler):
            parts.append(((i + 0.5) / len(filler) * 0.98, line))
        parts.sort(key=lambda p: p[0])
        parts.append((2.0, self.ask(asked[0], values[asked[0]])[:-1]))
        return self.join(parts, length)

    def ask(self, name: str, value: str) -> list[tuple[str, int]]:
        return [(question_line(name), TEXT), (value, ANSWER), ("\n", TEXT)]

    def join(self, parts: list, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise and lay end to end, cut or filled up at the front: the end stays whole."""
        tokens: list[np.ndarray] = []
        kinds: list[np.ndarray] = []
        for _, part in parts:
            for text, kind in [(part, TEXT)] if isinstance(part, np.ndarray) else part:
                ids = text if isinstance(text, np.ndarray) else np.asarray(self.encode(text), np.int32)
                tokens.append(ids)
                kinds.append(np.full(len(ids), kind, np.int8))
        flat, kind = np.concatenate(tokens), np.concatenate(kinds)
        if len(flat) < length:
            lead = np.concatenate(self.draw_filler(length - len(flat)))[: length - len(flat)]
            flat = np.concatenate([lead, flat])
            kind = np.concatenate([np.full(len(lead), TEXT, np.int8), kind])
        # What is cut away at the front is mostly filler; half an answer there counts as text.
        flat, kind = flat[-length:], kind[-length:]
        if kind[0] == ANSWER:
            kind[: int(np.argmax(kind != ANSWER))] = TEXT
        return flat, kind

    def draw_tasks(self, length: int) -> tuple[list[str], list[Turn]]:
        """Draw tasks until their lines and turns take 10 to 80 % of the sample, each with a size of its own."""
        rng = self.rng
        room = int(rng.uniform(0.1, 0.8) * (length - 64))
        lines: list[str] = []
        turns: list[Turn] = []
        for _ in range(12):
            task = rng.choices(list(TASK_SHARES), list(TASK_SHARES.values()))[0]
            made = CODE_TASKS[task](self.draw(int(rng.uniform(0.1, 0.7) * length)))
            cost = self.count(made.lines, made.turns)
            if cost <= room:
                room -= cost
                at = 0 if not lines else rng.randrange(len(lines) + 1)
                lines[at:at] = made.lines
                turns += made.turns
        rng.shuffle(turns)
        return lines, turns

    def count(self, lines: list[str], turns: list[Turn]) -> int:
        """Return the tokens of a task's lines, questions and answers."""
        return len(self.encode("".join(lines))) + sum(len(self.encode(t.completion + t.answer)) + 1 for t in turns)

    def draw(self, length: int) -> Draw:
        """Give a task this sampler's words."""
        seed = self.rng.getrandbits(48)
        return Draw(seed, length, name=lambda _: f"{self.draw_word()}_{self.draw_word()}")

    def make_tasks(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Several tasks in one text of code; all their questions at the end."""
        lines, turns = self.draw_tasks(length)
        if not turns:
            return self.make_recall(length, chains=0.0, sparse=True)
        used = self.count(lines, turns)
        filler = self.draw_filler(length - used) if length - used > 24 else []
        places = list(range(len(filler)))
        laid, own = lay(Made(lines, turns), [str(i) for i in places], self.rng)
        mine = set(own)
        parts: list = [(0.0, [(t, TEXT)] if i in mine else filler[int(t)]) for i, t in enumerate(laid)]
        return self.join(parts + self.ask_turns(turns), length)

    def make_counted(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Words to count: the lines are noise, so only the answer is learned."""
        made = CODE_TASKS[self.rng.choice(COUNTED)](self.draw(int(length * 0.75)))
        tokens, kinds = self.join([(0.0, [("".join(made.lines), NOTHING)]), *self.ask_turns(made.turns)], length)
        return tokens, kinds

    def ask_turns(self, turns: list[Turn]) -> list:
        """Return the parts of all questions and answers; the last answer is the sample's end."""
        parts: list = [(1.0, [(t.completion, TEXT), (t.answer, ANSWER), ("\n", TEXT)]) for t in turns]
        return [*parts[:-1], (1.0, parts[-1][1][:-1])]

    def make_batch(self, rows: int, length: int, mix: dict[str, float], chains: float, sparse: float):
        """Draw `rows` samples; `mix` gives the shares of copy, recall, code, tasks and counted words."""
        tokens = np.empty((rows, length), np.int64)
        kinds = np.empty((rows, length), np.int8)
        names, shares = list(mix), list(mix.values())
        for r in range(rows):
            what = self.rng.choices(names, shares)[0]
            if what == "copy":
                tokens[r], kinds[r] = self.make_copy(length)
            elif what == "code":
                tokens[r], kinds[r] = self.make_code(length)
            elif what == "tasks":
                tokens[r], kinds[r] = self.make_tasks(length)
            elif what == "counted":
                tokens[r], kinds[r] = self.make_counted(length)
            else:
                few = self.rng.random() < sparse
                tokens[r], kinds[r] = self.make_recall(length, chains=chains, sparse=few)
        return tokens, kinds
