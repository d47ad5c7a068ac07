"""Methods beside each other: the same text, the same cap, each answer compared with full attention (`verify=`).

python examples/compare_methods.py [MODEL]        (on tasks, with intervals: farkv eval)
"""

import sys

import farkv
from farkv.demo.text import draw_prompt
from farkv.hf.load import load_model
from farkv.methods import METHODS

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "demo")
drawn = draw_prompt(tokens=800)

print(f"{'method':10} answer    read   index    kept  KL to full  mass found")
for name in ("full", "infinigen", "pages", "lowbit", "oracle", "window", "snapkv"):
    config = METHODS[name].config
    method = config() if name == "full" else config(fraction=0.1)
    # As `farkv run`: the text is read, then the question is fed token by token, as decode steps.
    answer = farkv.ask(model, tokenizer, drawn.text, drawn.question, method, max_new_tokens=4, verify=6)
    receipt = answer.receipt
    assert receipt.quality is not None
    print(
        f"{name:10} {answer!s:6} {receipt.read_fraction:7.1%} {receipt.index_fraction:7.1%} "
        f"{receipt.kept_fraction:7.1%} {receipt.quality.kl_mean:11.4f} {receipt.quality.mass_mean:11.1%}"
    )
print(f"expected: {drawn.answer}")
