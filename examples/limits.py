"""Byte limits: near memory, host pool, disk. They are hard, and what cannot fit is refused before it is read.

python examples/limits.py [MODEL]
"""

import sys
import tempfile

import farkv
from farkv.config import format_bytes
from farkv.demo.text import draw_prompt
from farkv.hf.load import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "demo")
prompt = draw_prompt(tokens=1500)
inputs = tokenizer(prompt.text + prompt.question, return_tensors="pt")
n_tokens = inputs["input_ids"].shape[1] + 4


def answer(name, **options):
    """Ask under these limits; print what was held and moved; return the bytes of the full cache, 0 if refused."""
    with farkv.attach(model, farkv.InfiniGen(fraction=0.1), **options) as far:
        try:
            cache = far.new_cache(tokens=n_tokens)  # the length is announced: the whole context is admitted now
        except farkv.FarKVError as error:
            print(f"{name:15} refused: {error}")
            return 0
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False, prefill_chunk_size=256)
        receipt = far.receipt()
    size = receipt.kv_bytes
    print(
        f"{name:15} {tokenizer.decode(out[0, -4:])}  near {format_bytes(size.near_peak)}, "
        f"host {format_bytes(size.host_peak)}, disk {format_bytes(size.disk_peak)}; per token "
        f"{format_bytes(receipt.fetched_bytes_per_token)} fetched, {format_bytes(receipt.disk_bytes_per_token)} "
        f"from disk; {receipt.evicted_records:,} records evicted"
    )
    return size.total


whole = answer("no limit")
answer("near", near=whole // 3)  # on a CPU a counted allocation of its own: what a GPU would do
answer("host, int8", host=whole * 7 // 10, quant="int8")
with tempfile.TemporaryDirectory() as folder:  # full pages on disk, copies in host memory
    answer("host and disk", host=whole * 2 // 3, disk=f"{folder}:{3 * whole}")
answer("host, evicting", host=whole * 9 // 10, evict="clock")  # the only one that loses records
answer("too small", host=whole // 6)
print(f"expected: {prompt.answer}; the full cache: {format_bytes(whole)}")
