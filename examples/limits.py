"""Byte limits: near memory, host pool, disk. They are hard, and what cannot fit is refused before it is read.

python examples/limits.py
"""

import tempfile

import farkv
from farkv.config import format_bytes
from farkv.demo.text import draw_prompt
from farkv.hf.load import load_model

model, tokenizer = load_model("demo")
prompt = draw_prompt(tokens=1500)
inputs = tokenizer(prompt.text + prompt.question, return_tensors="pt")
n_tokens = inputs["input_ids"].shape[1] + 4

with tempfile.TemporaryDirectory() as folder:
    ways = {
        "no limit": {},
        "near": {"near": "2MiB"},  # on a CPU a counted allocation of its own: what a GPU would do
        "host, int8": {"host": "3MiB", "quant": "int8"},
        "host and disk": {"host": "3MiB", "disk": f"{folder}:16MiB"},  # full pages on disk, copies in host memory
        "host, evicting": {"host": "4MiB", "evict": "clock"},  # the only one that loses records
        "too small": {"host": "1MiB"},
    }
    for name, options in ways.items():
        with farkv.attach(model, farkv.InfiniGen(fraction=0.1), **options) as far:
            try:
                cache = far.new_cache(tokens=n_tokens)  # the length is announced: the whole context is admitted now
            except farkv.FarKVError as error:
                print(f"{name:15} refused: {error}")
                continue
            out = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=4, do_sample=False, prefill_chunk_size=256
            )
            receipt = far.receipt()
        size = receipt.kv_bytes
        print(
            f"{name:15} {tokenizer.decode(out[0, -4:])}  near {format_bytes(size.near_peak)}, "
            f"host {format_bytes(size.host_peak)}, disk {format_bytes(size.disk_peak)}; per token "
            f"{format_bytes(receipt.fetched_bytes_per_token)} fetched, {format_bytes(receipt.disk_bytes_per_token)} "
            f"from disk; {receipt.evicted_records:,} records evicted"
        )
print(f"expected: {prompt.answer}; the full cache: {format_bytes(size.total)}")
