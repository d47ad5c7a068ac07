"""Tokenised one-question prompts on filler that training never saw, and the check of their answers.

In: held-out files or files of other packages. Out: right or wrong per prompt. Shared by the
trainer's reports and by `eval_demo.py`.
"""

from __future__ import annotations

import random

import torch
from forward import run_model
from samples import DIGITS, FACT
from tokenizers import Tokenizer

from farkv.demo.recall import make_chain_prompt, make_recall_prompt

STEP = 128  # the forward pass takes multiples of this


class Filler:
    """Draws runs of consecutive lines, as text, by their number of tokens."""

    def __init__(self, tokenizer: Tokenizer, files: dict[str, str]):
        self.tokenizer = tokenizer
        self.lines = [line for text in files.values() for line in text.splitlines(keepends=True)]

    def draw(self, n_tokens: int, rng: random.Random) -> list[str]:
        """Take lines from a random place, stopping before they exceed `n_tokens`."""
        at, got, lines = rng.randrange(len(self.lines)), 0, []
        while True:
            line = self.lines[at % len(self.lines)]
            got += len(self.tokenizer.encode(line).ids)
            if got > n_tokens:
                return lines
            lines.append(line)
            at += 1


def draw_prompt(filler: Filler, length: int, n_facts: int, seed: int, hops: int = 0) -> list[int]:
    """Return the tokens of one prompt of at most about `length` tokens, answer included."""
    rng = random.Random(seed)
    lines = filler.draw(length - (n_facts + hops) * (FACT + 1) - 20, rng)
    prompt = make_chain_prompt(lines, n_facts, seed, hops) if hops else make_recall_prompt(lines, n_facts, seed)
    return filler.tokenizer.encode(prompt.text + prompt.question + prompt.answer).ids


@torch.no_grad()
def answer_prompts(model, prompts: list[list[int]], rows: int = 4) -> list[bool]:
    """Say of each prompt whether all four digits are the model's greedy choice.

    With the right digits as input, all are the argmax exactly when greedy decoding writes them.
    """
    right: list[bool] = []
    for i in range(0, len(prompts), rows):
        group = prompts[i : i + rows]
        width = -(-max(map(len, group)) // STEP) * STEP
        tokens = torch.zeros(len(group), width, dtype=torch.long)
        for r, ids in enumerate(group):
            tokens[r, : len(ids)] = torch.tensor(ids)
        hidden = run_model(model, tokens)
        for r, ids in enumerate(group):
            states = hidden[r, len(ids) - DIGITS - 1 : len(ids) - 1].float()
            guess = (states @ model.lm_head.weight.float().T).argmax(-1)
            right.append(guess.tolist() == ids[-DIGITS:])
    return right
