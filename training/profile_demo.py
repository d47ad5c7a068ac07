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
from dataclasses import replace
from pathlib import Path

import farkv
from farkv.demo import MODEL_PATH
from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import make_recall_prompt
from farkv.hf.load import load_model

# The skews: texts of one length, with the answer.
SKEW_PROMPTS, SKEW_TOKENS, FACTS = 16, 4096, 30
# The curves: prompts of many lengths that end with their question.
PROMPTS, SHORTEST, LONGEST = 64, 1024, 6144
# Of those, prompts on which the losses of limited layers are measured.
LOSSES = 16
# Tokens of a fact and of the question, about.
FACT_TOKENS = 14
PART = Path("runs/profile_demo.part")


def make_words(rng: random.Random) -> list[str]:
    """Make words for names: random letters, so that no test's name is among them."""
    return ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7))) for _ in range(300)]


def make_texts() -> list[str]:
    """Make the texts that the skews are measured on."""
    files, words = read_sources(STDLIB, held_out=False), make_words(random.Random(0))
    texts = []
    for seed in range(SKEW_PROMPTS):
        filler = draw_filler(files, int(3.2 * (SKEW_TOKENS - 13 * FACTS)), seed)
        made = make_recall_prompt(filler, FACTS, seed, words)
        texts.append(f"{made.text}{made.question}{made.answer}\n")
    return texts


def make_prompts(measure: Callable[[str], int]) -> list[str]:
    """Make prompts like those the model is asked, of lengths from SHORTEST to LONGEST tokens in mixed order.

    Args:
        measure: counts a line's tokens.
    """
    files = read_sources(STDLIB, held_out=False)
    rng = random.Random(0)
    words = make_words(rng)
    texts = []
    for seed in range(PROMPTS):
        tokens = rng.randint(SHORTEST, LONGEST)
        filler = draw_filler(files, tokens - FACT_TOKENS * (FACTS + 1), seed, measure)
        made = make_recall_prompt(filler, FACTS, seed, words)
        texts.append(made.text + made.question)
    return texts


def main() -> None:
    """Measure and save; an interrupted run goes on where it was, but for the losses."""
    model, tokenizer = load_model("demo", device="cpu")

    def show(done: int, total: int) -> None:
        print(f"{done}/{total}", end="\r", flush=True)

    texts = [tokenizer(text)["input_ids"] for text in make_texts()]
    skews = farkv.profile(model, texts, curves=False, on_prompt=show)
    rows = [tokenizer(text)["input_ids"] for text in make_prompts(lambda line: len(tokenizer(line)["input_ids"]))]
    PART.parent.mkdir(exist_ok=True)
    curves = farkv.profile(model, rows, on_prompt=show, resume=PART, losses=LOSSES)
    replace(curves, tensors=skews.tensors).save(MODEL_PATH / "profile.safetensors")
    print(f"wrote profile.safetensors: skews from {sum(map(len, texts)):,} tokens, curves from {len(rows)} prompts")


if __name__ == "__main__":
    main()
