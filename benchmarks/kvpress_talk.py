"""How a cache is asked as `farkv eval` asks: fed the right answers token by token, own answers given on a copy.

In: a transformers cache that holds a text, the tokens of prompts.jsonl. Out: per turn the own answer and the
predictions at every token of the right one; the bytes that every step read, counted from the tensors.
"""

from __future__ import annotations

import copy
import time
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from farkv.evals.forced import space_places


class Speaker(NamedTuple):
    """A model and how its answers end; forms other than chat end an answer with its line."""

    model: Any
    tokenizer: Any
    form: str
    stops: set[int]

    def ends(self, token: int) -> bool:
        """Return whether this token ends an answer, as farkv's `Prompter.ends` does."""
        return token in self.stops or (self.form != "chat" and "\n" in self.tokenizer.decode([token]))

    def limit(self, n_right: int) -> int:
        """Return the most tokens of an answer, as farkv's `Prompter.limit` does."""
        return n_right + n_right // 3 + (32 if self.form == "chat" else 4)


class Spoken(NamedTuple):
    """One turn: the cache's own answer, and its log-probabilities at the kept places of the right one."""

    text: str
    logs: torch.Tensor


class Talk:
    """A cache while it is asked; what its tensors hold at every step is counted.

    Args:
        speaker: the model.
        cache: it holds the text.
        n_text: tokens of the text, of which the cache may hold fewer.
    """

    def __init__(self, speaker: Speaker, cache: DynamicCache, n_text: int):
        self.speaker, self.cache, self.n_text, self.steps = speaker, cache, n_text, 0
        self.read = self.full = 0
        # Of own answers, which are not part of the time.
        self.paused = 0.0
        keys = cache.layers[0].keys
        self.record_bytes = 2 * keys.shape[1] * keys.shape[3] * keys.element_size()
        # A view of a larger tensor counts as that.
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        held = sum(t.untyped_storage().nbytes() for t in tensors)
        self.smaller = held < n_text * self.record_bytes * len(cache.layers)

    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Feed tokens, each at its own place in the text; return the last logits, [vocabulary]."""
        logits = torch.empty(0)
        for token in tokens:
            ids, place = torch.tensor([[token]]), torch.tensor([[self.n_text + self.steps]])
            out = self.speaker.model(input_ids=ids, past_key_values=self.cache, position_ids=place, use_cache=True)
            logits, self.steps = out.logits[0, -1], self.steps + 1
            self.read += self.held
            self.full += len(self.cache.layers) * (self.n_text + self.steps)
        return logits

    @property
    def held(self) -> int:
        """Return the records in the tensors of all layers."""
        return sum(layer.keys.shape[2] for layer in self.cache.layers)

    def force(self, tokens: list[int]) -> torch.Tensor:
        """Feed a continuation; return the log-probabilities after each token but the last, [n - 1, vocabulary]."""
        return torch.stack([self.feed([token]).float().log_softmax(-1) for token in tokens[:-1]])

    def ask(self, turns: list[dict[str, list[int]]], *, speaks: bool) -> list[Spoken]:
        """Feed every question and the right answer to it.

        Args:
            turns: tokens of questions and answers.
            speaks: own answers are given; otherwise what is fed counts as said.
        """
        spoken: list[Spoken] = []
        pending: list[int] = []
        for turn in turns:
            spoken.append(self._answer(self.feed([*pending, *turn["question"]]), turn["answer"], speaks=speaks))
            # The last token of an answer was not fed yet.
            pending = turn["answer"][-1:]
        return spoken

    def _answer(self, logits: torch.Tensor, right: list[int], *, speaks: bool) -> Spoken:
        """Feed the right answer; from the first token that the cache would not have said, it goes on by itself."""
        every, own, rows = space_places(len(right)), None, list[torch.Tensor]()
        for i, token in enumerate(right):
            if i % every == 0:
                rows.append(logits.float().log_softmax(-1))
            if speaks and own is None and int(logits.argmax()) != token:
                own = right[:i] + self._go_on(logits, self.speaker.limit(len(right)) - i)
            if i + 1 < len(right):
                logits = self.feed([token])
        text = self.speaker.tokenizer.decode(right if own is None else own, skip_special_tokens=True)
        return Spoken(text, torch.stack(rows))

    def _go_on(self, logits: torch.Tensor, most: int) -> list[int]:
        """Answer greedily, on a copy."""
        started, said = time.perf_counter(), list[int]()
        # A deliberate copy of the whole cache, as farkv's: what was said is not taken back.
        other = Talk(self.speaker, copy.deepcopy(self.cache), self.n_text)
        other.steps = self.steps
        while len(said) < most and not self.speaker.ends(token := int(logits.argmax())):
            said.append(token)
            logits = other.feed([token])
        self.paused += time.perf_counter() - started
        return said
