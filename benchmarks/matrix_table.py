"""What came of every model, as a table: in rows of `matrix_play.py`, out the tables of docs/supported.md."""

from __future__ import annotations

from collections import Counter

from rows import RESULTS, Row, Rows, format_rows, read_rows

EQUAL, REFUSED, UNABLE, FAULT = "equal", "refused", "plain: no", "FAULT"
WORDS = (EQUAL, REFUSED, UNABLE, FAULT)
COLUMNS = ("ordinary", "full", "infinigen", "near", "padded", "beams")


def find_word(cell: str) -> str:
    """Return the word that a cell begins with; what begins with none is a fault."""
    return next((word for word in WORDS if cell.startswith(word)), FAULT)


def list_cells(row: Row) -> list[str]:
    """Return a row's cells; a child that ended, or a model that cannot be built, has one word for all of them."""
    if "crash" in row:
        return [f"{FAULT}: {row['crash']}"] * len(COLUMNS)
    return [row.get(name, row["built"]) for name in COLUMNS]


def judge_row(row: Row) -> str:
    """Return the word for a whole model: a fault where there is one, equal where a cache of ours is."""
    words = [find_word(cell) for cell in list_cells(row)]
    if FAULT in words:
        return FAULT
    ours = words[1:]
    return next(word for word in (EQUAL, REFUSED, UNABLE) if word in ours)


def describe_kinds(row: Row) -> str:
    """Return how many layers are managed, and what the others are."""
    kinds = dict(row.get("kinds", {}))
    if not kinds:
        return "–"
    n = kinds.pop("managed", 0)
    others = ", ".join(f"{count} {kind.removesuffix('_attention')}" for kind, count in kinds.items())
    return f"{n}; {others} left" if others else str(n)


def describe_why(row: Row) -> str:
    """Return the first reason for each word of a row that is not "equal", without what differs from layer to layer."""
    reasons: dict[str, str] = {}
    for cell in list_cells(row):
        word, _, reason = cell.partition(": ") if not cell.startswith(UNABLE) else (UNABLE, "", cell[len(UNABLE) + 2 :])
        if reason:
            reasons.setdefault(word, reason.replace("|", "/"))
    return "; ".join(f"{word}: {reason}" for word, reason in reasons.items())


def read_matrix() -> Rows:
    """Return the rows of the newest transformers release that was run."""
    files = sorted((RESULTS / "matrix").glob("*.jsonl"), key=lambda p: [int(n) for n in p.stem.split(".")])
    return read_rows(files[-1])


def format_summary(rows: Rows | None = None) -> str:
    """Return how many models there are of each word."""
    rows = read_matrix() if rows is None else rows
    counts = Counter(map(judge_row, rows))
    managed = sum(judge_row(row) == EQUAL and row.get("managed", 0) > 0 for row in rows)
    trees = Counter(f"transformers {row['transformers']}, torch {row['torch']}, tree {row['revision']}" for row in rows)
    where = "; ".join(f"{count} on {tree}" for tree, count in sorted(trees.items()))
    return (
        f"{len(rows)} configurations: {counts[EQUAL]} equal to the plain model, bit for bit ({managed} of them with "
        f"managed layers), {counts[REFUSED]} refused in words, {counts[UNABLE]} of which the plain model itself cannot "
        f"be built or run, {counts[FAULT]} faults. Run: {where}."
    )


def format_table(rows: Rows | None = None) -> str:
    """Return one Markdown row per configuration."""
    head = ["family", "layers managed", "ordinary cache", "Full", "InfiniGen(1.0)", "near", "padded", "beams", "why"]
    found = []
    for row in sorted(read_matrix() if rows is None else rows, key=lambda row: row["model"]):
        words = [find_word(cell) for cell in list_cells(row)]
        found.append([f"`{row['model']}`", describe_kinds(row), *words, describe_why(row)])
    return format_rows(head, found)
