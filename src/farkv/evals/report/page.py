"""The page: one HTML file with nothing outside it, no script, readable by `file://`.

In: rows, traced reads, what was run. Out: HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from farkv.evals.cells import Study, study_rows
from farkv.evals.report.element import Html, el, keep
from farkv.evals.report.facts import draw_left_out, draw_lost, draw_notes, draw_run
from farkv.evals.report.grids import draw_grid, draw_lines, draw_tabs, write_tab_css
from farkv.evals.report.heat import draw_retrieval, find_known, list_tasks
from farkv.evals.report.looks import Look, choose_looks, write_css
from farkv.evals.report.pictures import draw_average, draw_cells, draw_legend
from farkv.evals.report.reads import Reads, choose_reads, draw_reads, draw_scale
from farkv.evals.report.words import Said, choose_fraction, say
from farkv.evals.row import Row
from farkv.evals.show import fraction_text, length_text, list_columns
from farkv.evals.tables import Table, make_table

# Nothing is fetched and nothing runs, whatever an answer of a model says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Page(NamedTuple):
    """A page and what stands in it, for `--json`."""

    html: str
    said: Said
    table: Table
    study: Study


def make_page(rows: Sequence[Row], reads: Sequence[Reads], run: dict[str, Any], title: str) -> Page:
    """Return the report of a run.

    Args:
        rows: of results.jsonl.
        reads: of reads.jsonl; may be empty.
        run: run.json; may be empty.
        title: of the page.

    Raises:
        InputError: there is nothing to compare with.
    """
    study = study_rows(rows)
    table = make_table(study)
    said = say(study, table)
    looks = choose_looks(study.methods, {s.method for s in study.aware})
    chosen = choose_fraction(study)
    tabs = {
        "grid": len(study.fractions),
        "found": len(study.fractions),
        "reads": len({r.setting.method for r in reads}),
    }
    sections = [
        draw_head(title, said, run),
        *draw_quality(study, table, looks, chosen),
        *draw_heat(study, reads, chosen),
        *draw_ends(rows, study, table, run, chosen),
    ]
    style = files("farkv.evals.report").joinpath("style.css").read_text("utf-8")
    style += write_css(list(looks.values())) + "".join(write_tab_css(name, n) for name, n in tabs.items())
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(style)),
    )
    page = el("html", head, el("body", el("main", *sections)), lang="en")
    return Page(f"<!doctype html>\n{page}\n", said, table, study)


def section(name: str, title: str, *children: object) -> Html:
    """Return one part of the page with its heading."""
    return el("section", el("h2", title), *children, id=name)


def draw_head(title: str, said: Said, run: Mapping[str, Any]) -> Html:
    """Return the title, the headline and what stands behind it."""
    model = f"Model: {run['model']}. " if run.get("model") else ""
    basis, *more = said.more or [""]
    points = el("ul", *(el("li", keep(text)) for text in more)) if more else ""
    return el(
        "header",
        el("h1", title),
        el("p", keep(said.headline), class_="headline"),
        el("p", keep(model + basis), class_="soft"),
        points,
    )


def draw_quality(study: Study, table: Table, looks: Mapping[str, Look], chosen: float | None) -> list[Html]:
    """Return curves and tables; nothing where every cell is gated."""
    if not table.lines:
        return []
    bounds = {s.method for s in study.proofs if study.is_bound(s)}
    small = [make_table(study, f"{c.task}, {length_text(c.length)}", [c.task], [c.length]) for c in study.cells]
    told = "Average over all cells. Up is better, left is cheaper; of speed, right is better. Bars: 95 %."
    parts = [section("curves", "Quality and what it costs", el("p", told, class_="soft"),
                     draw_legend(looks, bounds, boxes=True), draw_average(table, looks))]  # fmt: skip
    if len(small) > 1:
        told = "Score over read + index, both in percent; one picture per task and length."
        parts.append(
            section("cells", "Every task and length", el("p", told, class_="soft"),
                    draw_legend(looks, bounds, boxes=False), draw_cells(small, looks))
        )  # fmt: skip
    parts.append(section("table", "Scores, differences, bytes", draw_lines(table, looks)))
    columns = list_columns(study)
    if len(columns) > 1 and study.fractions:
        panels = [(fraction_text(f), draw_grid(study, columns, f, looks)) for f in study.fractions]
        first = study.fractions.index(chosen) if chosen in study.fractions else 0
        told = "Scores in percent, the interval below; bold: best of the column, ≈: not different from it."
        parts.append(
            section("grid", "By length and task", el("p", told, class_="soft"),
                    draw_tabs("grid", "Fraction", panels, first))
        )  # fmt: skip
    return parts


def draw_heat(study: Study, reads: Sequence[Reads], chosen: float | None) -> list[Html]:
    """Return both kinds of heat maps, as far as there is something to draw."""
    parts = []
    if find_known(study) and study.fractions:
        panels = [(fraction_text(f), draw_retrieval(study, f)) for f in study.fractions]
        first = study.fractions.index(chosen) if chosen in study.fractions else 0
        tasks = ", ".join(f"{task} ({n})" for task, n in list_tasks(study).items())
        told = f"Score in percent by depth of the asked line, downward, and length, to the right. Samples: {tasks}."
        parts.append(
            section("found", "Where it is found", el("p", told, class_="soft"),
                    draw_tabs("found", "Fraction", panels, first))
        )  # fmt: skip
    if reads:
        lines = choose_reads(reads, chosen or 0.1)
        panels = [(line.setting.method, draw_reads(line)) for line in lines]
        names = [name for name, _ in panels]
        first = names.index("infinigen") if "infinigen" in names else 0
        told = (
            "Position in the text to the right, decode step downward; the stronger, the larger the share that was read."
        )
        parts.append(
            section("reads", "What was read when", el("p", told, class_="soft"), draw_scale(),
                    draw_tabs("reads", "Method", panels, first))
        )  # fmt: skip
    return parts


def draw_ends(rows: Sequence[Row], study: Study, table: Table, run: dict[str, Any], chosen: float | None) -> list[Html]:
    """Return what was lost, what is not compared, what was run, how to read it."""
    lost = draw_lost(rows, chosen) if chosen is not None else None
    parts = [section("lost", "Answers that were lost", lost)] if lost is not None else []
    return [
        *parts,
        section("left", "Not compared", draw_left_out(table, study, run)),
        section("run", "What was run", draw_run(run, study)),
        section("notes", "How to read this", draw_notes()),
    ]
