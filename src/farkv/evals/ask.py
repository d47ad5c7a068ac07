"""Ask samples' questions over one cache; questions and answers pass through the method token by token.

In: a filled cache, one sequence per sample. Out: per turn what the method predicts at every token of the right answer,
which it is fed (teacher forcing), and the answer that it gives by itself. Later turns go on from the right answers, so
that all methods are asked in the same context. Sequences are fed in step: what is shorter than the longest is filled up
with line ends (`align`), never masked.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from farkv._axes import Float, Tensor
from farkv.evals.forced import space_places
from farkv.evals.prompter import Prompter
from farkv.evals.sample import Sample, Turn
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.prompt import Prompt

# What the full cache writes where there is no right answer: drawn at this temperature, so that it does not repeat
# itself; by a seed.
TEMPERATURE = 0.7


class Answer(NamedTuple):
    """One turn: the method's own answer, the tokens it was fed, and its log-probabilities at every n-th of them."""

    text: str
    fed: list[int]
    logs: Tensor


class Answers(NamedTuple):
    """Every sample's answers, turn by turn, and the seconds of questions and right answers."""

    answers: list[list[Answer]]
    seconds: float


def align(prompts: Sequence[Prompt], line_end: int) -> list[Prompt]:
    """Return prompts of the same lengths: line ends follow shorter texts, and shorter questions begin in the text."""
    most, n_question = max(p.n_tokens for p in prompts), max(len(p.question) for p in prompts)
    whole = [p.text + [line_end] * (most - p.n_tokens) + p.question for p in prompts]
    return [Prompt(ids[:-n_question], ids[-n_question:]) for ids in whole]


def pad_before(rows: Sequence[list[int]], line_end: int) -> list[list[int]]:
    """Return rows of the same length, with line ends before shorter ones."""
    most = max(map(len, rows))
    return [[line_end] * (most - len(row)) + row for row in rows]


class Asker:
    """Asks over one cache, a sequence per sample.

    Args:
        far: its handle.
        cache: it holds the texts, and the first questions too where the method read them there.
        prompter: of the model.
        written: what the full cache wrote, for samples without a right answer; None: it is to be written now.
    """

    def __init__(self, far: Handle, cache: FarCache, prompter: Prompter, written: list[list[int]] | None = None):
        self.far, self.cache, self.prompter, self.written = far, cache, prompter, written
        self.stops, self.line_end = find_stops(far.model), prompter.encode("\n")[-1]
        # Of answers that are given while the clock is stopped.
        self._paused = 0.0

    @torch.no_grad()
    def ask(self, samples: Sequence[Sample], questions: list[list[int]]) -> Answers:
        """Feed every question and the right answer to it; all samples have as many turns."""
        started, pending = time.perf_counter(), questions
        turns: list[list[Answer]] = []
        for n in range(len(samples[0].turns)):
            asked = [sample.turns[n] for sample in samples]
            if n:
                follow = [p + self.prompter.follow(turn) for p, turn in zip(pending, asked, strict=True)]
                pending = pad_before(follow, self.line_end)
            logits = self._feed(pending)
            turns.append(self._write(logits, samples) if samples[0].n_written else self._force(logits, asked))
            # The last token of an answer was not fed yet.
            pending = [[answer.fed[-1], *self.prompter.line_end] for answer in turns[-1]]
        seconds = time.perf_counter() - started - self._paused
        return Answers([list(each) for each in zip(*turns, strict=True)], seconds)

    def _force(self, logits: Float[Tensor, "B V"], turns: list[Turn]) -> list[Answer]:
        """Feed the right answers; from the first token that some would not have said, all go on by themselves."""
        right, own, rows = [self.prompter.encode_answer(turn) for turn in turns], None, list[Tensor]()
        n = max(map(len, right))
        fed = [ids + [self.line_end] * (n - len(ids)) for ids in right]
        every = space_places(n)
        for i in range(n):
            if i % every == 0:
                rows.append(logits.float().log_softmax(-1).cpu())
            said = logits.argmax(-1).tolist()
            if own is None and any(i < len(ids) and said[b] != ids[i] for b, ids in enumerate(right)):
                more = self._go_on(logits, [self.prompter.limit(turn) - i for turn in turns])
                own = [ids[:i] + more[b] if i < len(ids) else ids for b, ids in enumerate(right)]
            if i + 1 < n:
                logits = self._feed([ids[i : i + 1] for ids in fed])
        texts = [self.prompter.tokenizer.decode(ids, skip_special_tokens=True) for ids in own or right]
        logs = torch.stack(rows, 1)
        kept = [-(-len(ids) // every) for ids in right]
        return [Answer(text, ids, logs[b, : kept[b]]) for b, (text, ids) in enumerate(zip(texts, fed, strict=True))]

    def _go_on(self, logits: Float[Tensor, "B V"], most: list[int]) -> list[list[int]]:
        """Answer greedily on a copy of the cache, which is exact for every method; stepping back is not.

        Args:
            most: tokens of every sequence's answer.
        """
        started, main = time.perf_counter(), self.cache
        said: list[list[int]] = [[] for _ in range(len(logits))]
        going = set(range(len(logits)))
        # A deliberate copy of the whole cache, once per turn that some method answers wrongly.
        self.cache = copy.deepcopy(main)
        for n in range(max(most)):
            tokens = logits.argmax(-1).tolist()
            going -= {b for b in going if n >= most[b] or self.prompter.ends(tokens[b], self.stops)}
            for b in going:
                said[b].append(tokens[b])
            if not going:
                break
            logits = self._feed([[token] for token in tokens])
        self.cache.reset()
        self.cache = main
        self._paused += time.perf_counter() - started
        return said

    def _write(self, logits: Float[Tensor, "B V"], samples: Sequence[Sample]) -> list[Answer]:
        """Write at a temperature as many tokens as the samples say, or be fed what was written."""
        rngs = [torch.Generator().manual_seed(sample.seed) for sample in samples]
        n, rows = samples[0].n_written, list[Tensor]()
        ids: list[list[int]] = self.written or [[] for _ in samples]
        every = space_places(n)
        for i in range(n):
            logs = logits.float().log_softmax(-1).cpu()
            if i % every == 0:
                rows.append(logs)
            if self.written is None:
                for b, rng in enumerate(rngs):
                    ids[b].append(int(torch.multinomial((logs[b] / TEMPERATURE).softmax(-1), 1, generator=rng)))
            if i + 1 < n:
                logits = self._feed([row[i : i + 1] for row in ids])
        decode, logs = self.prompter.tokenizer.decode, torch.stack(rows, 1)
        return [Answer(decode(row, skip_special_tokens=True), row, logs[b]) for b, row in enumerate(ids)]

    def _feed(self, rows: list[list[int]]) -> Float[Tensor, "B V"]:
        """Feed tokens one by one, as decode steps; return the last logits."""
        return feed_rows(self.far, self.cache, rows)


def feed_rows(far: Handle, cache: FarCache, rows: list[list[int]]) -> Float[Tensor, "B V"]:
    """Feed sequences of the same length token by token, as decode steps; return the last logits."""
    logits = None
    for step in torch.tensor(rows, device=far.device).split(1, 1):
        logits = far.model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
    assert logits is not None
    return logits


@torch.no_grad()
def force_tokens(far: Handle, cache: FarCache, rows: list[list[int]]) -> tuple[Float[Tensor, "B N V"], float]:
    """Feed known tokens as decode steps; return the log-probabilities after each but the last, and the seconds.

    Returns:
        float32 [B, n - 1, vocabulary] on the CPU, and the seconds.
    """
    started, found = time.perf_counter(), list[Tensor]()
    for i in range(len(rows[0]) - 1):
        found.append(feed_rows(far, cache, [row[i : i + 1] for row in rows]).float().log_softmax(-1).cpu())
    return torch.stack(found, 1), time.perf_counter() - started


def find_stops(model: Any) -> set[int]:
    """Return the end-of-text tokens of the model's generation config."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return set(found) if isinstance(found, list) else set() if found is None else {found}
