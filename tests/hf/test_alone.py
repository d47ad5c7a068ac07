"""One sequence's answer is its own: the same alone and in any batch, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.methods import Full, InfiniGen, Oracle, Random, Window
from tests.hf.tape import Tape
from tests.models import generate, make_model, make_prompt

STEPS = 12
METHODS: dict[str, Any] = {
    "ours": InfiniGen(fraction=0.3),
    "default": InfiniGen(),
    "alpha": InfiniGen(fraction=0.3, alpha=2.0),
    "top_p": InfiniGen(fraction=0.3, top_p=0.5),
    "no_top_up": InfiniGen(fraction=0.3, top_up=0.0),
    "eight_bits": InfiniGen(fraction=0.2, index_bits=8, source="attn"),
    "window": Window(fraction=0.3),
    "oracle": Oracle(fraction=0.3),
    "full": Full(),
}
# One to four, and more; some shorter than the window, some of too few tokens for a skew of their own.
LENGTHS = {"ragged": (96, 24, 53, 9), "long": (150, 70, 110), "tiny": (12, 3, 40, 1)}


def make_texts(lengths: tuple[int, ...], seed: int = 20) -> list[torch.Tensor]:
    """Return random token ids, the same for a length whatever others are asked for."""
    return [make_prompt(1, tokens=n, seed=seed + n)["input_ids"][0] for n in lengths]


def pad_left(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the texts as one batch."""
    n = max(map(len, texts))
    pads = torch.tensor([n - len(t) for t in texts])[:, None]
    ids = torch.stack([torch.nn.functional.pad(t, (n - len(t), 0)) for t in texts])
    return {"input_ids": ids, "attention_mask": (torch.arange(n) >= pads).long()}


class Run:
    """What each sequence of a batch read at every step, and the logits it gave."""

    def __init__(self, far: Any, texts: list[torch.Tensor], steps: int = STEPS):
        batch = pad_left(texts)
        cache = far.new_cache()
        with Tape(far.model, cache) as tape:
            # The embedding of padding is zero: its query scores all records alike, and any choice is as good.
            out = generate(far.model, batch, cache, n=steps + 1, suppress_tokens=[0])
        n = batch["input_ids"].shape[1]
        self.tokens = out.sequences[:, n:]
        self.logits = torch.stack(list(out.logits))
        self.pads = [n - len(t) for t in texts]
        self.reads = [p.reads for p in tape.passes[1:]]

    def read(self, i: int) -> list[dict[int, list[list[int]]]]:
        """Return the places that sequence `i` read, counted from its own first token, by step, layer and KV head."""
        found = []
        for reads in self.reads:
            step = {}
            for layer, (positions, valid) in reads.items():
                keep = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
                # Padding that is read with everything else is hidden by the mask.
                keep = keep & (positions >= self.pads[i])
                rows = zip(positions[i], keep[i], strict=True)
                step[layer] = [sorted((row[flag] - self.pads[i]).tolist()) for row, flag in rows]
            found.append(step)
        return found


def assert_alone(together: Run, i: int, alone: Run) -> None:
    """Assert that sequence `i` of a batch chose and answered as it did alone."""
    for step, (a, b) in enumerate(zip(alone.read(0), together.read(i), strict=True)):
        for layer in b:
            # Alone a short text may be read whole without a choice.
            assert a[layer] == b[layer], f"sequence {i}, step {step}, layer {layer}"
    a, b = alone.logits[:, 0], together.logits[:, i]
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert torch.equal(alone.tokens[0], together.tokens[i])


def make_profile(model: Any, kind: str) -> Any:
    return farkv.profile(model, [make_prompt(1, tokens=60, seed=8)["input_ids"][0]]) if kind == "profile" else False


NEARS = (None, "1MiB")
CASES = [
    *((m, "ragged", "prompt", near) for m in METHODS for near in NEARS),
    *((m, "ragged", "profile", near) for m in ("ours", "alpha", "top_p") for near in NEARS),
    *((m, n, "prompt", None) for m in ("ours", "default", "top_p", "window") for n in ("long", "tiny")),
]


@pytest.mark.parametrize(("method", "lengths", "skew", "near"), CASES)
def test_alone_as_in_any_batch(method: str, lengths: str, skew: str, near: Any) -> None:
    model = make_model("llama")
    texts = make_texts(LENGTHS[lengths])
    with farkv.attach(model, METHODS[method], profile=make_profile(model, skew), near=near) as far:
        together = Run(far, texts)
        for i, text in enumerate(texts):
            assert_alone(together, i, Run(far, [text]))


@pytest.mark.parametrize("method", ["ours", "alpha", "top_p", "window", "oracle"])
def test_what_the_others_say_changes_nothing(method: str) -> None:
    model = make_model("llama")
    texts = make_texts(LENGTHS["ragged"])
    others = [texts[0], *make_texts(LENGTHS["ragged"][1:], seed=70)]
    with farkv.attach(model, METHODS[method], profile=False) as far:
        mine, theirs = Run(far, texts), Run(far, others)
    assert not torch.equal(mine.logits[:, 1:], theirs.logits[:, 1:])
    assert torch.equal(mine.logits[:, 0], theirs.logits[:, 0])
    assert mine.read(0) == theirs.read(0)


def test_random_reads_as_many_as_alone() -> None:
    model = make_model("llama")
    texts = make_texts(LENGTHS["ragged"])
    with farkv.attach(model, Random(fraction=0.3)) as far:
        together = Run(far, texts)
        for i, text in enumerate(texts):
            counts = [
                [[len(row) for row in rows] for step in run.read(j) for rows in step.values()]
                for run, j in ((together, i), (Run(far, [text]), 0))
            ]
            assert counts[0] == counts[1]
