"""Does an answer change when records go through a disk? The same method on the demo model, with a disk and without.

    python benchmarks/disk.py

The host limit is a quarter of the KV. What a disk costs in time is far.py's question.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from demo_texts import ANSWER_TOKENS, Demo, Questions, ask_all, read, same, step
from rows import RESULTS, Row, format_rows, group, mean, mib, percent, read_rows
from runs import Recorder, make_parser

from farkv import InfiniGen, attach
from farkv.errors import CapacityError

# Of the KV: what host memory may take.
HOST_SHARE = 0.25
QUALITY_LENGTHS = (2048, 4096, 8192)
CHUNK_TOKENS = 256


def run_quality(args: argparse.Namespace) -> Iterator[Row]:
    """Ask the demo model about the same texts, with all records in memory and with most of them on disk."""
    demo = Demo()
    for length in QUALITY_LENGTHS:
        for seed in range(args.prompts):
            asked = demo.make_questions(length, 13_000_000 + 1000 * length + seed)
            limit = int(HOST_SHARE * demo.token_bytes * len(asked.text))
            row = dict(length=length, seed=seed, host_limit=limit)
            try:
                with tempfile.TemporaryDirectory(prefix="farkv-disk-", dir=args.folder or None) as folder:
                    yield row | ask_over_disk(demo, asked, limit, folder)
            except CapacityError as error:
                yield row | dict(refused=True, why=str(error))
                break


def ask_over_disk(demo: Demo, asked: Questions, limit: int, folder: str) -> Row:
    """Ask all questions of a text with a disk and without."""
    n = len(asked.text) + max(map(len, asked.questions)) + ANSWER_TOKENS
    with attach(demo.model, InfiniGen(fraction=0.10), host=limit, disk=f"{folder}:1GiB") as far:
        cache = read(far, asked.text, CHUNK_TOKENS, tokens=n, chunk_tokens=CHUNK_TOKENS)
        got = ask_all(far, cache, asked.questions)
        step(far, cache, asked.questions[0])
        receipt = far.receipt(cache)
    assert receipt.kv_bytes.host_peak <= limit
    with attach(demo.model, InfiniGen(fraction=0.10)) as far:
        plain = ask_all(far, read(far, asked.text, CHUNK_TOKENS), asked.questions)
    return dict(refused=False, agrees=same(got, plain), right=same(got, asked.answers),
                plain_right=same(plain, asked.answers), host_peak=receipt.kv_bytes.host_peak,
                disk_bytes=receipt.disk_bytes_per_token, kv_bytes=receipt.kv_bytes.total)  # fmt: skip


def format_quality(path: Path = RESULTS / "disk.jsonl") -> str:
    """Return one Markdown row per length: answers with the disk against answers without."""
    head = ["context", "questions", "same answer with the disk", "where that is right", "right with / without"]
    lines = []
    for length, mine in sorted(group(read_rows(path), "length").items()):
        cells = [f"{length // 1024} K tokens, host limit {mib(mine[0]['host_limit'], 1)} MiB"]
        if any(r["refused"] for r in mine):
            lines.append([*cells, "refused before the prompt was read"])
            continue
        agrees, right, plain = ([x for r in mine for x in r[key]] for key in ("agrees", "right", "plain_right"))
        good = percent(a for a, b in zip(agrees, plain, strict=True) if b)
        cells += [str(len(agrees)), percent(agrees), good, f"{percent(right)} / {percent(plain)}"]
        lines.append([*cells, f"{mean(r['disk_bytes'] / r['kv_bytes'] for r in mine):.3f}"])
    return format_rows([*head, "from disk per token, of the KV"], lines)


def main() -> None:
    parser = make_parser(__doc__, "disk.jsonl")
    parser.add_argument("--prompts", default=2, type=int, help="texts of every length")
    parser.add_argument("--folder", default="", help="where the files go; default: the system's temporary folder")
    run = Recorder(parser)
    for row in run_quality(run.args):
        run.write(row)
    print(format_quality(run.args.out))


if __name__ == "__main__":
    main()
