"""Ask one sample's questions over one cache; questions and answers pass through the method token by token.

In: a filled cache, turns. Out: the answers and the seconds they took. A base model's answer ends with the line, a chat
model's with its turn.
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

# Placeholder for the previous answer when a chat template is rendered.
_ANSWER = "farkv-answer-7c3e"


class Answer(NamedTuple):
    """One turn's answer: its text and tokens."""

    text: str
    ids: list[int]


class Answers(NamedTuple):
    """The answers of all turns, and the seconds they took."""

    turns: list[Answer]
    seconds: float


class Prompter:
    """Formats questions for one model: as completions, or with its chat template."""

    def __init__(self, tokenizer: Any, form: str = "auto"):
        chats = bool(getattr(tokenizer, "chat_template", None))
        if form == "chat" and not chats:
            raise InputError("--form chat: the tokenizer has no chat template; use --form completion")
        self.tokenizer, self.chats = tokenizer, chats if form == "auto" else form == "chat"
        self._newlines: dict[int, bool] = {}

    def build(self, sample: Sample) -> Prompt:
        """Return the tokens of the text and of the first question (for `ppl`, of the continuation)."""
        if sample.continuation:
            whole = self.tokenizer(sample.text + sample.continuation, return_offsets_mapping=True)
            ids, ends = whole["input_ids"], whole["offset_mapping"]
            cut = next(i for i, (_, stop) in enumerate(ends) if stop > len(sample.text))
            return Prompt(list(ids[:cut]), list(ids[cut:]))
        question = sample.turns[0]
        if self.chats:
            return build_prompt(self.tokenizer, sample.text, question.instruction)
        # Special tokens at the beginning belong to the text only, not to the question.
        return Prompt(list(self.tokenizer(sample.text)["input_ids"]), self.encode(question.completion))

    def encode(self, text: str) -> list[int]:
        """Tokenise text that follows other text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def follow(self, turn: Turn) -> list[int]:
        """Return the tokens that follow an answer's last token, up to and including the next question."""
        if not self.chats:
            return self.encode(turn.completion)
        asked = [
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": turn.instruction},
        ]
        frame = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return self.encode(frame[frame.index(_ANSWER) + len(_ANSWER) :])

    def limit(self, turn: Turn) -> int:
        """Return the token limit of an answer: a third more than the correct one's length, plus a few."""
        n = len(self.encode(turn.answer))
        return n + n // 3 + (32 if self.chats else 4)

    def ends(self, token: int, stops: set[int]) -> bool:
        """Return whether this token ends an answer."""
        if token in stops:
            return True
        if self.chats:
            return False
        if token not in self._newlines:
            self._newlines[token] = "\n" in self.tokenizer.decode([token])
        return self._newlines[token]


@torch.no_grad()
def ask_turns(far: Handle, cache: FarCache, prompter: Prompter, sample: Sample, first: list[int]) -> Answers:
    """Feed every question and decode its answer greedily; answers are part of the context of later turns."""
    stops = find_stops(far.model)
    started = time.perf_counter()
    answers: list[Answer] = []
    pending: list[int] = first
    for n, turn in enumerate(sample.turns):
        if n:
            pending += prompter.follow(turn)
        logits = feed(far, cache, pending)
        assert logits is not None
        ids, pending = _answer(far, cache, logits, prompter, (prompter.limit(turn), stops))
        answers.append(Answer(prompter.tokenizer.decode(ids, skip_special_tokens=True), ids))
    return Answers(answers, time.perf_counter() - started)


def _answer(
    far: Handle, cache: FarCache, logits: Tensor, prompter: Prompter, limits: tuple[int, set[int]]
) -> tuple[list[int], list[int]]:
    """Return an answer's tokens, and the tokens still to be fed before the next question: its last one, a line end.

    With a chat template the template itself ends the answer.
    """
    most, stops = limits
    line_end = [] if prompter.chats else prompter.encode("\n")
    ids: list[int] = []
    while True:
        token = int(logits.argmax(-1))
        if prompter.ends(token, stops):
            return ids, line_end if token in stops or prompter.chats else [token]
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
        float32 [n - 1, vocabulary] on the CPU, and the seconds.
    """
    started, rows = time.perf_counter(), []
    for token in tokens[:-1]:
        logits = feed(far, cache, [token])
        assert logits is not None
        rows.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(rows), time.perf_counter() - started


def find_stops(model: Any) -> set[int]:
    """Return the end-of-text tokens of the model's generation config."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return set(found) if isinstance(found, list) else set() if found is None else {found}
