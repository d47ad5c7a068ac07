"""How kvpress answers a prompt: one reading of the text, every press's eviction from it, the question token by token.

In: a model folder, prompts with their tokens. Out: `Told`s, compared with the full cache. Presses do not change what
later layers see while the text is read, so one reading serves them all: each press's own `compress` gets what its hook
would get. `compare_presses` checks that against the hooks themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kvpress_peer import Told
from kvpress_talk import Speaker, Spoken, Talk
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging

from farkv.evals.forced import average, compare_continuation, compare_turn

# Prints the logits of a text's first tokens; run by another environment's interpreter, which reads it from -c.
LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
dtype = getattr(torch, sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(ids).logits.float(), sys.argv[3])
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


class Heard(NamedTuple):
    """What a cache said: turns, or the predictions of a continuation; and the talk, which counted what was read."""

    talk: Talk
    spoken: list[Spoken]
    logs: torch.Tensor | None
    seconds: float


class Answerer:
    """A model, its tokenizer and what they answer.

    Args:
        path: the model's folder, or a hub id.
        dtype: the run's.
        form: the run's: how answers end.
        eager_tokens: the longest text for a press that needs all weights.
    """

    def __init__(self, path: str, dtype: torch.dtype, form: str, eager_tokens: int):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.eager_tokens = eager_tokens
        eos = self.model.generation_config.eos_token_id
        self.speaker = Speaker(self.model, self.tokenizer, form, set(eos) if isinstance(eos, list) else {eos} - {None})

    @torch.no_grad()
    def answer(self, prompt: dict[str, Any], variants: Variants) -> Iterator[Told]:
        """Yield the full cache's answer, then every variant's, compared with it."""
        text = prompt["tokens"]["text"]
        caches = self.read(text, [v for v in variants if v[0] in SDPA], eager=False)
        eager = [v for v in variants if v[0] in EAGER]
        if eager and len(text) <= self.eager_tokens:
            caches |= self.read(text, eager, eager=True)
        full = None
        for variant in list(caches):
            heard = self._hear(caches.pop(variant), prompt)
            full = heard if full is None else full
            yield tell(variant, heard, full, prompt)
        for variant in variants:
            if variant[0] in MASKS and full is not None:
                yield tell(variant, self._hear(self.press(text, make_press(*variant)), prompt), full, prompt)
                for layer in self.model.model.layers:
                    layer.self_attn.masked_key_indices = None

    def _hear(self, cache: DynamicCache, prompt: dict[str, Any]) -> Heard:
        """Ask a cache, or feed it what follows."""
        tokens, started = prompt["tokens"], time.perf_counter()
        talk = Talk(self.speaker, cache, len(tokens["text"]))
        if tokens["continuation"]:
            spoken, logs = [], talk.force(tokens["continuation"])
        else:
            spoken, logs = talk.ask(tokens["turns"], speaks=not prompt["n_written"]), None
        return Heard(talk, spoken, logs, time.perf_counter() - started - talk.paused)

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

        full, body, hooks = DynamicCache(), self.model.model, []
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


def tell(variant: tuple[str, float], heard: Heard, full: Heard, prompt: dict[str, Any]) -> Told:
    """Return what a cache said, how near it is to the full one, and what it read."""
    talk = heard.talk
    last = talk.held / len(talk.cache.layers) / (talk.n_text + talk.steps)
    read, full_bytes = (n * talk.record_bytes / talk.steps for n in (talk.read, talk.full))
    texts = [spoken.text for spoken in heard.spoken]
    told = Told(*variant, texts, read / full_bytes, last, read, full_bytes, talk.smaller, talk.steps, heard.seconds)
    if heard.logs is not None and full.logs is not None:
        goal = torch.tensor(prompt["tokens"]["continuation"][1:])
        near = compare_continuation(full.logs, heard.logs, goal)
        return told._replace(**near, agrees=near["top1"] == 1)
    pairs = [compare_turn(f.logs, h.logs) for f, h in zip(full.spoken, heard.spoken, strict=True)]
    kl, top1 = average([closeness for closeness, _ in pairs])
    told = told._replace(kl=kl, top1=top1, turns=tuple(record for _, record in pairs))
    if prompt["n_written"]:
        # There is no right answer: right is what the full cache would say next.
        return told._replace(score=top1, agrees=top1 == 1)
    return told._replace(agrees=texts == [spoken.text for spoken in full.spoken])


def compare_logits(python: str, path: str, text: list[int], answerer: Answerer) -> str:
    """Say how far this version's logits are from those of the environment that has farkv."""
    dtype = answerer.model.dtype
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "ids.pt", Path(folder) / "logits.pt"
        tokens = torch.tensor([text[:CHECKED_TOKENS]])
        torch.save(tokens, ids)
        # In half precision sums over other numbers of threads are other numbers.
        same = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [python, "-c", LOGITS, path, str(ids), str(out), name]
        subprocess.run(command, check=True, capture_output=True, env=same)
        with torch.no_grad():
            ours, theirs = answerer.model(tokens).logits.float(), torch.load(out)
    gap, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    # Half precision rounds coarser than float32's bound: a few of its last digits.
    if not gap <= max(1e-4, 4 * torch.finfo(dtype).eps) * size:
        sys.exit(f"kvpress_peer: the model's logits differ by {gap:.3g} of {size:.3g} between the two environments")
    return json.dumps({"logits_checked": list(ours.shape), "dtype": name, "largest": size, "largest_difference": gap})


@torch.no_grad()
def compare_presses(answerer: Answerer, text: list[int], names: list[str], fraction: float) -> str:
    """Say whether one reading for all presses leaves the very caches that each press's own hooks leave."""
    tokens, same = text[: 4 * CHECKED_TOKENS], {}
    for name in names:
        if name in MASKS or name == "random":
            continue
        ours = answerer.read(tokens, [(name, fraction)], eager=name in EAGER)[name, fraction]
        theirs = answerer.press(tokens, make_press(name, fraction), eager=name in EAGER)
        pairs = zip(ours.layers, theirs.layers, strict=True)
        same[name] = all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)
    if not all(same.values()):
        sys.exit(f"kvpress_peer: one reading for all presses is not each press's own: {same}")
    return json.dumps({"presses_checked": list(same), "tokens": len(tokens)})
