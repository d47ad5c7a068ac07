"""Exact means exact: at 100 % the plain model's bits, or a receipt that says why not; and a cap that cannot be kept to.

The reference is the plain model read in the same passes. Where a receipt says `rounding`, what differs must be as near
to the model in double precision as the plain model is, but for a factor.
"""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import DynamicCache

import farkv
from attacks.base import Attack, Verdict
from farkv.methods import H2O, XKV, Full, InfiniGen, LowBit, Pages, SnapKV, Window

VOCAB, LAYERS = 61, 3
SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    pad_token_id=0,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8,
                   "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
}  # fmt: skip
# How much further from double precision than the plain model a run may be that is equal to rounding.
MORE = 8.0


@cache
def make(family: str, dtype: torch.dtype, *, double: bool = False) -> Any:
    """Return a random model; or the same one in double precision."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**(SMALL | FAMILIES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    return model.double() if double else model


class Case(NamedTuple):
    """A model, a text of several passes, and the tokens that follow one by one."""

    family: str
    dtype: torch.dtype
    passes: tuple[torch.Tensor, ...]
    steps: tuple[torch.Tensor, ...]

    @property
    def n_tokens(self) -> int:
        return sum(part.shape[1] for part in self.passes + self.steps)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's records."""
        head = FAMILIES[self.family].get("head_dim", 8)
        return len(self.steps[0]) * self.n_tokens * 2 * 2 * head * self.dtype.itemsize


def draw(rng: random.Random, families: list[str] | None = None, batch: int = 1) -> Case:
    n, n_steps = rng.randrange(24, 400), rng.randrange(1, 5)
    chunk = rng.choice([n, n, 7, 31, 64, 100, 128])
    ids = torch.tensor([[rng.randrange(1, VOCAB) for _ in range(n + n_steps)] for _ in range(batch)])
    dtype = rng.choice([torch.float32, torch.bfloat16])
    text, rest = ids[:, :n], ids[:, n:]
    return Case(rng.choice(families or [*FAMILIES][:3]), dtype, text.split(chunk, 1), rest.split(1, 1))


def read(model: Any, parts: tuple[torch.Tensor, ...], cache: Any) -> torch.Tensor:
    """Return the logits of all parts, read one after the other."""
    return torch.cat([model(input_ids=p, past_key_values=cache, use_cache=True).logits for p in parts], 1).double()


def judge(case: Case, ours: torch.Tensor, receipt: Any, *, must: str = "no") -> Verdict:
    """Compare logits of the end of the text with the plain model's: equal, or as far off as the receipt admits.

    Args:
        must: the worst that the receipt may say.
    """
    plain = read(model := make(case.family, case.dtype), case.passes + case.steps, DynamicCache(config=model.config))
    plain = plain[:, -ours.shape[1] :]
    says = getattr(receipt, "exact", None)
    if torch.equal(ours, plain):
        return "right"
    if says not in ("rounding", "no") or (must == "bit") or (must == "rounding" and says == "no"):
        return "wrong"
    if says == "no":
        return "right"
    exact = make(case.family, case.dtype, double=True)
    truth = read(exact, case.passes + case.steps, DynamicCache(config=exact.config))[:, -ours.shape[1] :]
    off, own = ((x - truth).abs().max().item() for x in (ours, plain))
    return "right" if off <= MORE * own else "wrong"


def run(case: Case, method: Any, *, then: Any = None, **limits: Any) -> tuple[torch.Tensor, Any]:
    """Read a case through a method under limits; return logits and receipt.

    Args:
        then: the method that goes on from a session of the text; None: there is no session.
    """
    model = make(case.family, case.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.farkv"
        if limits.pop("on_disk", False):
            limits["disk"] = f"{folder}:1GiB"
        with farkv.attach(model, method, profile=False, **limits) as far:
            cache = far.new_cache()
            text = read(model, case.passes, cache)
            if then is None:
                return torch.cat([text, read(model, case.steps, cache)], 1), far.receipt(cache)
            cache.save(path)
        with farkv.attach(model, then, profile=False) as far:
            cache = farkv.load_cache(path, model)
            return read(model, case.steps, cache), far.receipt(cache)


def draw_whole(rng: random.Random) -> Any:
    """Draw a method that reads everything."""
    return rng.choice([Full(), Full(), InfiniGen(fraction=1.0), Pages(fraction=1.0, page=8), LowBit(fraction=1.0)])


def read_whole(rng: random.Random) -> Verdict:
    """Read everything where a layer fits."""
    place = rng.choice(["disk", "disk, near", "disk, host", "session", "near"])
    case = draw(rng, batch=1 if place == "session" else rng.randrange(1, 4))
    limits: dict[str, Any] = {"on_disk": place.startswith("disk")}
    if "near" in place:
        limits["near"] = 10 * case.layer_bytes + 100_000
    if "host" in place:
        limits["host"] = 20 * case.layer_bytes + 1_000_000
    method = draw_whole(rng)
    then = rng.choice([Full(), method]) if place == "session" else None
    if place == "near":
        method = rng.choice([method, XKV(fraction=1.0), SnapKV(fraction=1.0), H2O(fraction=1.0)])
    return judge(case, *run(case, method, then=then, **limits), must="bit")


def read_tight(rng: random.Random) -> Verdict:
    """Read everything under a limit around one layer's bytes."""
    case, limits = draw(rng), {"on_disk": rng.random() < 0.7}
    method, tier = rng.choice([Full(), Full(), draw_whole(rng)]), "near"
    if limits["on_disk"] and rng.random() < 0.5:
        tier = "host"
        limits[tier] = int(case.layer_bytes * rng.uniform(3, 8)) + rng.randrange(100_000, 300_000)
    else:
        limits[tier] = int(case.layer_bytes * rng.uniform(0.3, 3)) + rng.randrange(20_000, 60_000)
    try:
        return judge(case, *run(case, method, **limits), must="rounding")
    except farkv.FarKVError:
        return "refused"


def read_less(rng: random.Random) -> Verdict:
    """Leave something out, code it, or read it by other means; the receipt must not call that the same."""
    kind = rng.choice(["select", "evict", "pool", "quant", "kernel", "session"])
    case, fraction = draw(rng, [*FAMILIES]), rng.choice([0.02, 0.2, 0.9])
    method: Any = rng.choice([InfiniGen(fraction=fraction), Window(fraction=fraction), InfiniGen()])
    options: dict[str, Any] = {"on_disk": rng.random() < 0.3 and kind not in ("evict", "pool")}
    if kind == "evict":
        method = rng.choice([XKV(fraction=fraction), H2O(fraction=fraction), SnapKV(fraction=fraction)])
    elif kind == "pool":
        method, options["evict"] = draw_whole(rng), rng.choice(["fifo", "lru", "counter"])
        options["host"] = int(LAYERS * case.layer_bytes * rng.uniform(0.4, 1.2))
    elif kind == "quant":
        method, options["quant"] = draw_whole(rng), rng.choice(["int8", "int4"])
    elif kind == "kernel":
        method, options["kernel"] = InfiniGen(fraction=1.0), rng.choice(["auto", "native", "plain"])
    elif kind == "session":
        # What chose less is saved with its steps, and goes on with everything.
        options["then"] = Full()
        parts = case.passes + case.steps
        case = case._replace(passes=parts[: -len(case.steps) // 2], steps=parts[-len(case.steps) // 2 :])
    try:
        return judge(case, *run(case, method, **options))
    except farkv.FarKVError:
        return "refused"


def ask_too_little(rng: random.Random) -> Verdict:
    """Ask for a fraction that a hybrid, or a method's least number of records, cannot keep to."""
    case, fraction = draw(rng, ["Llama", "Gemma3Text"]), rng.choice([0.005, 0.01, 0.05, 0.1])
    method: Any = rng.choice([InfiniGen, XKV, Window, SnapKV])(fraction=fraction)
    _, receipt = run(case, method)
    # Of the last step, whose context is the longest: at no step is less of it one record.
    if receipt.read_fraction <= fraction + 1 / case.n_tokens:
        return "right"
    least = getattr(receipt, "least_read_fraction", None)
    if least is None or not receipt.notes or f"{fraction:g}" not in receipt.notes[0]:
        return "wrong"
    managed = [row.read_fraction for row in receipt.layers if row.managed]
    same = abs(receipt.managed_read_fraction - sum(managed) / len(managed)) < 1e-9
    records = max(fraction, 14 / sum(part.shape[1] for part in case.passes))
    return (
        "right"
        if same and least <= receipt.read_fraction + 1e-9 and receipt.managed_read_fraction <= records
        else "wrong"
    )


ATTACKS = {
    "whole": Attack(7, "everything is read, over disk, session or link, where a layer fits", read_whole, 3, 150),
    "tight": Attack(7, "everything is read under a limit around one layer", read_tight, 3, 150),
    "less": Attack(7, "choosing, evicting, coding or another kernel, called the same", read_less, 3, 150),
    "cap": Attack(8, "a fraction that hybrids, or least records, cannot keep to", ask_too_little, 3, 150),
}
