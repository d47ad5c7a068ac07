"""The tables of `evidence.py`'s rows: by model, method, budget and length; for README and docs (`tables.py`)."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
from evidence import AWARE, MAIN, OUT, PARTS, Part
from rows import format_rows

from farkv.evals.closeness import Near, measure_fractions, measure_near
from farkv.evals.near_tables import EXPLAINED, show_kl, show_score, write_near
from farkv.evals.row import RESULTS, RUN, Row, read_rows
from farkv.evals.show import fraction_text, length_text, number, percent
from farkv.evals.tasks.orders import FACTS, list_orders

# In the order in which they are shown; README's is the first.
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct",
    "qwen05": "Qwen2.5-Coder-0.5B-Instruct",
    "gemma3": "Gemma 3 270M (hybrid: 3 of 18 layers are managed)",
    "qwen15": "Qwen2.5-Coder-1.5B-Instruct",
}
SHORT = ("infinigen", "infinigen-top", "lowbit", "oracle", "pages", "snapkv", "xkv", "h2o", "window")
BY_TASK = (*SHORT[:2], "infinigen-steps", *SHORT[2:])
IN_ORDERS = ("full", "infinigen", "lowbit", "oracle", "snapkv", "xkv", "h2o")
BESIDE = ("snapkv", "xkv", "infinigen", "lowbit")
# Ours, and as its index was until decision 20: not all was run again.
OURS = ("infinigen", "infinigen-steps")
BOUND = "oracle"
# Of README's first sentences.
IN_HEADLINE = ("infinigen", BOUND, "lowbit")
HEADLINE = 0.05
# A table of fewer compares nothing.
MIN_METHODS = 2


@cache
def read_model(name: str) -> list[Row]:
    """Return a model's rows; none where it was not run."""
    path = OUT / name / RESULTS
    return read_rows(path) if path.is_file() else []


def list_models() -> list[str]:
    """Return the models that were run."""
    return [name for name in MODELS if read_model(name)]


def list_lengths(rows: list[Row]) -> list[int]:
    """Return the lengths at which the main methods were run."""
    return sorted({row.length for row in rows if row.method in OURS})


def keep_ours(rows: list[Row], fraction: float) -> list[Row]:
    """Return one fraction's rows, of the samples that ours and the oracle were run on; all of a length without ours."""
    own = [row for row in rows if row.fraction == fraction or row.method == "full"]
    ours, bound = (
        {(row.length, row.task, row.seed) for row in own if row.method == method} for method in (OURS[0], BOUND)
    )
    lengths = {length for length, *_ in ours}
    return [row for row in own if row.length not in lengths or (row.length, row.task, row.seed) in ours & bound]


def count_tasks(name: str, fraction: float) -> str:
    """Return of how many tasks a model's lines at 2 K and one fraction are: fractions may have others in common."""
    rows = keep_ours([row for row in read_model(name) if row.length == 2048], fraction)
    n = len({row.task for row in rows if row.method == BOUND and row.fraction == fraction})
    return "1 task" if n == 1 else f"{n} tasks"


def measure_lengths(rows: list[Row]) -> dict[str, list[Near]]:
    """Return every length's lines: one of the full cache, then fraction by fraction."""
    found: dict[str, list[Near]] = {}
    for length in list_lengths(rows):
        own = [row for row in rows if row.length == length]
        fractions = sorted({row.fraction for row in own if row.method != "full"})
        lines = [line for f in fractions for line in measure_fractions(keep_ours(own, f), [length])]
        full = max((line for line in lines if line.setting.is_full), key=lambda line: line.n)
        found[length_text(length)] = [full, *(line for line in lines if not line.setting.is_full)]
    return found


def describe(name: str, lines: dict[str, list[Near]], rows: list[Row]) -> str:
    """Return what a table is of: model, dtype, tasks, samples."""
    run = json.loads((OUT / name / RUN).read_text())
    tasks = list(dict.fromkeys(row.task for row in rows if row.method in OURS))
    counts = ", ".join(f"{found[0].n} samples at {length}" for length, found in lines.items() if found)
    of = f"**{MODELS[name]}**, {run['dtype']}, {run['filler']} filler, {run['form']} form"
    return f"{of}. {counts}. Tasks: {', '.join(tasks)}."


def format_models() -> str:
    """Return every model's table, method by method, and what the columns are."""
    parts: list[str] = []
    for name in list_models():
        rows = [row for row in read_model(name) if row.method in (*MAIN, "full")]
        by_length = measure_lengths(rows)
        parts += [describe(name, by_length, rows), write_near(by_length)]
    return "\n\n".join([*parts, EXPLAINED])


def format_tasks(fraction: float = HEADLINE) -> str:
    """Return every model's KL by task at one fraction, and the full cache's score."""
    return "\n\n".join(table for name in list_models() if (table := format_model_tasks(name, fraction)))


def format_model_tasks(name: str, fraction: float) -> str:
    """Return one model's KL by task; nothing where there is one task alone."""
    rows = keep_ours([row for row in read_model(name) if row.length == 2048], fraction)
    tasks = list(dict.fromkeys(row.task for row in rows if row.method in OURS))
    methods = [m for m in BY_TASK if any(row.method == m and row.fraction == fraction for row in rows)]
    lines: list[list[object]] = []
    for task in tasks:
        lines_of = measure_near(rows, tasks=[task], fractions=[fraction], methods=methods)
        found = {line.setting.method: line for line in lines_of}
        full = found["full"]
        cells = [number(found[m].kl.mean) if m in found else "–" for m in methods]
        lines.append([f"`{task}`", full.n, "fails" if full.score is None else percent(full.score, 0), *cells])
    if len(tasks) < 2:
        return ""
    return f"**{MODELS[name]}**, 2 K, {fraction_text(fraction)}.\n\n" + format_rows(
        ["task", "n", "full cache", *methods], lines
    )


def format_part(part: Part, tasks: tuple[str, ...], name: str = "smollm2") -> str:
    """Return methods of one part, a row each, fractions across: KL, top-1 and score."""
    rows = [row for row in read_model(name) if row.length == 2048 and row.task in tasks]
    found = measure_near(rows, methods=part.methods, fractions=part.fractions)
    lines = [line for line in found if not line.setting.is_full]
    if len({line.setting.method for line in lines}) < MIN_METHODS:
        return say_missing(part)
    fractions = sorted({line.setting.fraction for line in lines})
    shown: list[list[str]] = []
    for method in part.methods:
        mine = {line.setting.fraction: line for line in lines if line.setting.method == method}
        if mine:
            shown.append([f"`{method}`", *(describe_cell(mine.get(fraction)) for fraction in fractions)])
    n = lines[0].n if lines else 0
    head = ["method", *(fraction_text(f) for f in fractions)]
    return format_rows(head, shown, f"{MODELS[name]}, 2 K, {', '.join(tasks)}, n = {n}: KL (top-1, score).")


def say_missing(part: Part) -> str:
    """Say how a part is run that was not."""
    name = next((name for name, known in PARTS.items() if set(part.methods) >= set(known.methods)), "main")
    return f"Not run yet: `python benchmarks/evidence.py --model smollm2 --only {name}`."


def describe_cell(line: Near | None) -> str:
    """Return a line as one cell."""
    return "–" if line is None else f"{show_kl(line)} ({percent(line.top1)}, {show_score(line)})"


def format_ahead() -> str:
    """Return speculation one layer ahead beside the true query, and the paper's source beside ours."""
    part = PARTS["ahead"]
    return format_part(part._replace(methods=(*part.methods, "infinigen-paper")), ("ppl",))


def format_profile() -> str:
    """Return what a measured profile gave over a skew that is fitted to the prompt, both in even steps."""
    methods = ("infinigen-steps", "infinigen-profile")
    return format_part(Part(("ppl", "niah_single_2"), methods, (0.05, 0.1), {2048: 8}), ("ppl", "niah_single_2"))


def format_index() -> str:
    """Return our index step by step, task by task: even steps, tables, half the bytes, reads that vary."""
    part, parts = PARTS["index"], list[str]()
    for name in list_models():
        for task in part.tasks:
            rows = [row for row in read_model(name) if row.length == 2048 and row.task == task]
            if any(row.method == OURS[0] for row in rows):
                parts.append(format_part(part, (task,), name))
    return "\n\n".join(parts)


def format_kept() -> str:
    """Return what evicts, by how layers share, with and without the question."""
    part = PARTS["kept"]
    run = [
        task for task in part.tasks if any(row.method == AWARE[0] and row.task == task for row in read_model("smollm2"))
    ]
    return "\n\n".join(format_part(part, (task,)) for task in run) or say_missing(part)


def format_kvpress(name: str = "smollm2") -> str:
    """Return another library's presses beside ours, over the prompts that both answered."""
    path = OUT / name / "results-kvpress.jsonl"
    if not path.is_file():
        return "Not run yet: `benchmarks/kvpress_peer.sh DIR`."
    theirs = read_rows(path)
    asked = {row.prompt_sha for row in theirs}
    rows = [*theirs, *(row for row in read_model(name) if row.prompt_sha in asked and row.method in BESIDE)]
    tasks = list(dict.fromkeys(row.task for row in theirs))
    fractions = sorted({row.fraction for row in theirs if row.fraction < 1})
    lines: list[list[str]] = []
    for method in dict.fromkeys(row.method for row in rows if row.method != "full"):
        cells: list[str] = []
        for task in tasks:
            for fraction in fractions:
                mine = [r for r in rows if (r.method, r.task, r.fraction) == (method, task, fraction)]
                known = [r.kl for r in mine if r.kl is not None]
                cells.append(number(float(np.mean(known))) if known else "–")
        lines.append([f"`{method}`", *cells])
    head = ["method", *(f"{task}, {fraction_text(fraction)}" for task in tasks for fraction in fractions)]
    note = f"{MODELS[name]}, 2 K, n = {len(asked) // len(tasks)} a task: KL, each to its own program's full cache."
    return format_rows(head, lines, note)


def format_orders(name: str = "smollm2", fraction: float = HEADLINE) -> str:
    """Return several turns over one cache: depth of the fact downwards, turn to the right."""
    rows = [row for row in read_model(name) if row.task == "orders" and row.length == 2048]
    methods = [m for m in IN_ORDERS if any(row.method == m and row.fraction in (fraction, 1.0) for row in rows)]
    if not any(row.method != "full" for row in rows):
        return say_missing(PARTS["main"])
    lines: list[list[str]] = []
    for method in methods:
        grid: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for row in rows:
            if row.method == method and row.fraction in (fraction, 1.0):
                facts = list_orders()[row.seed % len(list_orders())]
                for turn, (fact, said) in enumerate(zip(facts, row.turns, strict=True)):
                    grid.setdefault((fact, turn), []).append((said["kl"], said["score"]))
        lines += [
            [f"`{method}`" if fact == 0 else "", f"{(2 * fact + 1) / (2 * FACTS):.3g}",
             *(describe_turns(grid.get((fact, turn), [])) for turn in range(FACTS))]
            for fact in range(FACTS)
        ]  # fmt: skip
    n = len({row.seed for row in rows})
    note = (
        f"{MODELS[name]}, 2 K, {fraction_text(fraction)}, n = {n} orders of four questions over one cache: KL to "
        "the full cache (values found of those asked)."
    )
    return format_rows(["method", "depth", *(f"turn {i}" for i in range(1, FACTS + 1))], lines, note)


def describe_turns(found: list[tuple[float, float]]) -> str:
    """Return the mean KL of some answers, and how many were right."""
    if not found:
        return "–"
    return f"{number(float(np.mean([kl for kl, _ in found])))} ({sum(score for _, score in found):.0f}/{len(found)})"


def find_lines(name: str, fraction: float) -> dict[str, Near]:
    """Return a model's lines at 2 K and one fraction, by method."""
    rows = keep_ours([row for row in read_model(name) if row.method in (*MAIN, "full")], fraction)
    lines = measure_near(rows, lengths=[2048], fractions=[fraction])
    return {line.setting.method: line for line in lines}


def format_headline() -> str:
    """Return README's first sentences: ours at the headline's fraction, the oracle and low-bit keys, by model."""
    shown: list[str] = []
    for name in list_models():
        found = find_lines(name, HEADLINE)
        if all(method in found for method in IN_HEADLINE):
            kl = " / ".join(number(found[method].kl.mean) for method in IN_HEADLINE)
            shown.append(f"{MODELS[name].split(' (')[0]} {kl} (n = {found['full'].n}, {count_tasks(name, HEADLINE)})")
    read = percent(HEADLINE, 0)
    return "\n".join((
        f"Measured on real models, in place on a CPU, 2 K tokens, bfloat16, {read} of the KV bytes read per step by",
        "an index of 3.1 %: KL to the full cache in nats, `infinigen` / the exact top-k oracle,",
        "which reads every key / `lowbit`, with an index of 6.2 %: " + "; ".join(shown) + ".",
    ))  # fmt: skip


def format_short(name: str = "smollm2") -> str:
    """Return README's table: KL and top-1 of every method, fractions across."""
    fractions = (0.02, 0.05, 0.1)
    found = {fraction: find_lines(name, fraction) for fraction in fractions}
    lines: list[list[str]] = []
    for method in SHORT:
        here = [found[f].get(method) for f in fractions if found[f]]
        known = next((line for line in here if line is not None), None)
        if known is None:
            continue
        cells = ["–" if x is None else f"{number(x.kl.mean)} ({percent(x.top1)})" for x in here]
        cells = [f"**{c}**" if x is not None and x.mark == "best" else c for c, x in zip(cells, here, strict=True)]
        lines.append([method, "every key" if known.bound else percent(known.index_fraction), *cells])
    counts = {f: next(iter(found[f].values())).n for f in fractions if found[f]}
    note = (
        f"KL in nats to the full cache (top-1), {MODELS[name]}, 2 K tokens; n: samples. **Bold**: nearest, but for the "
        "oracle, which reads every key. `infinigen` is in place on a CPU, where records are drawn by weight; "
        "far and on a GPU the best are read."
    )
    heads = [f"{percent(f, 0)} (n = {n}, {count_tasks(name, f)})" for f, n in counts.items()]
    return format_rows(["method", "index", *heads], lines, note)
