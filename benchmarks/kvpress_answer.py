"""How kvpress answers a prompt: one reading of the text, every press's eviction from it, the question token by token.

In: a model folder, prompts. Out: `Told`s. Presses do not change what later layers see while the text is read, so one
reading serves them all: each press's own `compress` gets what its hook would get. `compare_presses` checks that against
the hooks themselves.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kvpress_peer import Told
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


class Talk:
    """A cache while it is asked, token by token; what its tensors hold at every step is counted."""

    def __init__(self, answerer: Answerer, cache: DynamicCache, n_text: int):
        self.own, self.cache, self.n_text, self.steps = answerer, cache, n_text, 0
        self.read = self.full = 0
        keys = cache.layers[0].keys
        self.record_bytes = 2 * keys.shape[1] * keys.shape[3] * keys.element_size()
        # A view of a larger tensor counts as that.
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        held = sum(t.untyped_storage().nbytes() for t in tensors)
        self.smaller = held < n_text * self.record_bytes * len(cache.layers)

    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Feed tokens, each at its own place in the text; return the last logits, [vocabulary]."""
        logits = torch.empty(0)
        for token in tokens:
            ids, place = torch.tensor([[token]]), torch.tensor([[self.n_text + self.steps]])
            out = self.own.model(input_ids=ids, past_key_values=self.cache, position_ids=place, use_cache=True)
            logits, self.steps = out.logits[0, -1], self.steps + 1
            self.read += self.held
            self.full += len(self.cache.layers) * (self.n_text + self.steps)
        return logits

    @property
    def held(self) -> int:
        """Return the records in the tensors of all layers."""
        return sum(layer.keys.shape[2] for layer in self.cache.layers)

    def force(self, tokens: list[int]) -> torch.Tensor:
        """Feed known tokens; return the log-probabilities after each but the last, [n - 1, vocabulary]."""
        return torch.stack([self.feed([token]).float().log_softmax(-1) for token in tokens[:-1]])

    def ask(self, turns: list[dict[str, Any]]) -> list[str]:
        """Ask turn by turn as `farkv eval` asks a base model: an answer ends with its line."""
        answers: list[str] = []
        pending: list[int] = []
        for turn in turns:
            ids, pending = self._answer([*pending, *self.own.encode(turn["completion"])], turn)
            answers.append(self.own.tokenizer.decode(ids, skip_special_tokens=True))
        return answers

    def _answer(self, question: list[int], turn: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return an answer's tokens, and what of it the cache has not seen."""
        n_right, line_end, ids = len(self.own.encode(turn["answer"])), self.own.encode("\n"), []
        logits = self.feed(question)
        while True:
            token = int(logits.argmax())
            if token in self.own.stops:
                return ids, line_end
            if "\n" in self.own.tokenizer.decode([token]):
                return ids, [token]
            ids.append(token)
            if len(ids) == n_right + n_right // 3 + 4:
                return ids, [token, *line_end]
            logits = self.feed([token])


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
    def answer(self, prompt: dict[str, Any], variants: Variants) -> Iterator[Told]:
        """Yield the full cache's answer, then every variant's."""
        text, following = self._split(prompt)
        caches = self.read(text, [v for v in variants if v[0] in SDPA], eager=False)
        eager = [v for v in variants if v[0] in EAGER]
        if eager and len(text) <= self.eager_tokens:
            caches |= self.read(text, eager, eager=True)
        reference = None
        for variant in list(caches):
            told, logs = self._tell(variant, Talk(self, caches.pop(variant), len(text)), prompt, following, reference)
            reference = logs if reference is None else reference
            yield told
        for variant in variants:
            if variant[0] in MASKS:
                talk = Talk(self, self.press(text, make_press(*variant)), len(text))
                yield self._tell(variant, talk, prompt, following, reference)[0]
                for layer in self.model.model.layers:
                    layer.self_attn.masked_key_indices = None

    def _split(self, prompt: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the tokens of the text, and of a continuation that is fed after it, as `farkv eval` cuts them."""
        if not prompt.get("continuation"):
            return list(self.tokenizer(prompt["text"])["input_ids"]), []
        whole = self.tokenizer(prompt["text"] + prompt["continuation"], return_offsets_mapping=True)
        ids, ends = list(whole["input_ids"]), whole["offset_mapping"]
        cut = next(i for i, (_, stop) in enumerate(ends) if stop > len(prompt["text"]))
        return ids[:cut], ids[cut:]

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

    def _tell(
        self, variant: tuple[str, float], talk: Talk, prompt: dict[str, Any], following: list[int],
        reference: torch.Tensor | None,
    ) -> tuple[Told, torch.Tensor | None]:  # fmt: skip
        """Ask a cache, or feed it what follows; `reference`: of a continuation, the full cache's predictions."""
        started, judged, answers, logs = time.perf_counter(), {}, [], None
        if following:
            logs, goal = talk.force(following), torch.tensor(following[1:])
            full = logs if reference is None else reference
            judged = dict(score=float((logs.argmax(-1) == goal).float().mean()),
                          nll=float(-logs[torch.arange(len(goal)), goal].mean()),
                          kl=float((full.exp() * (full - logs)).sum(-1).mean()))  # fmt: skip
        else:
            answers = talk.ask(prompt["turns"])
        last = talk.held / len(talk.cache.layers) / (talk.n_text + talk.steps)
        read, full_bytes = (n * talk.record_bytes / talk.steps for n in (talk.read, talk.full))
        told = Told(*variant, answers, read / full_bytes, last, read, full_bytes, talk.smaller, talk.steps,
                    time.perf_counter() - started, **judged)  # fmt: skip
        return told, logs


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
    return json.dumps({"presses_checked": list(same), "tokens": len(tokens)})
