"""Methods beside each other: the same text, the same cap, each answer compared with full attention (`verify=`).

python examples/compare_methods.py [MODEL]        (on tasks, with intervals: farkv eval)
"""

import sys

import farkv
from farkv.demo.text import draw_prompt
from farkv.hf.ask import Decoding, ask
from farkv.hf.load import load_model
from farkv.hf.prompt import build_prompt
from farkv.methods import METHODS

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "demo")
drawn = draw_prompt(tokens=800)
prompt = build_prompt(tokenizer, drawn.text, drawn.question)

print(f"{'method':10} answer    read   index    kept  KL to full  mass found")
for name in ("full", "infinigen", "pages", "lowbit", "oracle", "window", "snapkv"):
    config = METHODS[name].config
    method = config() if name == "full" else config(fraction=0.1)
    with farkv.attach(model, method) as far:
        cache = far.new_cache(tokens=prompt.n_tokens + 4, verify=6)
        # As `farkv run`: the text is read, then the question is fed token by token, as decode steps.
        answer = ask(far, tokenizer, prompt, cache=cache, decoding=Decoding(max_new_tokens=4))
        receipt = far.receipt(cache)
    quality = receipt.quality
    assert quality is not None
    print(
        f"{name:10} {answer:6} {receipt.read_fraction:7.1%} {receipt.index_fraction:7.1%} {receipt.kept_fraction:7.1%} "
        f"{quality.kl_mean:11.4f} {quality.mass_mean:11.1%}"
    )
print(f"expected: {drawn.answer}")
