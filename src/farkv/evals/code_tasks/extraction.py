"""Context-intensive extraction: the text contains tables, the answer is one whole table as JSON, scored by field."""

from __future__ import annotations

import json

from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Turn

ROWS = 10
# Approximate tokens per record; records make up two thirds of the text.
ROW_TOKENS = 22
COLOURS = "red blue green black white brown grey pink".split()


def make(draw: Draw) -> Made:
    """Tables of ten records each, with code between their rows; the question names one table."""
    rng = draw.rng
    # The answer is about as long as a table.
    n_rows = max(2, min(ROWS, draw.length // (4 * ROW_TOKENS)))
    n_tables = max(1, min(draw.length * 2 // 3 // (n_rows * ROW_TOKENS), 60))
    titles = draw.names(n_tables)
    lines: list[str] = []
    tables: list[list[dict[str, str | int]]] = []
    for title in titles:
        rows = [{"name": n, "code": int(draw.value())} for n in draw.names(n_rows)]
        lines += [f"{title}.add({r['name']!r}, {r['code']}, {rng.choice(COLOURS)!r})\n" for r in rows]
        tables.append(rows)
    asked = rng.randrange(n_tables)
    answer = json.dumps(tables[asked])
    chat = (
        f"The text adds records to several tables, each as name, code, colour. Write the table {titles[asked]} as a "
        f'JSON list of objects with the keys "name" and "code", in the order of the text, and nothing else.'
    )
    places = [i / len(lines) for i in range(len(lines))]
    turn = Turn(f"print(json.dumps({titles[asked]}))  # ", chat, answer, (answer,), "json")
    return Made(lines, [turn], places)
