"""The page: one self-contained HTML file without scripts, readable with `file://`.

In: rows, traced reads, the record of the run. Out: HTML, from the template `page.html`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from farkv.evals import near_tables, show
from farkv.evals.cells import FULL, OURS, Setting, Study, study_rows
from farkv.evals.closeness import measure_fractions
from farkv.evals.report.curves import draw_averages, draw_cells
from farkv.evals.report.facts import list_facts, list_lost, list_skipped
from farkv.evals.report.heat import count_samples, find_known, make_maps
from farkv.evals.report.looks import choose_looks
from farkv.evals.report.reads import Reads, average_read, choose_reads, write_png
from farkv.evals.report.words import Findings, choose_fraction, summarize
from farkv.evals.row import Row
from farkv.evals.tables import Line, Table, make_table
from farkv.quote import show_controls


class Page(NamedTuple):
    """A page and its content, for `--json`."""

    html: str
    findings: Findings
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
        InputError: there are no rows, or none of the full cache.
    """
    study = study_rows(rows)
    table = make_table(study)
    findings, chosen = summarize(study, table), choose_fraction(study, table)
    bounds = {s.method for s in study.proofs if study.is_bound(s)}
    looks = choose_looks(study.methods, {s.method for s in study.aware}, bounds)
    columns = show.list_columns(study) if table.lines else []
    subject = Setting(OURS, 0.1 if chosen is None else chosen)
    fractions = {show.fraction_text(fraction): fraction for fraction in study.fractions}
    html = load_template().render(
        title=title, findings=findings, model=run.get("model"), looks=looks, study=study, table=table, subject=subject,
        averages=draw_averages(table, looks) if table.lines else [],
        cells=draw_cells(study, looks) if table.lines else [],
        columns=columns, near=[line for line in measure_fractions(rows) if not line.setting.is_full],
        grids={text: list_grid(study, columns, f) for text, f in fractions.items() if len(columns) > 1},
        maps={text: make_maps(study, f) for text, f in fractions.items() if find_known(study)},
        found=count_samples(study),
        reads={line.setting.method: line for line in choose_reads(reads, subject.fraction)},
        lost=list_lost(rows, subject),
        gated=[(g.task, show.length_text(g.length), show.percent(g.full), g.n) for g in table.gated],
        skipped=list_skipped(run), facts=list_facts(run, study),
    )  # fmt: skip
    # HTML has no NUL, UTF-8 no halves of letters; a prompt or an answer may hold both.
    return Page(show_controls(html, keep="\n\t"), findings, table, study)


def list_grid(study: Study, columns: Sequence[Table], fraction: float) -> list[tuple[str, list[Line | None]]]:
    """Return, per method, its line in each column at one fraction: the full cache first, then by mean score."""
    order = [FULL, *(line.setting.method for line in columns[0].at(fraction))]
    methods = sorted(study.methods, key=lambda m: order.index(m) if m in order else len(order))
    grid = [(m, [table.find(m, None if m == FULL else fraction) for table in columns]) for m in methods]
    return [(method, lines) for method, lines in grid if any(lines)]


@cache
def load_template() -> Template:
    """Return the template; everything inserted into it is escaped."""
    environment = Environment(
        loader=PackageLoader("farkv.evals", "report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    filters = (
        show.fraction_text, show.length_text, show.name_setting, show.number, show.percent, show.point_span,
        show.points, show.span, average_read, keep_units, write_png,
        near_tables.show_kl, near_tables.show_score, near_tables.sum_bytes,
    )  # fmt: skip
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template("page.html")


def keep_units(text: str) -> str:
    """Replace spaces between numbers and units by no-break spaces."""
    return re.sub(r"(?<=\d) (?=%|K\b|points\b)", "\u00a0", text)
