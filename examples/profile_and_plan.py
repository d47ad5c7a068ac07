"""Measure a model once, share a budget over its layers, and let the plan cap what each layer fetches.

python examples/profile_and_plan.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

import farkv
from farkv.calibrate.planning import PlanBudget, Sharing, make_plan
from farkv.demo.text import draw_prompt
from farkv.hf.load import load_model
from farkv.methods import XKV

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "demo")


def encode(seed: int) -> list[int]:
    """Return a prompt's ids; calibrate on prompts that end as those will that are asked."""
    prompt = draw_prompt(tokens=250, facts=6, seed=seed)
    return tokenizer(prompt.text + prompt.question)["input_ids"]


# 1. What is measured: every layer's skew, and how unevenly its attention is spread. With losses=8 also what limiting
# each layer costs, for the rule `loss`; 20 prompts and more give better curves.
profile = farkv.profile(model, [encode(seed) for seed in (1, 2, 3)])

# 2. A budget of a fifth of the records, shared so that most attention mass is held; `farkv plan` does the same.
fetch = make_plan(profile, PlanBudget(ratio=0.2), ("fetch",), Sharing(rule="xkv"))
keep = make_plan(profile, PlanBudget(ratio=0.5), ("keep",), base=fetch)
with tempfile.TemporaryDirectory() as folder:
    keep.save(Path(folder) / "plan.json")
    plan = farkv.Plan.load(Path(folder) / "plan.json")
print("layer  fetches per step  keeps")
for layer, fetched, kept in zip(plan.layers, plan.get("fetch").shares, plan.get("keep").shares, strict=True):
    print(f"{layer:5} {fetched:17.1%} {kept:6.1%}")
# The allocator alone: gains per layer, the best record first, in; records per layer out.
print("allocate:", farkv.allocate([[9, 1, 1, 1], [5, 4, 3, 2]], tokens=4))

# 3. The same plan drives a selector, which loses nothing, or XKV, which evicts after the prompt.
prompt = draw_prompt(tokens=500, facts=6, seed=9)
inputs = tokenizer(prompt.text + prompt.question, return_tensors="pt")
for method in (farkv.InfiniGen(), XKV()):
    with farkv.attach(model, method, profile=profile, plan=plan) as far:
        out = model.generate(**inputs, past_key_values=far.new_cache(), max_new_tokens=4, do_sample=False)
        receipt = far.receipt()
    print(
        f"{receipt.method}: {tokenizer.decode(out[0, -4:])}, expected {prompt.answer}; "
        f"read {receipt.read_fraction:.1%}, kept {receipt.kept_fraction:.1%}"
    )
