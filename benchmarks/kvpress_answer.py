"""How kvpress answers a prompt: one reading of the text, every press's eviction from it, the question token by token.

In: a model folder, prompts. Out: `Told`s. Presses do not change what later layers see while the text is read, so one
reading serves them all: each press's own `compress` gets what its hook would get. `compare_presses` checks that against
the hooks themselves.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kvpress_peer import Told
from kvpress_talk import Heard, Talk, find_lengths
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging

# Prints the logits of a text's first tokens; run by another environment's interpreter, which reads it from -c.
LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[3])
"""
CHECKED_TOKENS = 512
# kvpress's names; those of the second line need all attention weights, that of the third only masks.
SDPA = {
    "snapkv": "SnapKVPress",
    "pyramidkv": "PyramidKVPress",
    "streamingllm": "StreamingLLMPress",
    "expectedattention": "ExpectedAttentionPress",
    "knorm": "KnormPress",
    "tova": "TOVAPress",
    "keydiff": "KeyDiffPress",
    "lagkv": "LagKVPress",
    "random": "RandomPress",
}
EAGER = {"observedattention": "ObservedAttentionPress"}
MASKS = {"kvzip": "KVzipPress"}
Variants = list[tuple[str, float]]


def make_press(name: str, fraction: float) -> Any:
    """Return kvpress's press that keeps this fraction."""
    import kvpress

    known = SDPA | EAGER | MASKS
    if name not in known:
        sys.exit(f"--presses: expected some of {', '.join(known)}, got {name!r}")
    return getattr(kvpress, known[name])(compression_ratio=1 - fraction)


class Answerer:
    """A model, its tokenizer and what they answer."""

    def __init__(self, path: str, threads: int, eager_tokens: int):
        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        # farkv computes half-precision checkpoints in float32 on a CPU.
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.eager_tokens = eager_tokens
        eos = self.model.generation_config.eos_token_id
        self.stops = set(eos) if isinstance(eos, list) else {eos} - {None}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of what goes on after something else."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def answer(self, prompt: dict[str, Any], variants: Variants, *, together: bool = True) -> Iterator[Told]:
        """Yield the full cache's answer, then every variant's; `together`: caches of equal lengths as one batch."""
        text, rest = self._split(prompt)
        caches = self.read(text, [v for v in variants if v[0] in SDPA], eager=False)
        eager = [v for v in variants if v[0] in EAGER]
        if eager and len(text) <= self.eager_tokens:
            caches |= self.read(text, eager, eager=True)
        groups: dict[Any, Variants] = {}
        for variant, cache in caches.items():
            groups.setdefault(tuple(find_lengths(cache)) if together else variant, []).append(variant)
        reference = None
        for group in groups.values():
            tolds, logs = self._tell(group, [caches.pop(v) for v in group], len(text), prompt, (rest, reference))
            reference = logs if group[0][0] == "full" else reference
            yield from tolds
        for variant in variants:
            if variant[0] in MASKS:
                cache = self.press(text, make_press(*variant))
                yield from self._tell([variant], [cache], len(text), prompt, (rest, reference))[0]
                for layer in self.model.model.layers:
                    layer.self_attn.masked_key_indices = None

    def _split(self, prompt: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the tokens of the text, and of what is fed after it, as `farkv eval` cuts them."""
        if prompt.get("continuation"):
            whole = self.tokenizer(prompt["text"] + prompt["continuation"], return_offsets_mapping=True)
            ids, ends = whole["input_ids"], whole["offset_mapping"]
            cut = next(i for i, (_, stop) in enumerate(ends) if stop > len(prompt["text"]))
            return list(ids[:cut]), list(ids[cut:])
        return list(self.tokenizer(prompt["text"])["input_ids"]), self.encode(prompt["turns"][0]["completion"])

    def read(self, text: list[int], variants: Variants, *, eager: bool) -> dict[tuple[str, float], DynamicCache]:
        """Read the text once; return each variant's cache, and the full one where attention is not eager."""
        presses = {v: make_press(*v) for v in variants}
        caches = {v: DynamicCache() for v in variants}
        for press in presses.values():
            press.post_init_from_model(self.model)

        def evict(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer, i = kwargs["past_key_values"].layers[module.layer_idx], module.layer_idx
            for variant, press in presses.items():
                found = press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
                caches[variant].update(*found, i)

        full, body = DynamicCache(), self.model.model
        hooks = []
        for layer in body.layers:
            layer.self_attn.rotary_emb = body.rotary_emb
            hooks.append(layer.self_attn.register_forward_hook(evict, with_kwargs=True))
        with self._attention(eager=eager):
            body(input_ids=torch.tensor([text]), past_key_values=full)
        for hook in hooks:
            hook.remove()
        return caches if eager else {("full", 1.0): full, **caches}

    @contextlib.contextmanager
    def _attention(self, *, eager: bool) -> Iterator[None]:
        """Use attention that hands out its weights, for a while."""
        if eager:
            self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            if eager:
                self.model.set_attn_implementation("sdpa")

    def press(self, text: list[int], press: Any, *, eager: bool = False) -> DynamicCache:
        """Read the text under a press's own hooks."""
        cache = DynamicCache()
        with self._attention(eager=eager), press(self.model):
            self.model.model(input_ids=torch.tensor([text]), past_key_values=cache)
        return cache

    def _tell(
        self,
        group: Variants,
        caches: list[DynamicCache],
        n_text: int,
        prompt: dict[str, Any],
        fed: tuple[list[int], torch.Tensor | None],
    ) -> tuple[list[Told], torch.Tensor | None]:
        """Ask caches of equal lengths; `fed` is what follows the text and, of `ppl`, the full cache's predictions."""
        rest, reference = fed
        talk, started = Talk(self, caches, n_text), time.perf_counter()
        logs = talk.force(rest) if prompt.get("continuation") else None
        heard = talk.ask(prompt["turns"], rest) if logs is None else [Heard([], talk.steps)] * len(group)
        # Rows that waited for each other were not timed.
        seconds = time.perf_counter() - started if len(group) == 1 else None
        reference = logs[0] if reference is None and logs is not None else reference
        tolds = []
        for i, (variant, row) in enumerate(zip(group, heard, strict=True)):
            count = talk.count(row.steps)
            told = Told(*variant, row.answers, count.read / count.full, count.last, count.read, count.full,
                        talk.smaller[i], row.steps, seconds)  # fmt: skip
            tolds.append(told if logs is None else judge_text(told, logs[i], reference, torch.tensor(rest[1:])))
        return tolds, reference


def judge_text(told: Told, logs: torch.Tensor, reference: torch.Tensor | None, goal: torch.Tensor) -> Told:
    """Add what the true continuation and the full cache say of predictions, [n, vocabulary]."""
    assert reference is not None
    return told._replace(
        score=float((logs.argmax(-1) == goal).float().mean()),
        nll=float(-logs[torch.arange(len(goal)), goal].mean()),
        kl=float((reference.exp() * (reference - logs)).sum(-1).mean()),
    )


def compare_logits(python: str, path: str, text: str, answerer: Answerer) -> str:
    """Say how far this version's logits are from those of the environment that has farkv."""
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "ids.pt", Path(folder) / "logits.pt"
        tokens = torch.tensor([answerer.tokenizer(text)["input_ids"][:CHECKED_TOKENS]])
        torch.save(tokens, ids)
        subprocess.run([python, "-c", LOGITS, path, str(ids), str(out)], check=True, capture_output=True)
        with torch.no_grad():
            ours, theirs = answerer.model(tokens).logits, torch.load(out)
    gap, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not gap <= 1e-4 * size:
        sys.exit(f"kvpress_peer: the model's logits differ by {gap:.3g} of {size:.3g} between the two environments")
    return json.dumps({"logits_checked": list(ours.shape), "largest": size, "largest_difference": gap})


@torch.no_grad()
def compare_presses(answerer: Answerer, text: str, names: list[str], fraction: float) -> str:
    """Say whether one reading for all presses leaves the very caches that each press's own hooks leave."""
    tokens, same = list(answerer.tokenizer(text)["input_ids"])[: 4 * CHECKED_TOKENS], {}
    for name in names:
        if name in MASKS or name == "random":
            continue
        ours = answerer.read(tokens, [(name, fraction)], eager=name in EAGER)[name, fraction]
        theirs = answerer.press(tokens, make_press(name, fraction), eager=name in EAGER)
        pairs = zip(ours.layers, theirs.layers, strict=True)
        same[name] = all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)
    if not all(same.values()):
        sys.exit(f"kvpress_peer: one reading for all presses is not each press's own: {same}")
    kept = math.floor(fraction * len(tokens))
    return json.dumps({"presses_checked": list(same), "tokens": len(tokens), "kept_of_each_layer_about": kept})


@torch.no_grad()
def compare_batch(answerer: Answerer, prompt: dict[str, Any], variants: Variants) -> str:
    """Say whether caches that are asked together answer as each does alone."""
    alone, together = (list(answerer.answer(prompt, variants, together=t)) for t in (False, True))
    answers = [
        {(t.press, t.fraction): (t.answers, t.steps, t.read_fraction) for t in told} for told in (alone, together)
    ]
    same = sum(answers[0][name] == answers[1][name] for name in answers[0])
    return json.dumps({"asked_together_as_alone": same, "of": len(alone), "task": prompt["task"]})
