"""Caches of equal lengths, asked together: one row of a batch each, greedy, token by token.

In: filled caches, questions. Out: each row's answers and how many decode steps it took. After the first answer rows go
on alone, since their answers differ in length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import DynamicCache


class Heard(NamedTuple):
    """One row's answers and decode steps."""

    answers: list[str]
    steps: int


class Answer(NamedTuple):
    """One row's answer: its tokens, what of it the cache has not seen, the decode steps so far."""

    ids: list[int]
    pending: list[int]
    steps: int


class Count(NamedTuple):
    """Bytes that a row's tensors held, and a full cache would have: means over decode steps; the last step's share."""

    read: float
    full: float
    last: float


class Talk:
    """A batch of caches while it is asked."""

    def __init__(self, answerer: Any, caches: list[DynamicCache], n_text: int, steps: int = 0):
        self.own, self.n_text, self.steps = answerer, n_text, steps
        self.smaller = [count_bytes(cache) < n_text * record_bytes(cache) * len(cache.layers) for cache in caches]
        self.cache = caches[0] if len(caches) == 1 else join(caches)
        self.lengths = [length - steps for length in find_lengths(self.cache)]
        self.record_bytes = record_bytes(self.cache)

    def step(self, tokens: list[int]) -> torch.Tensor:
        """Feed every row one token, at the token's own place in the text; return the logits, [rows, vocabulary]."""
        place = torch.full((len(tokens), 1), self.n_text + self.steps)
        out = self.own.model(
            input_ids=torch.tensor(tokens)[:, None], past_key_values=self.cache, position_ids=place, use_cache=True
        )
        self.steps += 1
        # `count` says what these tensors hold.
        assert find_lengths(self.cache) == [length + self.steps for length in self.lengths]
        return out.logits[:, -1]

    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Feed every row the same tokens."""
        return [self.step([token] * len(self.smaller)) for token in tokens][-1]

    def count(self, steps: int) -> Count:
        """Return what a row's tensors held at its decode steps."""
        mean, n_layers = (steps + 1) / 2, len(self.lengths)
        read, full = sum(self.lengths) + n_layers * mean, n_layers * (self.n_text + mean)
        last = (sum(self.lengths) + n_layers * steps) / (n_layers * (self.n_text + steps))
        return Count(read * self.record_bytes, full * self.record_bytes, last)

    def force(self, tokens: list[int]) -> torch.Tensor:
        """Feed known tokens; return the log-probabilities after each but the last, [rows, n - 1, vocabulary]."""
        return torch.stack([self.feed([token]).float().log_softmax(-1) for token in tokens[:-1]], dim=1)

    def ask(self, turns: list[dict[str, Any]], question: list[int]) -> list[Heard]:
        """Ask turn by turn as `farkv eval` asks a base model: an answer ends with its line."""
        heard: list[Heard] = []
        for i, first in enumerate(self._answer(self.feed(question), turns[0])):
            said, answer = [first.ids], first
            alone = self._split(i, first.steps) if len(turns) > 1 else self
            for turn in turns[1:]:
                logits = alone.feed([*answer.pending, *self.own.encode(turn["completion"])])
                (answer,) = alone._answer(logits, turn)
                said.append(answer.ids)
            answers = [self.own.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
            heard.append(Heard(answers, answer.steps))
        return heard

    def _answer(self, logits: torch.Tensor, turn: dict[str, Any]) -> list[Answer]:
        """Decode every row until its own answer ends; rows that have ended are fed on, and cut back by `_split`."""
        n_right, line_end = len(self.own.encode(turn["answer"])), self.own.encode("\n")
        most, ended = n_right + n_right // 3 + 4, {}
        ids: list[list[int]] = [[] for _ in self.smaller]
        while True:
            tokens = logits.argmax(-1).tolist()
            for i, token in enumerate(tokens):
                if i in ended:
                    continue
                if token in self.own.stops:
                    ended[i] = Answer(ids[i], line_end, self.steps)
                elif "\n" in self.own.tokenizer.decode([token]):
                    ended[i] = Answer(ids[i], [token], self.steps)
                else:
                    ids[i].append(token)
                    if len(ids[i]) == most:
                        ended[i] = Answer(ids[i], [token, *line_end], self.steps)
            if len(ended) == len(ids):
                return [ended[i] for i in range(len(ids))]
            logits = self.step(tokens)

    def _split(self, row: int, steps: int) -> Talk:
        """Return one row's cache as it was when its answer ended."""
        cache = DynamicCache()
        for i, (layer, length) in enumerate(zip(self.cache.layers, self.lengths, strict=True)):
            parts = [t[row : row + 1, :, : length + steps].clone() for t in (layer.keys, layer.values)]
            cache.update(*parts, i)
        return Talk(self.own, [cache], self.n_text, steps)


def find_lengths(cache: DynamicCache) -> list[int]:
    """Return the records that each layer's tensors hold."""
    return [layer.keys.shape[2] for layer in cache.layers]


def record_bytes(cache: DynamicCache) -> int:
    """Return the bytes of K and V of one token in one layer, of one row."""
    keys = cache.layers[0].keys
    return 2 * keys.shape[1] * keys.shape[3] * keys.element_size()


def count_bytes(cache: DynamicCache) -> int:
    """Return the bytes of a cache's storage: a view of a larger tensor counts as that."""
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


def join(caches: list[DynamicCache]) -> DynamicCache:
    """Return caches of equal lengths as the rows of one."""
    joined = DynamicCache()
    for i, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        joined.update(torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers]), i)
    return joined
