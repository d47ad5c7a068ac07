"""Ask about a text while every step reads a tenth of its KV cache: an unmodified model, three lines of farkv.

python examples/quickstart.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import farkv
from farkv.demo import MODEL_PATH
from farkv.demo.text import draw_prompt

# The model inside the package; any folder or hub id will do.
name = sys.argv[1] if len(sys.argv) > 1 else MODEL_PATH
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
prompt = draw_prompt(tokens=1500)
inputs = tokenizer(prompt.text + prompt.question, return_tensors="pt")

with farkv.attach(model, farkv.InfiniGen(fraction=0.1)) as far:
    out = model.generate(**inputs, past_key_values=far.new_cache(), max_new_tokens=4, do_sample=False)
    receipt = far.receipt()

# After the `with` block the model is what it was: this reads everything.
plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)

answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
print(f"{prompt.question}{answer}, expected {prompt.answer}; the full cache's tokens: {torch.equal(out, plain)}")
print(receipt)
