"""The report of an evaluation: `farkv report DIR -o report.html`, one self-contained page.

In: a folder that `farkv eval` wrote. Out: an HTML file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farkv.evals.report.facts import load_run
from farkv.evals.report.page import Page, make_page
from farkv.evals.report.reads import load_reads
from farkv.evals.tables import read_results
from farkv.files import write_file


def write_report(folder: Path, out: Path, title: str | None = None) -> Page:
    """Write the report of a results folder.

    Args:
        folder: the results of `farkv eval`.
        out: the HTML file.
        title: page title; by default the model's name.

    Raises:
        InputError: the folder has no results, or a file in it is damaged.
        StoreError: the page cannot be written; what was there before still is.

    Cost: seconds for about ten thousand rows.
    """
    rows, run = read_results(folder), load_run(folder)
    page = make_page(rows, load_reads(folder), run, title or f"farkv eval: {run.get('model') or folder.name}")
    # It quotes prompts and answers, as the results do.
    write_file(out, page.html.encode(), "report", private=True)
    return page


def describe_report(page: Page, out: Path) -> dict[str, Any]:
    """Return the content of a report as plain JSON types."""
    text = {"out": str(out), "headline": page.findings.headline, "findings": page.findings.more}
    return {**text, "rows_left_out": page.study.dropped, **page.table.to_dict()}
