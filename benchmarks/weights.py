"""What do packed weights gain, and cost? A real model as it is, in int8 and in int4: time per token, bytes, KL.

    python benchmarks/weights.py --model FOLDER --name SmolLM2-135M-Instruct --add

The three take turns over a text with transformers' own cache: a prompt in one pass, then known tokens one by one.
KL is to the model as it is, in nats: `read` over the last tokens of the prompt, `decoded` over the tokens that follow,
whose products are by other kernels.
"""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from mixed_texts import Bench, force_tokens, measure_kl
from rows import RESULTS, Row, format_rows, group, mean, mib, read_rows
from runs import Recorder, find_versions, make_parser, time_call
from transformers import DynamicCache

from farkv.config import WEIGHTS
from farkv.hf.load_gguf import count_bytes
from farkv.hf.weights import pack_weights

PROMPT, LAST, STEPS = 1024, 256, 32


@torch.no_grad()
def read_prompt(model: Any, cache: Any, tokens: list[int]) -> torch.Tensor:
    """Read a prompt in one pass; return the log-probabilities after its last tokens."""
    logits = model(input_ids=torch.tensor([tokens]), past_key_values=cache, logits_to_keep=LAST).logits[0]
    return logits.float().log_softmax(-1)


def run_text(models: dict[str, Any], name: str, tokens: list[int]) -> list[Row]:
    """Read a text and go on, by every model in turn."""
    rows, plain = [], dict[str, torch.Tensor]()
    caches = {kind: DynamicCache(config=model.config) for kind, model in models.items()}
    for kind, model in models.items():
        seconds, read = time_call(lambda m=model, k=kind: read_prompt(m, caches[k], tokens[:PROMPT]))
        plain.setdefault("read", read)
        same = float((read.argmax(-1) == plain["read"].argmax(-1)).float().mean())
        rows.append(dict(text=name, weights=kind, read_s=seconds, read_kl=measure_kl(plain["read"], read), same=same))
    steps: dict[str, list[tuple[float, torch.Tensor]]] = {kind: [] for kind in models}
    for token in tokens[PROMPT : PROMPT + STEPS]:
        for kind, model in models.items():
            steps[kind].append(time_call(lambda m=model, k=kind, t=token: force_tokens(m, caches[k], [t])))
    full = torch.cat([logs for _, logs in steps["none"]])
    for row in rows:
        mine = steps[row["weights"]]
        row["step_s"] = statistics.median(seconds for seconds, _ in mine)
        row["decoded_kl"] = measure_kl(full, torch.cat([logs for _, logs in mine]))
    return rows


def format_table(path: Path = RESULTS / "weights.jsonl") -> str:
    """Return one Markdown row per model and form of its weights."""
    lines, rows = [], read_rows(path)
    for model, of_model in group(rows, "model").items():
        kinds = group(of_model, "weights")
        plain = {name: statistics.median(r[name] for r in kinds["none"]) for name in ("step_s", "read_s")}
        for kind, mine in kinds.items():
            step, read = (statistics.median(r[name] for r in mine) for name in ("step_s", "read_s"))
            cells = [model, kind, mib(mine[0]["n_bytes"]), f"{step * 1000:.0f}", f"{plain['step_s'] / step:.2f} x"]
            cells += [f"{PROMPT / read:.0f}", f"{plain['read_s'] / read:.2f} x"]
            cells += ["", "", ""] if kind == "none" else [
                f"{mean(r[name] for r in mine):.4f}" for name in ("read_kl", "decoded_kl")
            ] + [f"{mean(r['same'] for r in mine):.1%}"]  # fmt: skip
            lines.append(cells)
    head = ["model", "weights", "MiB", "ms per token", "of none", "tokens read per s", "of none", "KL, read",
            "KL, decoded", "same first token"]  # fmt: skip
    texts = len({row["text"] for row in rows})
    note = (
        f"{texts} texts, {PROMPT:,} tokens read and {STEPS} decoded, float32 but for the weights, {rows[0]['threads']} "
        "threads, transformers' own cache; embeddings are not packed, and count."
    )
    return format_rows(head, lines, note)


def main() -> None:
    parser = make_parser(__doc__, "weights.jsonl", threads=2)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--name", required=True, help="the model's name in the table")
    parser.add_argument("--texts", default=3, type=int)
    run = Recorder(parser)
    bench = Bench(run.args.model)
    models = {kind: pack_weights(copy.deepcopy(bench.model), kind) for kind in WEIGHTS}
    for text in bench.make_texts(run.args.texts, PROMPT, STEPS):
        for row in run_text(models, text.name, text.tokens):
            size = dict(n_bytes=count_bytes(models[row["weights"]]), threads=run.args.threads)
            run.write(dict(model=run.args.name) | row | size | find_versions())
        run.say(text.name)
    print(format_table(run.args.out))


if __name__ == "__main__":
    main()
