"""Does the peak memory of a process fall by what a plan says? XKV's `keep` against the full cache, measured as RSS.

    python benchmarks/xkv_memory.py --local 512 --only "full,keep 0.3,keep 0.1"
    python benchmarks/xkv_memory.py --append --only "full,keep 0.3,DynamicCache" --tokens 4096
    python benchmarks/xkv_memory.py --append --only "full,keep 0.3" --local 2048 --hidden 512 --intermediate 512

In: a random model whose KV cache has the shape of Llama-3.2-1B (16 layers, 8 KV heads, head dimension 64), one prompt
of random tokens, read in one pass. Out: a JSON line per configuration, each run in an interpreter of its own: the peak
of the resident set (VmHWM of the child: `ru_maxrss` inherits the parent's across fork), the resident set after
decoding, the receipt; and for each plan the fall from the full cache's run beside what the plan predicts: the bytes of
a full cache less those of the records that the plan keeps (the 6 bytes of books per kept record are not in it).

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
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import farkv
from farkv.calibrate.plan import Allocation, Plan
from farkv.hf.identity import identify_model

KV_HEADS = 8
HEAD_DIM = 64
VOCABULARY = 1024
NEW_TOKENS = 8
SEED = 5
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Name, mean share of the plan.
CONFIGURATIONS = {"full": None, "keep 0.3": 0.3, "keep 0.1": 0.1, "DynamicCache": None}
ALLOWED_ERROR = 0.05


def make_shares(n_layers: int, mean: float) -> list[float]:
    """Return uneven shares: the first layer keeps 1.5 times the mean, the last half of it."""
    return [mean * (1.5 - i / max(1, n_layers - 1)) if n_layers > 1 else mean for i in range(n_layers)]


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Make a random model; the KV's shape is Llama-3.2-1B's unless --layers says otherwise."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=args.intermediate,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * args.tokens,
    )
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval()


def make_plan(model: Any, n_layers: int, mean: float) -> Plan:
    """Make a plan by hand."""
    shares = tuple(make_shares(n_layers, mean))
    zeros = (0.0,) * n_layers
    keep = Allocation(shares, 0, "uniform", {"ratio": mean}, zeros, zeros)
    return Plan(identify_model(model), tuple(range(n_layers)), {"keep": keep})


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


def read_memory() -> tuple[int, int]:
    """Return the resident set now and at its highest, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


@torch.no_grad()
def run_child(args: argparse.Namespace) -> dict[str, Any]:
    """Read a prompt in one pass, decode a few tokens, measure."""
    torch.set_num_threads(args.threads)
    if args.local:
        narrow_attention(args.local)
    model = make_model(args)
    mean = CONFIGURATIONS[args.child]
    tokens = torch.randint(VOCABULARY, (1, args.tokens))
    if args.child == "DynamicCache":
        far, decoder, cache = None, model.model, DynamicCache(config=model.config)
    else:
        plan = None if mean is None else make_plan(model, args.layers, mean)
        far = farkv.attach(model, farkv.Full() if plan is None else farkv.XKV(), plan=plan)
        decoder, cache = far.decoder, far.new_cache(tokens=args.tokens + NEW_TOKENS)
    started_at = read_memory()[0]
    peaks: list[int] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: peaks.append(read_memory()[1]))
    started = time.perf_counter()
    decoder(input_ids=tokens, past_key_values=cache, use_cache=True)
    prefill_s, after_prefill = time.perf_counter() - started, read_memory()
    for i in range(NEW_TOKENS):
        model(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
    rss, peak = read_memory()
    row: dict[str, Any] = {"peak_rss": peak, "rss_after": rss, "rss_before": started_at, "prefill_s": prefill_s}
    row |= {"peak_rss_of_prefill": after_prefill[1], "peak_rss_by_layer": peaks[: args.layers]}
    if far is not None:
        receipt = far.receipt(cache)
        row |= {"kv_bytes": receipt.kv_bytes.total, "ledger_peak": receipt.kv_bytes.host_peak}
        row |= {"kept_fraction": receipt.kept_fraction}
    return row


def start_child(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Run one configuration in an interpreter of its own."""
    options = ("tokens", "layers", "hidden", "heads", "intermediate", "threads", "dtype", "local")
    command = [sys.executable, __file__, "--child", name]
    for option in options:
        command += [f"--{option}", str(getattr(args, option))]
    environment = os.environ | MALLOC | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    setting = {option: getattr(args, option) for option in options}
    return {"name": name, **setting, **json.loads(done.stdout.splitlines()[-1])}


def compare(row: dict[str, Any], full: dict[str, Any], mean: float) -> dict[str, Any]:
    """Add what the plan predicts, and how far memory fell."""
    record_bytes = KV_HEADS * 2 * HEAD_DIM * getattr(torch, row["dtype"]).itemsize
    tokens = row["tokens"]
    kept = sum(int(share * tokens + 1e-9) for share in make_shares(row["layers"], mean)) * record_bytes
    predicted = row["layers"] * tokens * record_bytes - kept
    found: dict[str, Any] = {"predicted_fall": predicted, "planned_bytes": kept}
    for name in ("peak_rss", "rss_after", "ledger_peak"):
        found[f"{name}_fall"] = full[name] - row[name]
        found[f"{name}_ratio"] = (full[name] - row[name]) / predicted
    found["holds"] = all(abs(found[f"{name}_ratio"] - 1) <= ALLOWED_ERROR for name in ("peak_rss", "rss_after"))
    return found


def main() -> None:
    """Parse the command line; run every configuration, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/xkv_memory.jsonl")
    parser.add_argument("--append", action="store_true", help="add to the results file")
    parser.add_argument("--tokens", default=32768, type=int)
    parser.add_argument("--layers", default=16, type=int)
    parser.add_argument("--hidden", default=256, type=int)
    parser.add_argument("--heads", default=8, type=int, help="query heads; there are 8 KV heads")
    parser.add_argument("--intermediate", default=2048, type=int)
    parser.add_argument("--local", default=0, type=int, help="block of the prompt's attention; 0: all of it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="configurations, by commas; full is first")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(args)))
        return
    out, full = Path(args.out), None
    if not args.append:
        out.write_text("")
    for name in args.only.split(","):
        row = start_child(args, name)
        row["versions"] = {"torch": torch.__version__, "python": platform.python_version(), "malloc": MALLOC}
        full = row if full is None else full
        mean = CONFIGURATIONS[name]
        row |= {} if mean is None else compare(row, full, mean)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        sys.stderr.write(f"{name}: peak {row['peak_rss'] / 2**20:.0f} MiB, {row['prefill_s']:.0f} s\n")
    print(format_table(out))


def format_table(path: Path) -> str:
    """Return one Markdown row per run, in MiB; of the plans also the measured fall over the predicted one."""
    lines = [
        "| run | prompt's attention | MLP | peak RSS, MiB | RSS after decoding | predicted fall | "
        "peak: fall / predicted | after decoding: fall / predicted |",
        "|---" * 8 + "|",
    ]
    for row in map(json.loads, path.read_text().splitlines()):
        attention = f"blocks of {row['local']}" if row["local"] else "whole"
        cells = [f"{row['name']}, {row['tokens'] // 1024} K tokens", attention, str(row["intermediate"])]
        cells += [f"{row[key] / 2**20:,.0f}" for key in ("peak_rss", "rss_after")]
        if "predicted_fall" in row:
            cells += [f"{row['predicted_fall'] / 2**20:,.0f}"]
            cells += [f"{row[f'{key}_ratio']:.3f}" for key in ("peak_rss", "rss_after")]
        else:
            cells += [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
