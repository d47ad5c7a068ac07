"""What does a full pool cost? Eviction policies at host limits from 50 to 100 % of the KV: agreement, KL, what is kept.

    python benchmarks/eviction.py
    python benchmarks/eviction.py --lengths 2048 --texts 2 --codes 1

In: the demo model, held-out standard-library files. Out: a JSON line per text, policy and limit, a table at the end.
Every run is real: the text is read in passes of 256 tokens under the limit, so that records go while the prompt is
read, and what is gone is missing in the later passes too. Two tasks:
  recall  several questions about one text, each asked of its own copy of the cache: is the answer the full cache's?
  code    known code is decoded token by token: KL of the predictions to the full cache's, in nats
The limit is bytes, not records: the pool's bookkeeping counts in it, so that a limit of 100 % keeps about 93 % of
the demo's records. The context is announced: otherwise the growth of one layer would have to fit too. `peak` is
asserted against the limit in every run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from demo_texts import Demo, answer_greedily, compare_logs, force_tokens, read
from rows import RESULTS, Row, Rows, format_rows, group, mean, percent, read_rows
from runs import Recorder, make_parser, read_names, read_numbers

from farkv import Full, InfiniGen, attach
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.methods import Method
from farkv.store.far.eviction import POLICIES

LIMITS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CHUNK_TOKENS = 256
CODE_STEPS = 64
METHODS: dict[str, Method] = {"infinigen 0.10": InfiniGen(fraction=0.10), "full": Full()}


class Setting(NamedTuple):
    """A selector under a policy and a limit; no policy and no limit: everything is kept."""

    method: str
    policy: str | None = None
    limit: float | None = None


class Reading(NamedTuple):
    """A text read under a setting."""

    setting: Setting
    far: Handle
    cache: FarCache
    host: int | None

    def measured(self, cache: FarCache | None = None) -> Row:
        """Return what a receipt says, and hold the pool to its limit."""
        receipt = self.far.receipt(self.cache if cache is None else cache)
        peak = receipt.kv_bytes.host_peak
        assert self.host is None or peak <= self.host, f"{self.setting}: the pool took {peak:,} of {self.host:,} bytes"
        row = dict(kept=receipt.kept_fraction, evicted=receipt.evicted_records, read=receipt.read_fraction)
        return self.setting._asdict() | dict(host_limit=self.host, host_peak=peak) | row


def read_each(demo: Demo, text: list[int], settings: list[Setting]) -> Iterator[Reading]:
    """Read a text under every setting; give the cache while its handle is attached."""
    for setting in settings:
        host = None if setting.limit is None else int(setting.limit * demo.token_bytes * len(text))
        with attach(demo.model, METHODS[setting.method], host=host, evict=setting.policy or "refuse") as far:
            # Announced, so that the pool is allocated at once and no layer needs room to grow.
            options = dict(tokens=len(text) + CODE_STEPS, chunk_tokens=CHUNK_TOKENS)
            yield Reading(setting, far, read(far, text, CHUNK_TOKENS, **options), host)


def run_recall(demo: Demo, length: int, seed: int, settings: list[Setting]) -> Iterator[Row]:
    """Ask several questions of one text, in every setting."""
    asked = demo.make_questions(length, seed)
    full = demo.ask_full(asked, CHUNK_TOKENS)
    for reading in read_each(demo, asked.text, settings):
        for i, question in enumerate(asked.questions):
            twin = copy.deepcopy(reading.cache)
            got = answer_greedily(reading.far, twin, question)
            yield dict(task="recall", length=length, tokens=len(asked.text), seed=seed, question=i, text_sha=asked.sha,
                       agrees=got == full[i], right=got == asked.answers[i], full_right=full[i] == asked.answers[i],
                       **reading.measured(twin))  # fmt: skip


def run_code(demo: Demo, length: int, seed: int, settings: list[Setting]) -> Iterator[Row]:
    """Decode known code after one text, in every setting."""
    text, following = demo.make_code(length, CODE_STEPS, seed)
    full = demo.force_full(text, following, CHUNK_TOKENS)
    for reading in read_each(demo, text, settings):
        kl, top1 = compare_logs(full, force_tokens(reading.far, reading.cache, following))
        yield dict(task="code", length=length, seed=seed, kl=kl, top1=top1, **reading.measured())


def format_table(path: Path = RESULTS / "eviction.jsonl") -> str:
    """Return one table per method: a row per policy, agreement and KL at every limit; the first keeps everything."""
    every = read_rows(path)
    blocks = [format_method(method, rows) for method, rows in group(every, "method").items()]
    recall = {(r["seed"], r["question"]): r["full_right"] for r in every if r["task"] == "recall"}
    codes = {r["seed"] for r in every if r["task"] == "code"}
    texts = len({seed for seed, _ in recall})
    blocks.append(
        f"{len(recall)} questions about {texts} texts, {len(codes)} texts of code with {CODE_STEPS} steps each. "
        f"The full cache is right on {percent(recall.values())}."
    )
    return "\n\n".join(blocks)


def format_method(method: str, rows: Rows) -> str:
    """Return one method's table."""
    limits = sorted({r["limit"] for r in rows if r["limit"]})
    at = {limit: [r for r in rows if r["limit"] == limit] for limit in (*limits, None)}
    lines = [["records kept", *(f"{mean(r['kept'] for r in at[limit]):.0%}" for limit in limits), "100%"]]
    gone = (mean(r["evicted"] for r in at[limit] if r["length"] == 2048) for limit in limits)
    lines.append(["records evicted of a 2 K text", *(f"{n:,.0f}" for n in gone), "0"])
    for name, task, column in (("agrees", "recall", "agrees"), ("KL on code", "code", "kl")):
        for policy in POLICIES:
            found = (
                [r[column] for r in at[limit] if r["task"] == task and (limit is None or r["policy"] == policy)]
                for limit in at
            )
            cells = [percent(values) if task == "recall" else f"{mean(values):.3f}" for values in found]
            lines.append([f"{policy}: {name}", *cells])
    return format_rows([f"{method}: host limit, of the KV", *(f"{limit:.0%}" for limit in limits), "no limit"], lines)


def main() -> None:
    parser = make_parser(__doc__, "eviction.jsonl")
    parser.add_argument("--lengths", default="2048,4096", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--texts", default="2,0", type=read_numbers, help="recall texts, one number a length")
    parser.add_argument("--codes", default="2,0", type=read_numbers, help="code texts, one number a length")
    parser.add_argument("--tasks", default="recall,code", type=read_names)
    parser.add_argument("--first", default=0, type=int, help="the first text's number, where the file has others")
    parser.add_argument("--methods", default="infinigen 0.10", type=read_names)
    run, demo = Recorder(parser), Demo()
    args = run.args
    settings = [Setting(m) for m in args.methods]
    settings += [Setting(m, policy, limit) for m in args.methods for limit in LIMITS for policy in POLICIES]
    for length, *counts in zip(args.lengths, args.texts, args.codes, strict=True):
        for task, ask, seed, n in zip(("recall", "code"), (run_recall, run_code), (11, 12), counts, strict=True):
            for i in range(args.first, n if task in args.tasks else 0):
                for row in ask(demo, length, seed * 1_000_000 + 1000 * length + i, settings):
                    run.write(row)
                run.say(f"{task} {length}, text {i}")
    print(format_table(args.out))


if __name__ == "__main__":
    main()
