"""Ask one sample's questions of one cache: questions and answers go through the method token by token.

In: a filled cache, turns. Out: what was said, in how many steps and seconds. Stops at the line's end where a base model
is asked, at the end of its turn where a chat model is.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from farkv._axes import Tensor
from farkv.errors import InputError
from farkv.evals.sample import Sample, Turn
from farkv.hf.ask import Prompt, build_prompt, feed
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle

# Stands for what was said before while a chat template is rendered.
_SAID = "farkv-said-7c3e"


class Said(NamedTuple):
    """One turn's answer: its text and tokens."""

    text: str
    ids: list[int]


class Spoken(NamedTuple):
    """All turns, and the seconds they took."""

    turns: list[Said]
    seconds: float


class Speaker:
    """How questions are put to one model: as completions, or in its chat template."""

    def __init__(self, tokenizer: Any, form: str = "auto"):
        chats = bool(getattr(tokenizer, "chat_template", None))
        if form == "chat" and not chats:
            raise InputError("--form chat: the tokenizer has no chat template; use --form completion")
        self.tokenizer, self.chats = tokenizer, chats if form == "auto" else form == "chat"
        self._newlines: dict[int, bool] = {}

    def build(self, sample: Sample) -> Prompt:
        """Return the tokens of the text and of the first question (of `ppl`: of what follows the text)."""
        if sample.continuation:
            whole = self.tokenizer(sample.text + sample.continuation, return_offsets_mapping=True)
            ids, ends = whole["input_ids"], whole["offset_mapping"]
            cut = next(i for i, (_, stop) in enumerate(ends) if stop > len(sample.text))
            return Prompt(list(ids[:cut]), list(ids[cut:]))
        question = sample.turns[0]
        if self.chats:
            return build_prompt(self.tokenizer, sample.text, question.instruction)
        # What a tokenizer puts before a text belongs there alone.
        return Prompt(list(self.tokenizer(sample.text)["input_ids"]), self.encode(question.completion))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of what goes on after something else."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def follow(self, turn: Turn) -> list[int]:
        """Return the tokens between an answer, its last token included, and the next one's first."""
        if not self.chats:
            return self.encode(turn.completion)
        asked = [
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": _SAID},
            {"role": "user", "content": turn.instruction},
        ]
        frame = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        rest = frame[frame.index(_SAID) + len(_SAID) :]
        return self.encode(rest)

    def limit(self, turn: Turn) -> int:
        """Return how many tokens an answer may take: a third more than the right one's, and a few."""
        n = len(self.encode(turn.answer))
        return n + n // 3 + (32 if self.chats else 4)

    def ends(self, token: int, stops: set[int]) -> bool:
        """Say whether an answer ends with this token."""
        if token in stops:
            return True
        if self.chats:
            return False
        if token not in self._newlines:
            self._newlines[token] = "\n" in self.tokenizer.decode([token])
        return self._newlines[token]


@torch.no_grad()
def ask_turns(far: Handle, cache: FarCache, speaker: Speaker, sample: Sample, first: list[int]) -> Spoken:
    """Feed every question and decode its answer greedily; answers become part of the context of later turns."""
    stops = find_stops(far.model)
    started = time.perf_counter()
    said: list[Said] = []
    pending: list[int] = first
    for n, turn in enumerate(sample.turns):
        if n:
            pending += speaker.follow(turn)
        logits = feed(far, cache, pending)
        assert logits is not None
        ids, pending = _answer(far, cache, logits, speaker, (speaker.limit(turn), stops))
        said.append(Said(speaker.tokenizer.decode(ids, skip_special_tokens=True), ids))
    return Spoken(said, time.perf_counter() - started)


def _answer(
    far: Handle, cache: FarCache, logits: Tensor, speaker: Speaker, limits: tuple[int, set[int]]
) -> tuple[list[int], list[int]]:
    """Return an answer's tokens, and what the cache has not seen yet: the last of them, or what ends the line.

    A chat template writes the end of an answer itself.
    """
    most, stops = limits
    line_end = [] if speaker.chats else speaker.encode("\n")
    ids: list[int] = []
    while True:
        token = int(logits.argmax(-1))
        if speaker.ends(token, stops):
            return ids, line_end if token in stops or speaker.chats else [token]
        ids.append(token)
        if len(ids) == most:
            return ids, [token, *line_end]
        found = feed(far, cache, [token])
        assert found is not None
        logits = found


@torch.no_grad()
def force_tokens(far: Handle, cache: FarCache, tokens: list[int]) -> tuple[Tensor, float]:
    """Feed known tokens as decode steps; return the log-probabilities after each but the last, and the seconds.

    Returns:
        float32 [n - 1, vocabulary], in host memory.
    """
    started, rows = time.perf_counter(), []
    for token in tokens[:-1]:
        logits = feed(far, cache, [token])
        assert logits is not None
        rows.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(rows), time.perf_counter() - started


def find_stops(model: Any) -> set[int]:
    """Return the tokens that end a text, as the model's generation settings have them."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return set(found) if isinstance(found, list) else set() if found is None else {found}
