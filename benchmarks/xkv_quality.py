"""What does a share of the cache hold, and what does it cost? Rules, budgets and levers on the same prompts.

    python benchmarks/xkv_quality.py
    python benchmarks/xkv_quality.py --parts keep --prompts 4

In: the demo model and its shipped profile, fresh held-out prompts. Out: a JSON line per prompt, method and budget.
Parts:
  keep      evict after the prompt. Recall with the question inside the prompt (query-aware, the paper's setting), and
            code, decoded on: attention mass of the *later* decode steps' queries, agreement and KL to the full cache
  agnostic  the same recall with the question after the eviction: what no allocation can mend
  fetch     nothing is evicted: InfiniGen's caps per layer by plan, beside one global cap at equal traffic
  layers    one layer at a time is evicted: KL against 1 - R_l
Prefill runs once per prompt; each method's cache is filled with those very keys, values and queries.
`xkv_tables.py` makes tables of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from demo_texts import FACTS, Demo, answer_greedily, fill_cache, force_tokens, prefill_once
from rows import Row
from runs import Recorder, make_parser, read_names

from farkv import XKV, Full, InfiniGen, Plan, Profile, attach
from farkv.calibrate.plan import Allocation
from farkv.calibrate.planning import PlanBudget, Sharing, make_plan
from farkv.demo import MODEL_PATH
from farkv.methods import Method

KEEP_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85)
AGNOSTIC_RATIOS = (0.1, 0.3, 0.5)
FETCH_RATIOS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
LAYER_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)
RULES = ("xkv", "loss", "uniform", "pyramid", "maxmin")
CODE_STEPS = 32


class Setting(NamedTuple):
    """A method under a plan at a ratio, and its name in the rows."""

    name: str
    ratio: float
    method: Method
    plan: Plan | None = None


def list_settings(part: str, profile: Profile) -> list[Setting]:
    """Return what a part runs, plans made of a profile."""

    def plan(lever: str, ratio: float, rule: str) -> Plan:
        return make_plan(profile, PlanBudget(ratio=ratio), (lever,), Sharing(rule))

    found: list[Setting] = []
    if part == "layers":
        layers = profile.curves().layers
        for layer in layers:
            for share in LAYER_SHARES:
                shares = tuple(share if i == layer else 1.0 for i in layers)
                one = Allocation(shares, 0, "one layer", {}, shares, shares)
                found.append(Setting(f"layer {layer}", share, XKV(), Plan(profile.identity, layers, {"keep": one})))
    elif part == "fetch":
        for ratio in FETCH_RATIOS:
            found.append(Setting("one global cap", ratio, InfiniGen(fraction=ratio)))
            above = InfiniGen(fraction=min(1.0, ratio + 1e-3))
            found += [Setting(f"plan, {rule}", ratio, above, plan("fetch", ratio, rule)) for rule in ("xkv", "loss")]
    else:
        for ratio in KEEP_RATIOS if part == "keep" else AGNOSTIC_RATIOS:
            found += [Setting(rule, ratio, XKV(), plan("keep", ratio, rule)) for rule in RULES]
            # XKV's allocation of each prompt by itself.
            found.append(Setting("xkv, each prompt", ratio, XKV(fraction=ratio)))
    return found


def run_recall(demo: Demo, i: int, settings: list[Setting], *, aware: bool) -> Iterator[Row]:
    """Ask one question of a prompt, in every setting; mass and KL over all its decode steps."""
    length = (2048, 4096)[i % 2]
    seed = 9_000_000 + 1000 * length + i
    _, prompt, expected, sha = demo.make_recall(length, FACTS[length], seed)
    prompt = prompt.read_question() if aware else prompt
    prefilled = prefill_once(demo.model, prompt.text)
    with attach(demo.model, Full()) as far:
        full = answer_greedily(far, fill_cache(far, prefilled), prompt.question)
    for name, ratio, method, plan in settings:
        with attach(demo.model, method, plan=plan) as far:
            cache = fill_cache(far, prefilled, verify=64)
            got = answer_greedily(far, cache, prompt.question)
            yield dict(task="recall", method=name, ratio=ratio, length=length, tokens=prompt.n_tokens, seed=seed,
                       prompt_sha=sha, agrees=got == full, right=got == expected, full_right=full == expected,
                       **measured(far.receipt(cache)))  # fmt: skip


def run_code(demo: Demo, i: int, settings: list[Setting]) -> Iterator[Row]:
    """Decode known code after a text: later queries' mass, KL and top-1 agreement."""
    length = (1024, 2048, 4096)[i % 3]
    seed = 9_500_000 + 1000 * length + i
    text, following = demo.make_code(length, CODE_STEPS, seed)
    prefilled = prefill_once(demo.model, text)
    for name, ratio, method, plan in settings:
        with attach(demo.model, method, plan=plan) as far:
            cache = fill_cache(far, prefilled, verify=CODE_STEPS)
            force_tokens(far, cache, following)
            yield dict(task="code", method=name, ratio=ratio, length=length, seed=seed, **measured(far.receipt(cache)))


def measured(receipt: Any) -> Row:
    """Return what a receipt says, as a row's columns; `layers` is the mass that each layer's choice held."""
    q = receipt.quality
    return dict(kept=receipt.kept_fraction, read=receipt.read_fraction, index=receipt.index_fraction, kl=q.kl_mean,
                top1=q.top1_agreement, mass=q.mass_mean, layers=[row.mass_mean for row in receipt.layers])  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, "xkv_quality.jsonl")
    parser.add_argument("--parts", default="keep,agnostic,fetch,layers", type=read_names)
    parser.add_argument("--prompts", default=24, type=int, help="recall prompts of each part")
    parser.add_argument("--texts", default=9, type=int, help="code texts of each part")
    parser.add_argument("--profile", default=str(MODEL_PATH / "profile.safetensors"))
    run, demo = Recorder(parser), Demo()
    for part in run.args.parts:
        settings = list_settings(part, Profile.load(run.args.profile))
        for i in range(run.args.prompts):
            aware = part in ("keep", "layers")
            run.write(*({"part": part} | row for row in run_recall(demo, i, settings, aware=aware)))
            run.say(f"{part}, recall {i + 1}/{run.args.prompts}")
        for i in range(run.args.texts if part != "agnostic" else 0):
            run.write(*({"part": part} | row for row in run_code(demo, i, settings)))
            run.say(f"{part}, code {i + 1}/{run.args.texts}")


if __name__ == "__main__":
    main()
