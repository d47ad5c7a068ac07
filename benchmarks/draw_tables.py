"""The tables of drawn reads, of rows that were run in float32: for README and docs (`tables.py`)."""

from __future__ import annotations

from evidence import DRAWS
from evidence_tables import HEADLINE, MODELS, read_model
from rows import format_rows

from farkv.evals.closeness import measure_near
from farkv.evals.show import fraction_text, number, percent

# Their folders, and ours in them: an index of as many bits as it has in half precision.
DRAWN, AS_HALF = "-draws", "infinigen-half"


def format_draws(fractions: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)) -> str:
    """Return drawn reads beside the best ones of the same index, model by model and task by task: KL and top-1."""
    parts: list[str] = []
    for name, title in MODELS.items():
        rows = read_model(name + DRAWN)
        lines: list[list[object]] = []
        for task in dict.fromkeys(row.task for row in rows):
            found = {f: measure_near(rows, tasks=[task], fractions=[f], methods=DRAWS) for f in fractions}
            for method in DRAWS:
                mine = [next((x for x in found[f] if x.setting.method == method), None) for f in fractions]
                n = max((x.n for x in mine if x), default=0)
                cells = ["–" if x is None else f"{number(x.kl.mean)} ({percent(x.top1)})" for x in mine]
                lines.append([f"`{task}`", n, f"`{method}`", *cells])
        if lines:
            head = ["task", "n", "method", *(fraction_text(f) for f in fractions)]
            parts.append(f"**{title}**, 2 K.\n\n" + format_rows(head, lines))
    return "\n\n".join(parts)


def format_headline(name: str = "smollm2") -> str:
    """Return README's first sentences: task by task ours at the headline's fraction, the oracle and low-bit keys."""
    rows, shown, n = read_model(name + DRAWN), list[str](), 0
    for task in dict.fromkeys(row.task for row in rows):
        lines = measure_near(rows, tasks=[task], fractions=[HEADLINE], methods=("full", *DRAWS))
        found = {line.setting.method: line for line in lines}
        kl = [number(found[method].kl.mean) for method in (AS_HALF, "oracle", "lowbit")]
        n = max(n, found[AS_HALF].n)
        shown.append(f"`{task}` {' / '.join(kl)}")
    return "\n".join((
        f"Measured on {MODELS[name]}, 2 K tokens, float32, {n} samples a task: {percent(HEADLINE, 0)} of the KV bytes",
        "read per step and an index of 64 bits a key. KL to the full cache in nats, `infinigen` / the exact top-k",
        f"oracle, which reads every key / `lowbit`, with an index of 128 bits: {'; '.join(shown)}.",
    ))  # fmt: skip
