"""Exact generation on a real model: are the tokens full attention's own, and what do drafts save?

    python benchmarks/exact.py --model FOLDER --lengths 2048,8192 --texts 4 --tokens 128 --out FILE

In: texts that every installation has, of three kinds, and questions that copy from them. Out: a JSON line per text:
tokens equal to plain `generate`, the first difference and full attention's margin there (how far its first choice is
above the token that we took, in nats), the same for plain `generate` in a batch of two, whose sums have another order;
what was accepted; KV bytes read per token over those of plain decoding; seconds of both, taken in turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mixed_texts import KINDS, Bench
from runs import Recorder, find_versions, make_parser, read_names, read_numbers, time_call

import farkv
from farkv.methods import METHODS

# Given to the model behind a text, so that an answer copies from it.
COPY = "\n\nThe first lines of the text above, once more:\n\n"


def compare(plain: torch.Tensor, ours: torch.Tensor, start: int, model: Any) -> dict[str, Any]:
    """Return where two texts differ first, and by how much full attention prefers its own token there."""
    n = min(plain.shape[1], ours.shape[1])
    different = (plain[0, :n] != ours[0, :n]).nonzero()
    if not different.numel():
        return {"differs_at": None, "margin": None}
    at = int(different[0])
    # One pass over the text, and not a step: a third way of rounding, which knows neither's result.
    logits = model(input_ids=plain[:, :at]).logits[0, -1].float().log_softmax(-1)
    return {"differs_at": at - start, "margin": abs(float(logits[plain[0, at]] - logits[ours[0, at]]))}


@torch.no_grad()
def play(bench: Bench, kind: str, length: int, args: Any) -> dict[str, Any]:
    """Return one text's figures."""
    tokens = bench.take(kind, length - 16)
    question = bench.tokenizer(COPY, add_special_tokens=False)["input_ids"][:16]
    ids = torch.tensor([tokens + question])
    model, options = bench.model, {"max_new_tokens": args.tokens, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    plain_s, plain = time_call(lambda: model.generate(input_ids=ids, attention_mask=mask, **options))
    method = METHODS[args.method].config(fraction=args.fraction)
    limits = {name: getattr(args, name) for name in ("near", "host", "disk") if getattr(args, name)}
    with farkv.attach(model, method, **limits) as far:
        cache = far.new_cache(tokens=ids.shape[1] + args.tokens + 32)
        exact_s, ours = time_call(
            lambda: far.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, exact=True, draft_tokens=args.draft_tokens,
                **options,
            )
        )  # fmt: skip
        receipt = far.receipt(cache).to_dict()
    row = {
        "kind": kind, "length": ids.shape[1], "tokens": ours.shape[1] - ids.shape[1],
        "equal": bool((plain == ours).all()),
        **compare(plain, ours, ids.shape[1], model),
        "plain_s": plain_s, "exact_s": exact_s, "drafts": receipt["drafts"],
    }  # fmt: skip
    if args.batch:
        pair = model.generate(input_ids=ids.repeat(2, 1), attention_mask=mask.repeat(2, 1), **options)[:1]
        row["batch"] = compare(plain, pair, ids.shape[1], model)
    return row


def main() -> None:
    """Play all texts of all kinds and lengths."""
    parser = make_parser(__doc__, out="exact.jsonl")
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", default="infinigen")
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--lengths", type=read_numbers, default=[2048])
    parser.add_argument("--kinds", type=read_names, default=list(KINDS))
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int)
    parser.add_argument("--batch", action="store_true", help="plain generate in a batch of two besides")
    for name in ("near", "host", "disk"):
        parser.add_argument(f"--{name}")
    run = Recorder(parser)
    args = run.args
    bench = Bench(args.model)
    for length in args.lengths:
        for kind in args.kinds:
            for i in range(args.texts):
                run.write({"model": Path(args.model).name, **play(bench, kind, length, args), **find_versions()})
                run.say(f"{length} tokens, {kind} {i + 1} of {args.texts}")


if __name__ == "__main__":
    main()
