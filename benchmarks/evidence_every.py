"""Every task at every fraction, ours beside the oracle and low-bit keys: `smollm2-every`, for docs (`tables.py`).

In float32, for machines without bfloat16, where the index has as many bits a key as it has in half precision:

    farkv eval --model MODELS/smollm2 --tasks ... --methods infinigen-half,oracle,lowbit --fractions 0.01,0.02,0.1 \
        --lengths 2048 --limit 4 --trace 0 --batch 4 --profile none --dtype float32 --out runs/smollm2-every
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from evidence_tables import MODELS, read_model
from rows import format_rows

from farkv.evals.show import fraction_text, number

FOLDER, METHODS = "smollm2-every", ("infinigen-half", "oracle", "lowbit")


def format_every() -> str:
    """Return a row per task: KL of each method at each fraction, where all three were run; and their means."""
    found: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    for row in read_model(FOLDER):
        if row.kl is not None and row.method in METHODS:
            found[row.task, row.fraction, row.method].append(row.kl)
    fractions = sorted({fraction for _, fraction, _ in found})
    wanted = [(fraction, method) for fraction in fractions for method in METHODS]
    tasks = [t for t in dict.fromkeys(task for task, *_ in found) if all((t, *setting) in found for setting in wanted)]
    means = {key: float(np.mean(kls)) for key, kls in found.items()}
    lines: list[list[str]] = []
    for name, among in (*((f"`{t}`", [t]) for t in tasks), ("mean", tasks), ("mean without niah_single_1", tasks)):
        kept = [t for t in among if "without" not in name or t != "niah_single_1"]
        cells = [number(float(np.mean([means[t, *setting] for t in kept]))) for setting in wanted]
        lines.append([name, *cells])
    n = min(len(found[t, *setting]) for t in tasks for setting in wanted)
    head = ["task", *(f"{fraction_text(f)}, {m.removesuffix('-half')}" for f, m in wanted)]
    of = f"{MODELS[FOLDER.split('-', maxsplit=1)[0]]}, 2 K, float32, n = {n} a task: KL to the full cache."
    return format_rows(head, lines, f"{of} Index: 64 bits a key, of `lowbit` 128.")
