"""Texts that change their kind, and how far a method's predictions on them are from the full cache's.

In: a model, texts that every installation has: licences of installed packages, Python's manual, Python's library. Out:
tokens of one kind and then of another; caches that have read them in given passes; KL, in nats. It runs on older
versions of the package as well, so that a script can measure what was before.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from farkv import Full, attach
from farkv.demo.filler import STDLIB
from farkv.evals.prefill import Prefilled, fill_cache, prefill_once

KINDS = ("licence", "manual", "source")
# Every ordered pair: what a text begins with, and what it goes on with.
PAIRS = [(a, b) for a in KINDS for b in KINDS if a != b]
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")


class Mixed(NamedTuple):
    """A text of one kind and then of another, `n_first` tokens of the first."""

    name: str
    tokens: list[int]
    n_first: int


def read_kinds() -> dict[str, str]:
    """Return a long text of every kind."""
    files = [f for f in metadata.files("torch") or () if f.name.upper().startswith(LICENCES)]
    licences = {str(f.locate().read_text(errors="replace")) for f in files}
    # Long files of the library itself.
    modules = [path.read_text("utf-8") for path in sorted(STDLIB.glob("*.py")) if path.stat().st_size > 20_000]
    topics = (STDLIB / "pydoc_data" / "topics.py").read_text("utf-8")
    return {
        "licence": "\n".join(sorted(licences, key=len, reverse=True)),
        # Its lines are string literals.
        "manual": "\n".join(line.strip().strip("'\"") for line in topics.splitlines()).replace("\\n", ""),
        "source": "".join(modules),
    }


class Bench:
    """A model, its tokenizer and the texts; every text is another part of its kinds."""

    def __init__(self, model: str):
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.kinds = read_kinds()
        self.used: dict[str, int] = dict.fromkeys(KINDS, 0)

    def take(self, kind: str, n: int) -> list[int]:
        """Return the next `n` tokens of a kind."""
        start, text = self.used[kind], self.kinds[kind]
        self.used[kind] += 8 * n
        tokens = self.tokenizer(text[start : start + 8 * n], add_special_tokens=False)["input_ids"][:n]
        assert len(tokens) == n, f"{kind}: too short"
        return tokens

    def make_texts(self, n: int, n_first: int, n_rest: int) -> Iterator[Mixed]:
        """Make `n` texts."""
        for first, rest in PAIRS[:n]:
            yield Mixed(f"{first}, {rest}", self.take(first, n_first) + self.take(rest, n_rest), n_first)


def split_passes(prefilled: Prefilled, sizes: list[int]) -> Prefilled:
    """Return a text that was read in one pass as if it had been read in passes of these sizes."""
    (whole,) = prefilled.passes
    passes, start = [], 0
    for n in sizes:
        passes.append({i: cut_step(step, start, start + n) for i, step in whole.items()})
        start += n
    return prefilled._replace(passes=passes, n_tokens=start)


def cut_step(step: Any, start: int, stop: int) -> Any:
    """Return the part of a pass that reads these tokens; attention's output is not asked for, so nor is a mask."""
    query = step.query._replace(q=step.query.q[:, :, start:stop])
    return step._replace(query=query, k=step.k[:, :, start:stop], v=step.v[:, :, start:stop], mask=None)


def read_once(model: Any, tokens: list[int]) -> Prefilled:
    """Read a text densely, in one pass."""
    return prefill_once(model, [tokens], chunk=len(tokens))


@torch.no_grad()
def force_tokens(model: Any, cache: Any, tokens: list[int]) -> torch.Tensor:
    """Feed known tokens as decode steps; return the log-probabilities after each, [n, vocabulary]."""
    logs = [model(input_ids=torch.tensor([[t]]), past_key_values=cache).logits[:, -1] for t in tokens]
    return torch.cat(logs).float().log_softmax(-1)


def force_full(model: Any, prefilled: Prefilled, tokens: list[int]) -> torch.Tensor:
    """Return the full cache's predictions."""
    with attach(model, Full()) as far:
        return force_tokens(model, fill_cache(far, prefilled, len(tokens)), tokens)


def measure_kl(full: torch.Tensor, logs: torch.Tensor) -> float:
    """Return the mean KL to the full cache's predictions, in nats."""
    return float((full.exp() * (full - logs)).sum(-1).mean())
