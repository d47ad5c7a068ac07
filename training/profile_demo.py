"""Measure the demo model's profile and put it beside its weights.

    python training/profile_demo.py

In: the training side of the standard library, with facts and questions whose names are random letters. Out:
`profile.safetensors`. Held-out files and the words of test names stay unseen, so no test is calibrated on.
"""

from __future__ import annotations

import random
import string

import farkv
from farkv.demo import MODEL_PATH
from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import make_recall_prompt
from farkv.hf.load import load_model

PROMPTS, TOKENS, FACTS = 16, 4096, 30


def make_prompts() -> list[str]:
    """Make texts like those the model is asked about."""
    files = read_sources(STDLIB, held_out=False)
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7))) for _ in range(300)]
    texts = []
    for seed in range(PROMPTS):
        filler = draw_filler(files, int(3.2 * (TOKENS - 13 * FACTS)), seed)
        made = make_recall_prompt(filler, FACTS, seed, words)
        texts.append(f"{made.text}{made.question}{made.answer}\n")
    return texts


def main() -> None:
    """Measure and save."""
    model, tokenizer = load_model("demo", device="cpu")
    rows = [tokenizer(text)["input_ids"] for text in make_prompts()]
    measured = farkv.profile(model, rows, on_prompt=lambda done, total: print(f"{done}/{total}", end="\r", flush=True))
    measured.save(MODEL_PATH / "profile.safetensors")
    print(f"wrote profile.safetensors from {sum(map(len, rows)):,} tokens")


if __name__ == "__main__":
    main()
