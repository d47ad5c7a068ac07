"""Is the far path faster than reading everything? KV on disk, host memory an eighth of it or less, against dense ways.

    python benchmarks/far.py --quick --json          # one shape, 16 K tokens, 8 layers; the last line is JSON
    python benchmarks/far.py --lengths 16384,32768,65536 --shapes llama-3.2-1b,qwen2.5-0.5b

Every way runs in an interpreter of its own, on all cores; they take turns of three steps, in rounds, and medians are
reported. Cold: before a step of `farkv` and `mapped` the system is made to forget its copies of the files, which is not
timed; `streamed` reads around these copies. Ours reads pages of what it chooses, and keeps copies of pages within its
host limit.

  mapped         every layer's records in a mapped file, attended to by our dense kernel in place
  streamed       the same from two buffers: a layer's file is read, by eight threads at once and directly, while the
                 layer before it is attended to; the first layer of a turn has nothing to hide behind
  streamed int4  the same, records coded in four bits a number and attended to as they are

The model is random and small but for its KV; keys and queries are random, so successive queries have nothing in common:
pages in memory help ours as little as they can.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from children import start_script
from far_ways import SHAPES, WAYS, Shape
from rows import RESULTS, Row, format_rows, mib, read_rows
from runs import Recorder, find_versions, make_parser, read_names, read_numbers

TURN_STEPS = 3


class Child:
    """One way in its interpreter."""

    def __init__(self, name: str, options: dict[str, object]):
        self.name, self.steps = name, list[float]()
        given = [part for key, value in options.items() for part in (f"--{key}", value)]
        self.process = start_script(Path(__file__).with_name("far_ways.py"), "--child", name, *given)
        self.read()

    def read(self) -> str:
        """Return a line of its answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the child ended")
        return line

    def ask(self, text: str) -> Any:
        """Send a line, return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return json.loads(self.read())


def run_case(run: Recorder, shape: str, tokens: int) -> list[Row]:
    """Take the ways' turns, round by round."""
    args, rows = run.args, list[Row]()
    with tempfile.TemporaryDirectory(prefix="farkv-far-", dir=args.folder or None) as folder:
        children = []
        for i, name in enumerate(args.ways):
            own = Path(folder) / str(i)
            own.mkdir()
            options = {"folder": own, "shape": shape, "tokens": tokens, "layers": args.layers, "turn": TURN_STEPS}
            options |= {"steps": TURN_STEPS * (args.rounds + 1), "threads": args.threads}
            children.append(Child(name, options | {"host-share": args.host_share, "fraction": args.fraction}))
            run.say(f"{shape}, {tokens} tokens: {name} is ready")
        for i in range(-1, args.rounds):
            for child in children:
                seconds = child.ask("turn")
                # The first round warms up.
                child.steps += [sum(seconds) / len(seconds)] if i >= 0 else []
            run.say(f"{shape}, {tokens} tokens: round {i + 1} of {args.rounds}")
        for child in children:
            row = {"way": child.name, "shape": shape, "tokens": tokens, "layers": args.layers, "threads": args.threads}
            row |= {"s": statistics.median(child.steps), "steps": child.steps} | child.ask("report")
            child.process.wait()
            rows.append(row | {"kv_bytes": Shape(shape, tokens, args.layers).kv_bytes, "versions": find_versions()})
    return rows


def sum_up(rows: list[Row]) -> Row:
    """Return one object for machines: ours against the fastest dense way."""
    ours = next(row for row in rows if row["way"] == "farkv")
    best = min((row for row in rows if not row["way"].startswith("farkv")), key=lambda row: row["s"])
    rise = max(ours[name]["VmHWM"] for name in ("filled", "memory")) - ours["before"]["VmRSS"]
    return dict(ours_s=ours["s"], best_dense_s=best["s"], best_dense=best["way"], ratio=best["s"] / ours["s"],
                read_fraction=ours["read_fraction"], device_share=ours["disk_bytes"] / ours["s"] / ours["device"],
                host_limit_bytes=ours["host_limit"], rss_over_limits=rise / ours["host_limit"])  # fmt: skip


def format_table(path: Path = RESULTS / "far.jsonl") -> str:
    """Return one Markdown row per way, shape and length."""
    lines, notes = [], []
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in read_rows(path):
        cases.setdefault((row["shape"], row["tokens"], row["layers"]), []).append(row)
    for (shape, tokens, layers), rows in cases.items():
        found = sum_up(rows)
        for row in rows:
            n_layers = layers or SHAPES[shape]["layers"]
            cells = [shape, f"{tokens // 1024} K", str(n_layers), row["way"], f"{row['s'] / n_layers * 1000:.1f}"]
            cells += [f"{row['s'] / found['ours_s']:.1f} x", f"{row['disk_bytes'] / row['kv_bytes']:.3f}"]
            lines.append([*cells, mib(row["disk_bytes"] / row["s"])])
        notes.append(
            f"* {shape}, {tokens // 1024} K: {found['ratio']:.1f} x the fastest dense way ({found['best_dense']}); "
            f"host limit {mib(found['host_limit_bytes'])} MiB of {mib(rows[0]['kv_bytes'])}; "
            f"{found['device_share']:.0%} of what the disk gives at random; the resident set rose by "
            f"{found['rss_over_limits']:.2f} of the limit."
        )
    head = [
        "shape",
        "tokens",
        "layers",
        "way",
        "ms per layer and token",
        "of ours",
        "of the KV read from disk",
        "MiB/s",
    ]
    return format_rows(head, lines, *notes)


def main() -> None:
    parser = make_parser(__doc__, "far.jsonl", threads=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="llama-3.2-1b, 16 K tokens, 8 layers; no file of results")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--shapes", default=",".join(SHAPES), type=read_names)
    parser.add_argument("--lengths", default="16384,32768,65536", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--layers", default=0, type=int, help="0: as many as the model has")
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--fraction", default=0.05, type=float)
    parser.add_argument("--host-share", default=0.125, type=float, help="of the KV: the host limit")
    parser.add_argument("--ways", default=",".join(WAYS), type=read_names)
    parser.add_argument("--folder", default="", help="where the files go; default: the system's temporary folder")
    if "--quick" in sys.argv:
        # A quick look must not overwrite what is published.
        parser.set_defaults(out=Path(os.devnull), shapes=["llama-3.2-1b"], lengths=[16384], layers=8)
    run = Recorder(parser)
    rows: list[Row] = []
    for shape in run.args.shapes:
        for tokens in run.args.lengths:
            rows = run_case(run, shape, tokens)
            run.write(*rows)
            if run.args.json:
                print(json.dumps(sum_up(rows)))
    if not run.args.json:
        print(format_table(run.args.out) if not run.args.quick else json.dumps(sum_up(rows), indent=1))


if __name__ == "__main__":
    main()
