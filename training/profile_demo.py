"""Measure the demo model's profile and put it beside its weights.

    python training/profile_demo.py

In: the training side of the standard library, with facts and questions whose names are random letters; every prompt
ends with its question, as prompts are asked. Out: `profile.safetensors`: skews and gain curves. Held-out files and
the words of test names stay unseen, so no test is calibrated on.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path

import farkv
from farkv.demo import MODEL_PATH
from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import make_recall_prompt
from farkv.hf.load import load_model

PROMPTS, SHORTEST, LONGEST, FACTS = 64, 1024, 6144, 30
# Prompts on which the losses of limited layers are measured.
LOSSES = 16
# Tokens of a fact and of the question, about.
FACT_TOKENS = 14


def make_prompts(measure: Callable[[str], int]) -> list[str]:
    """Make texts like those the model is asked about, of lengths from SHORTEST to LONGEST tokens in mixed order.

    Args:
        measure: counts a line's tokens.
    """
    files = read_sources(STDLIB, held_out=False)
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7))) for _ in range(300)]
    texts = []
    for seed in range(PROMPTS):
        tokens = rng.randint(SHORTEST, LONGEST)
        filler = draw_filler(files, tokens - FACT_TOKENS * (FACTS + 1), seed, measure)
        made = make_recall_prompt(filler, FACTS, seed, words)
        texts.append(made.text + made.question)
    return texts


def main() -> None:
    """Measure and save; an interrupted run goes on where it was."""
    model, tokenizer = load_model("demo", device="cpu")
    texts = make_prompts(lambda line: len(tokenizer(line)["input_ids"]))
    rows = [tokenizer(text)["input_ids"] for text in texts]
    measured = farkv.profile(
        model,
        rows,
        on_prompt=lambda done, total: print(f"{done}/{total}", end="\r", flush=True),
        resume=Path("profile_demo.part"),
        losses=LOSSES,
    )
    measured.save(MODEL_PATH / "profile.safetensors")
    lengths = sorted(map(len, rows))
    print(f"wrote profile.safetensors from {len(rows)} prompts of {lengths[0]:,} to {lengths[-1]:,} tokens, "
          f"{sum(lengths):,} in all")  # fmt: skip


if __name__ == "__main__":
    main()
