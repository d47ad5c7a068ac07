"""Point 9, its numbers: NaN, infinity and overflow in queries, keys and values, and odd numbers for arguments.

A small random model with a marked token: where that is read, a projection of one layer puts out something that is not
finite, or too large. What all records are read for must be what the plain model gives, NaN included; at a cap it
answers with a whole cache and a receipt of numbers, or refuses (tests/hf/test_not_finite.py holds the answer to a dense
replay of what was chosen). Never somebody else's error.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from random_models import make_llama
from transformers import DynamicCache

import farkv
from attacks.base import Attack, Verdict
from farkv import FarKVError
from farkv.calibrate.planning import PlanBudget, make_plan
from farkv.measure.mini import Light
from farkv.methods import H2O, XKV, Full, InfiniGen, LowBit, Oracle, Pages, PyramidKV, Random, SnapKV, Window

MARKED, TOKENS, STEPS, VOCABULARY = 63, 60, 4, 64
ODD = [float("nan"), float("inf"), -float("inf"), 1e18, -1e30, 3e38]


@cache
def get_model() -> Any:
    model = make_llama(256, layers=3, heads=4, kv_heads=2, hidden=32, mlp=32, vocabulary=VOCABULARY, head_dim=16)
    # The marked token is known by its first coordinate, in whatever pass it is read.
    model.model.embed_tokens.weight.data[:, 0] = 0.0
    model.model.embed_tokens.weight.data[MARKED] = 0.0
    model.model.embed_tokens.weight.data[MARKED, 0] = 1000.0
    return model


@contextmanager
def poison(which: str, value: float, column: int, layer: int = 1) -> Any:
    """Let a projection put out `value` in a column of the marked token."""

    def change(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        inputs = args[0] if args else kwargs["hidden_states"]
        out = out.clone()
        out[..., column] = torch.where(inputs[..., 0].abs() > 5.3, value, out[..., column])
        return out

    attention = get_model().model.layers[layer].self_attn
    hook = getattr(attention, which).register_forward_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def draw_poison(rng: random.Random) -> tuple[str, float, int]:
    return rng.choice(["q_proj", "k_proj", "v_proj"]), rng.choice(ODD), rng.randrange(32)


def draw_ids(rng: random.Random) -> torch.Tensor:
    """Draw a text and the tokens that are fed after it, one of them marked."""
    ids = torch.tensor([[rng.randrange(MARKED) for _ in range(TOKENS + STEPS)]])
    ids[0, rng.choice([3, 30, TOKENS - 2, TOKENS + 1])] = MARKED
    return ids


def play(ids: torch.Tensor, cache: Any) -> torch.Tensor:
    model, out = get_model(), []
    for piece in (ids[:, :TOKENS], *ids[:, TOKENS:].split(1, 1)):
        out.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits[:, -1:])
    return torch.cat(out, 1)


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def attack_full(rng: random.Random) -> Verdict:
    """Read everything, by a method that fits an index, in place or through a link."""
    ids, chosen = draw_ids(rng), draw_poison(rng)
    with poison(*chosen):
        plain = play(ids, DynamicCache(config=get_model().config))
        try:
            with farkv.attach(get_model(), InfiniGen(fraction=1.0), near=rng.choice([None, "1MiB"])) as far:
                return "right" if is_same(play(ids, far.new_cache()), plain) else "wrong"
        except FarKVError:
            return "refused"
        except Exception:
            return "wrong"


METHODS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (InfiniGen, {}), (InfiniGen, {"fraction": 0.5, "paper": True}), (InfiniGen, {"alpha": 3.0}),
    (InfiniGen, {"top_p": 0.8}), (LowBit, {}), (LowBit, {"bits": 4}), (Pages, {"page": 8}),
    (Oracle, {}), (Random, {}), (Window, {}), (XKV, {}), (XKV, {"scorer": "value"}), (XKV, {"scorer": "expected"}),
    (H2O, {}), (SnapKV, {}), (PyramidKV, {}),
]  # fmt: skip
EVICTORS = (XKV, H2O, SnapKV)


def attack_cap(rng: random.Random) -> Verdict:
    """Answer at a cap, in every tier; afterwards the cache must be whole: it answers, or says that it cannot."""
    ids, chosen, (kind, options) = draw_ids(rng), draw_poison(rng), rng.choice(METHODS)
    method = kind(**{"fraction": 0.3, **options})
    with tempfile.TemporaryDirectory() as folder, poison(*chosen):
        far_away = [{"disk": f"{folder}:8MiB"}, {"quant": "int8"}, {"quant": "int4"}]
        # What evicts reads whole layers in place: it takes neither.
        places = [{}, {"near": "1MiB"}, *(far_away if not isinstance(method, EVICTORS) else [])]
        place: dict[str, Any] = rng.choice(places)
        try:
            with farkv.attach(get_model(), method, **place) as far:
                cache = far.new_cache(verify=2)
                play(ids, cache)
                receipt = far.receipt(cache)
                lengths = {cache.get_seq_length(i) for i in range(3)}
        except FarKVError:
            return "refused"
        except Exception:
            return "wrong"
    # A receipt is JSON: a figure that is no number is none.
    figures = [receipt.quality] if receipt.quality is None else list(vars(receipt.quality).values())
    finite = all(x is None or np.isfinite(x) for x in figures)
    return "right" if lengths == {TOKENS + STEPS} and finite else "wrong"


# --- arguments ------------------------------------------------------------------------------------------------

NUMBERS: list[Any] = [
    float("nan"), float("inf"), -float("inf"), 5e-324, -1, -0.5, 10**30, 10**400, 10**5000, 2**63, True, False, 0.5, 3,
    "0.5", "x", "", "1e400GiB", "9" * 400 + "MiB", "\0", "\ud800", b"1", None, [], [0.5], {}, 1j, object(),
    np.float32(0.5), np.float64(0.5), np.int64(3), np.float64("nan"), np.bool_(True),
]  # fmt: skip
CONFIGS: list[tuple[Callable[..., Any], list[str]]] = [
    (InfiniGen, "fraction columns index_bits alpha top_p sinks window top_up source paper".split()),
    (XKV, "fraction retention tokens levers rule scorer window pool sinks paper".split()),
    (Window, ["fraction", "sinks"]), (Oracle, ["fraction", "sinks", "window"]), (Full, ["fraction"]),
    (Random, ["fraction", "sinks", "window", "seed"]), (H2O, ["fraction", "recent"]),
    (SnapKV, ["fraction", "window", "pool"]), (PyramidKV, ["fraction", "window", "pool"]),
    (Pages, ["fraction", "page", "sinks", "window"]), (LowBit, ["fraction", "bits", "sinks", "window"]),
]  # fmt: skip


@cache
def get_profile() -> Any:
    prompts = [torch.arange(n) % VOCABULARY for n in (50, 60, 70, 80)]
    return farkv.profile(get_model(), prompts, losses=1)


def use_config(rng: random.Random, odd: Any) -> None:
    kind, names = rng.choice(CONFIGS)
    method = kind(**{rng.choice(names): odd})
    with farkv.attach(get_model(), method) as far:
        play(torch.arange(TOKENS + STEPS)[None] % MARKED, far.new_cache())


def use_attach(rng: random.Random, odd: Any) -> None:
    name = rng.choice("near host evict quant kernel profile plan".split())
    with farkv.attach(get_model(), InfiniGen(), **{name: odd}) as far:
        play(torch.arange(TOKENS + STEPS)[None] % MARKED, far.new_cache())


def use_cache(rng: random.Random, odd: Any) -> None:
    with farkv.attach(get_model(), InfiniGen(), near="1MiB", host="8MiB") as far:
        cache = far.new_cache(**{rng.choice(["tokens", "batch", "verify", "chunk_tokens"]): odd})
        play(torch.arange(TOKENS + STEPS)[None] % MARKED, cache)


def use_allocate(rng: random.Random, odd: Any) -> None:
    gains = np.sort(np.random.default_rng(0).random((3, 20)))[:, ::-1]
    wanted: dict[str, Any] = {rng.choice(["tokens", "ratio", "retention"]): odd}
    if rng.random() < 0.5:
        wanted = {"tokens": 12, rng.choice(["weights", "floor", "cap", "unit", "rule"]): odd}
    counts = farkv.allocate([[odd] * 20] * 3 if rng.random() < 0.2 else gains, **wanted)
    assert counts.shape == (3,)
    assert 0 <= counts.min() <= counts.max() <= 20


def use_plan(rng: random.Random, odd: Any) -> None:
    name = rng.choice(["tokens", "ratio", "n_bytes", "retention", "confidence", "context"])
    given = {name: odd} if name in ("tokens", "ratio", "n_bytes", "retention") else {"tokens": 60, name: odd}
    if name == "confidence":
        given = {"retention": 0.5, name: odd}
    make_plan(get_profile(), PlanBudget(**given), ("keep",))


def use_profile(rng: random.Random, odd: Any) -> None:
    name = rng.choice(["scorer", "window", "pool", "losses", "light", "prompt"])
    prompts: list[Any] = [torch.arange(70) % VOCABULARY]
    options = {name: Light(odd, 1) if name == "light" else odd}
    if name == "prompt":
        options, prompts = {}, [[1, 2, odd, 4]]
    farkv.profile(get_model(), prompts, **options)


def attack_arguments(*uses: Callable[[random.Random, Any], None]) -> Callable[[random.Random], Verdict]:
    def attempt(rng: random.Random) -> Verdict:
        try:
            rng.choice(uses)(rng, rng.choice(NUMBERS))
        except FarKVError:
            return "refused"
        except Exception:
            return "wrong"
        return "right"

    return attempt


def attack_measuring(rng: random.Random) -> Verdict:
    """Profile a model that computes something that is not finite: nothing of it may stand in a profile."""
    light = rng.choice([None, Light(0.5, 1)])
    losses = 0 if light else rng.randrange(2)
    which, _, column = draw_poison(rng)
    # A light pass always holds the prompt's end.
    prompt = torch.arange(80) % VOCABULARY
    prompt[-1] = MARKED
    with poison(which, rng.choice(ODD[:3]), column, layer=rng.randrange(3)):
        try:
            farkv.profile(get_model(), [prompt], light=light, losses=losses)
        except FarKVError:
            return "refused"
        except Exception:
            return "wrong"
    return "wrong"


ARGUMENTS = (use_config, use_attach, use_cache, use_allocate, use_plan, use_profile)
ATTACKS = {
    "exact": Attack(9, "NaN, infinity or 1e18 in queries, keys or values; everything is read", attack_full, 12, 150),
    "cap": Attack(9, "the same with every method, at a cap, in every tier", attack_cap, 25, 400),
    "arguments": Attack(9, "NaN, 400 digits, denormals, texts and other types for numbers of the Python API",
                        attack_arguments(*ARGUMENTS), 40, 800),
    "measuring": Attack(9, "a profile is measured of a model that computes NaN or infinity", attack_measuring, 6, 60),
}  # fmt: skip
