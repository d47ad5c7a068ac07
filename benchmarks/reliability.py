"""Does it fail-stop? Every attack of `attacks`, many seeded times: right, refused in words, or wrong.

    python benchmarks/reliability.py                             # all, as many tries as the table has
    PYTHONPATH=OLD/src python benchmarks/reliability.py --when before
    python benchmarks/reliability.py --only rollback --tries 10 --seed 500

In: nothing but this package. Out: a JSON line per attack in results/reliability.jsonl, `when` among its columns; the
table of docs/reliability.md is made of them. Exits 1 where something was wrong, but for `--when before`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
import warnings

import attacks
import torch
from attacks.base import Attack, run_attack
from rows import Row, format_rows, read_rows
from runs import Recorder, find_versions, make_parser, read_names


def list_attacks() -> dict[str, Attack]:
    """Return every attack by `file/name`."""
    names = sorted(m.name for m in pkgutil.iter_modules(attacks.__path__) if m.name != "base")
    files = {name: importlib.import_module(f"attacks.{name}") for name in names}
    return {f"{name}/{key}": a for name, file in files.items() for key, a in getattr(file, "ATTACKS", {}).items()}


def format_table() -> str:
    """Return one Markdown row per attack: what it did before, and what it does now."""
    before = {row["attack"]: row for row in read_rows("reliability.jsonl", when="before")}
    head = ["point", "attack", "tries", "wrong before", "**wrong now**", "refused before", "refused now", "seeds"]
    rows = []
    for row in sorted(read_rows("reliability.jsonl", when="now"), key=lambda row: row["point"]):
        old: Row = before.get(row["attack"], {})
        n_old = f" of {old['tries']}" if old and old["tries"] != row["tries"] else ""
        rows.append([
            row["point"], row["says"], row["tries"], f"{old.get('wrong', '–')}{n_old}", f"**{row['wrong']}**",
            old.get("refused", "–"), row["refused"], f"{row['seed']}–{row['seed'] + row['tries'] - 1}",
        ])  # fmt: skip
    return format_rows(head, rows)


def main() -> None:
    parser = make_parser(__doc__, "reliability.jsonl")
    parser.add_argument("--only", default=[], type=read_names, help="files or file/name, by commas")
    parser.add_argument("--tries", default=0, type=int, help="of every attack (default: its own number)")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--when", default="now", choices=["before", "now"])
    run = Recorder(parser)
    args, any_wrong = run.args, False
    for name, attack in list_attacks().items():
        if args.only and not {name, name.split("/")[0]} & set(args.only):
            continue
        started = time.time()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run_attack(attack, args.tries or attack.deep, args.seed)
        row = dict(attack=name, point=attack.point, says=attack.says, when=args.when, seed=args.seed)
        counts = dict(tries=found.tries, wrong=found.wrong, refused=found.refused, wrong_seeds=found.seeds[:20])
        run.write(row | counts | dict(seconds=round(time.time() - started, 1)) | find_versions())
        run.say(f"{name}: {found.wrong} wrong, {found.refused} refused of {found.tries}")
        any_wrong |= found.wrong > 0
    sys.exit(any_wrong and args.when == "now")


if __name__ == "__main__":
    main()
