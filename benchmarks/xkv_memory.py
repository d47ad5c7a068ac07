"""Does the peak memory of a process fall by what a plan says? XKV's `keep` against the full cache, measured as RSS.

    python benchmarks/xkv_memory.py --local 512 --only "full,keep 0.3,keep 0.1"
    python benchmarks/xkv_memory.py --add --only "full,keep 0.3,DynamicCache" --tokens 4096
    python benchmarks/xkv_memory.py --add --only "full,keep 0.3" --local 2048 --hidden 512 --intermediate 512

In: a random model whose KV cache has the shape of Llama-3.2-1B (16 layers, 8 KV heads, head dimension 64), one prompt
of random tokens, read in one pass. Out: a JSON line per configuration, each run in an interpreter of its own: the peak
of the resident set (VmHWM of the child: `ru_maxrss` inherits the parent's across fork), the resident set after
decoding, the receipt; and for each plan the fall from the full cache's run beside what the plan predicts: the bytes of
a full cache less those of the records that the plan keeps (the 6 bytes of metadata per kept record are not in it).

What is not KV is smaller than Llama's, so that 32 K tokens fit minutes of a CPU: hidden size 256 and 8 query heads
(Llama: 2048 and 32), a vocabulary of 1024. The MLP is 2048 wide, Llama's four times the width of all queries. Numbers
are float32, whose KV is twice bfloat16's, because CPUs without bfloat16 instructions multiply it far too slowly. With
`--local n` the prompt's attention is causal within blocks of n tokens: every tensor that is stored or passed on keeps
its shape, and decode steps are unchanged, but whole attention over 32 K tokens takes minutes a layer on a busy CPU.
Every row says which; the rows at 4 K tokens are of whole attention. The children's malloc is told to return what is
freed (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ of 64 KiB): glibc would otherwise hold some of it back.

Where the peak lies matters: it is a moment, and what is stored by then is what a plan can save. In a model of Llama's
proportions it is the MLP of the last layer, when all layers are stored. With a narrow MLP (the last rows: 512) the
shortfall is about what the last layer would have saved: the peak then lies before that layer is stored (inferred from
the bytes, not observed).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from children import read_memory, return_freed, run_script
from random_models import make_keep_plan, make_llama, make_shares
from rows import RESULTS, Row, format_rows, mib, read_rows
from runs import Recorder, find_versions, make_parser, read_names, time_call
from torch.nn import functional
from transformers import DynamicCache

import farkv

# The KV's shape is Llama-3.2-1B's unless --layers says otherwise.
KV_HEADS, HEAD_DIM, VOCABULARY = 8, 64, 1024
NEW_TOKENS = 8
MALLOC = return_freed(1 << 16)
# Name, mean share of the plan.
CONFIGURATIONS = {"full": None, "keep 0.3": 0.3, "keep 0.1": 0.1, "DynamicCache": None}
# What a child is told, and every row says.
SETTING = {"tokens": 32768, "layers": 16, "hidden": 256, "heads": 8, "intermediate": 2048, "threads": 2,
           "dtype": "float32", "local": 0}  # fmt: skip
ALLOWED_ERROR = 0.05


def narrow_attention(block: int) -> None:
    """Let a prompt's attention be causal within blocks of `block` tokens."""
    attend = functional.scaled_dot_product_attention

    def attend_in_blocks(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        n = q.shape[2]
        if n == 1 or n != k.shape[2]:
            return attend(q, k, v, **kwargs)
        # Laid out as the kernel's own output.
        out = q.new_empty(q.shape[0], n, q.shape[1], v.shape[3]).transpose(1, 2)
        for start in range(0, n, block):
            part = slice(start, start + block)
            out[:, :, part] = attend(q[:, :, part], k[:, :, part], v[:, :, part], **kwargs)
        return out

    functional.scaled_dot_product_attention = attend_in_blocks


@torch.no_grad()
def run_child(args: argparse.Namespace) -> Row:
    """Read a prompt in one pass, decode a few tokens, measure."""
    torch.set_num_threads(args.threads)
    if args.local:
        narrow_attention(args.local)
    model = make_llama(
        2 * args.tokens, getattr(torch, args.dtype), layers=args.layers, heads=args.heads, kv_heads=KV_HEADS,
        head_dim=HEAD_DIM, hidden=args.hidden, mlp=args.intermediate, vocabulary=VOCABULARY,
    )  # fmt: skip
    mean, tokens, far = CONFIGURATIONS[args.child], torch.randint(VOCABULARY, (1, args.tokens)), None
    if args.child == "DynamicCache":
        decoder, cache = model.model, DynamicCache(config=model.config)
    else:
        plan = None if mean is None else make_keep_plan(model, mean)
        far = farkv.attach(model, farkv.Full() if plan is None else farkv.XKV(), plan=plan)
        decoder, cache = far.decoder, far.new_cache(tokens=args.tokens + NEW_TOKENS)
    row: Row = {"rss_before": read_memory()["VmRSS"]}
    peaks: list[int] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: peaks.append(read_memory()["VmHWM"]))
    row["prefill_s"], _ = time_call(lambda: decoder(input_ids=tokens, past_key_values=cache, use_cache=True))
    row |= {"peak_rss_of_prefill": read_memory()["VmHWM"], "peak_rss_by_layer": peaks[: args.layers]}
    for i in range(NEW_TOKENS):
        model(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
    memory = read_memory()
    row |= {"peak_rss": memory["VmHWM"], "rss_after": memory["VmRSS"]}
    if far is not None:
        receipt = far.receipt(cache)
        row |= {"kv_bytes": receipt.kv_bytes.total, "ledger_peak": receipt.kv_bytes.host_peak}
        row |= {"kept_fraction": receipt.kept_fraction}
    return row


def compare(row: Row, full: Row, mean: float) -> Row:
    """Add what the plan predicts, and how far memory fell."""
    record_bytes = KV_HEADS * 2 * HEAD_DIM * getattr(torch, row["dtype"]).itemsize
    tokens = row["tokens"]
    kept = sum(int(share * tokens + 1e-9) for share in make_shares(row["layers"], mean)) * record_bytes
    predicted = row["layers"] * tokens * record_bytes - kept
    found: Row = {"predicted_fall": predicted, "planned_bytes": kept}
    for name in ("peak_rss", "rss_after", "ledger_peak"):
        found[f"{name}_fall"] = full[name] - row[name]
        found[f"{name}_ratio"] = (full[name] - row[name]) / predicted
    found["holds"] = all(abs(found[f"{name}_ratio"] - 1) <= ALLOWED_ERROR for name in ("peak_rss", "rss_after"))
    return found


def format_table(path: Path = RESULTS / "xkv_memory.jsonl") -> str:
    """Return one Markdown row per run, in MiB; of the plans also the measured fall over the predicted one."""
    head = ["run", "prompt's attention", "MLP", "peak RSS, MiB", "RSS after decoding", "predicted fall"]
    lines = []
    for r in read_rows(path):
        attention = f"blocks of {r['local']}" if r["local"] else "whole"
        cells = [f"{r['name']}, {r['tokens'] // 1024} K tokens", attention, r["intermediate"]]
        cells += [mib(r[key]) for key in ("peak_rss", "rss_after")]
        planned = "predicted_fall" in r
        cells.append(mib(r["predicted_fall"]) if planned else "")
        lines.append(cells + [f"{r[f'{key}_ratio']:.3f}" if planned else "" for key in ("peak_rss", "rss_after")])
    return format_rows([*head, "peak: fall / predicted", "after decoding: fall / predicted"], lines)


def main() -> None:
    parser = make_parser(__doc__, "xkv_memory.jsonl", threads=SETTING["threads"])
    for name, default in SETTING.items():
        if name != "threads":
            parser.add_argument(f"--{name}", default=default, type=type(default))
    parser.add_argument(
        "--only", default=",".join(CONFIGURATIONS), type=read_names, help="configurations, by commas; full is first"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(args)))
        return
    run, full = Recorder(parser), None
    setting = {name: getattr(args, name) for name in SETTING}
    options = [word for name, value in setting.items() for word in (f"--{name}", value)]
    for name in args.only:
        # An interpreter of its own.
        row = {"name": name} | setting
        row |= run_script(__file__, "--child", name, *options, env=MALLOC | {"OMP_NUM_THREADS": str(args.threads)})
        row["versions"] = find_versions() | {"malloc": MALLOC}
        full, mean = full or row, CONFIGURATIONS[name]
        run.write(row if mean is None else row | compare(row, full, mean))
        run.say(f"{name}: peak {mib(row['peak_rss'])} MiB")
    print(format_table(args.out))


if __name__ == "__main__":
    main()
