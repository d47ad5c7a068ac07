"""Sessions: read a text once, write it to a file, ask it often; later processes read only what a question needs.

python examples/session.py [MODEL]
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch

import farkv
from farkv.demo.text import draw_prompt
from farkv.hf.load import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "demo")
prompt = draw_prompt(tokens=1500)
text = tokenizer(prompt.text, return_tensors="pt")["input_ids"]
facts = [line.split(" = ") for line in prompt.text.splitlines() if line.count(" = ") == 1 and line[-4:].isdigit()]

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "code.farkv"
    with torch.no_grad(), farkv.attach(model) as far:
        cache = far.new_cache(tokens=text.shape[1])
        model(input_ids=text, past_key_values=cache)
        cache.save(path, tokenizer=tokenizer, text=prompt.text)
        print(f"{path.name}: {path.stat().st_size:,} bytes for {len(cache.token_ids)} tokens")

    # Another process would begin here. Records come from the file when a step chooses them.
    with farkv.attach(model, host=path.stat().st_size * 3 // 4) as far:
        book = farkv.load_cache(path, model, tokenizer=tokenizer, tokens=text.shape[1] + 40)
        for name, value in facts[:3]:
            question = tokenizer(f"print({name})  # ", return_tensors="pt", add_special_tokens=False)["input_ids"]
            ids = torch.cat([text, question], 1)
            cache = copy.deepcopy(book)  # a copy shares the file; each question begins with the text alone
            out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
            receipt = far.receipt(cache)
            print(f"{name} = {tokenizer.decode(out[0, -4:])}, expected {value}; ", end="")
            print(f"{receipt.disk_bytes_per_token:,.0f} bytes per token from disk")
