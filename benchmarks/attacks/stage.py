"""Where passes are attacked: tiny random models, every tier and method, a calm cache and its twin under attack."""

from __future__ import annotations

import functools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from random_models import make_llama
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import farkv
from farkv import FarKVError
from farkv.methods import H2O, XKV, Full, InfiniGen, LowBit, Pages, PyramidKV, SnapKV

from .base import Verdict

VOCABULARY, N_PROMPT = 97, 160


class Place(NamedTuple):
    """A method in a tier; `hybrid`: on a model that has sliding layers too."""

    method: Any
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    verify: int = 0
    hybrid: bool = False


# Over a disk, which pages have a copy decides what a capped choice may take: there everything is read.
PLACES = {
    "in place": Place(InfiniGen(fraction=0.4)),
    "verified": Place(InfiniGen(fraction=0.4), verify=99),
    "near": Place(InfiniGen(fraction=0.2), {"near": "220KiB"}),
    "near, tight": Place(InfiniGen(fraction=0.2), {"near": "88KiB"}),
    "disk": Place(InfiniGen(fraction=1.0), {"disk": ":9MiB", "host": "900KiB"}),
    "full over disk": Place(Full(), {"disk": ":9MiB", "host": "900KiB"}),
    "spills": Place(InfiniGen(fraction=0.3), {"host": "115KiB", "evict": "lru"}),
    "int8": Place(InfiniGen(fraction=0.3), {"quant": "int8", "near": "160KiB"}),
    "hybrid": Place(InfiniGen(fraction=0.4), {"near": "160KiB"}, hybrid=True),
    "hybrid, verified": Place(InfiniGen(fraction=0.4), verify=99, hybrid=True),
    "pages": Place(Pages(fraction=0.3, page=4)),
    "lowbit": Place(LowBit(fraction=0.3)),
    "snapkv": Place(SnapKV(fraction=0.3)),
    "pyramidkv": Place(PyramidKV(fraction=0.3)),
    "h2o": Place(H2O(fraction=0.3)),
    "xkv": Place(XKV(fraction=0.3)),
    "xkv and a selector": Place(XKV(fraction=0.5), {"near": "160KiB"}),
}
EVICTING = ("snapkv", "pyramidkv", "h2o", "xkv", "xkv and a selector", "spills")


@functools.cache
def make_model(*, hybrid: bool = False) -> Any:
    """Return the tiny model, the same one at every call."""
    if not hybrid:
        shape = dict(layers=4, heads=4, kv_heads=2, hidden=32, mlp=48, vocabulary=VOCABULARY)
        return make_llama(2048, seed=0, **shape, initializer_range=0.2)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, head_dim=8, sliding_window=16, query_pre_attn_scalar=8, layer_types=kinds,
        initializer_range=0.2, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config).eval()


@contextmanager
def attach(place: Place) -> Iterator[Any]:
    """Attach a place's method to its model; a disk's folder lives as long."""
    options, methods = dict(place.options), [place.method]
    if isinstance(place.method, XKV) and "near" in options:
        methods.append(InfiniGen(fraction=0.3))
    with tempfile.TemporaryDirectory() as folder:
        if "disk" in options:
            options["disk"] = folder + options["disk"]
        with farkv.attach(make_model(hybrid=place.hybrid), *methods, **options) as far:
            yield far


def draw_text(rng: random.Random) -> list[torch.Tensor]:
    """Draw a text: a prompt in one or two passes, then single tokens and a later turn."""
    ids = torch.tensor([[rng.randrange(1, VOCABULARY) for _ in range(N_PROMPT + 14)]])
    first = rng.randrange(55, 105)
    sizes = [first, N_PROMPT - first, 1, 1, 1, 5, 1, 1, 1, 1, 1, 1]
    return list(ids[:, : sum(sizes)].split(sizes, 1))


def read(far: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Run a pass."""
    return far.model(input_ids=ids, past_key_values=cache).logits


class Calm:
    """The answers that a text gets where nothing happens."""

    def __init__(self, far: Any, place: Place, pieces: list[torch.Tensor]):
        cache = make_cache(far, place, pieces)
        self.logits = [read(far, cache, ids) for ids in pieces]


def make_cache(far: Any, place: Place, pieces: list[torch.Tensor]) -> Any:
    """Make a cache to which the prompt is announced."""
    cache = far.new_cache(verify=place.verify)
    cache.engine.announce_prompt(sum(ids.shape[1] for ids in pieces[:2]), 2048)
    return cache


def go_on(far: Any, cache: Any, pieces: list[torch.Tensor], calm: Calm, at: int, *, alone: bool = True) -> Verdict:
    """Read a text from piece `at` on; say whether every answer is that of a calm run, or was refused.

    Beside another cache less of a shared limit is left, and dense reads may come in blocks where they came whole: an
    answer is then the same to rounding, and the receipt must say so.
    """
    for i in range(at, len(pieces)):
        try:
            logits = read(far, cache, pieces[i])
        except FarKVError:
            return "refused"
        if torch.equal(logits, calm.logits[i]):
            continue
        if alone or far.receipt(cache).exact != "rounding" or not is_near(logits, calm.logits[i]):
            return "wrong"
    return "right"


def is_near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Say whether float32 logits are the same but for the order of sums."""
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


class Interrupt:
    """Ctrl-C at a line of farkv's own code: at event number `at` of the block, or never, and then counted only."""

    def __init__(self, at: int = -1):
        self.at, self.seen = at, 0

    def __enter__(self) -> Interrupt:
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)

    def _trace(self, frame: Any, event: str, arg: Any) -> Callable[..., Any] | None:
        if "/farkv/" not in frame.f_code.co_filename:
            return None
        if event in ("call", "line"):
            self.seen += 1
            if self.seen == self.at + 1:
                raise KeyboardInterrupt
        return self._trace
