"""Tables as HTML: one line per method, per fraction; and the scores of one fraction, by length and by task.

In: tables. Out: HTML that scrolls inside its own box where it is wider than the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from farkv.evals.cells import FULL, Study
from farkv.evals.report.element import Html, break_name, el, join
from farkv.evals.report.looks import Look, draw_marker
from farkv.evals.show import fraction_text, name_setting, number, percent, point_span, points, span
from farkv.evals.tables import Line, Table

HEADS = (
    ("method", ""),
    ("score", "95 % below"),
    ("to full", "points"),
    ("tally", "won · tied · lost"),
    ("agrees", "with full"),
    ("KL", "nats/token"),
    ("read", "per step"),
    ("index", "per step"),
    ("kept", "anywhere"),
    ("resident", "near"),
    ("speed", "tokens/s"),
    ("proof", ""),
)
MARKS = {"best": ("best", "best of its fraction, the oracle aside"), "same": ("≈", "not different from the best")}


def draw_box(table: Html, name: str) -> Html:
    """Return a table in a box that scrolls, by keyboard too."""
    return el("div", table, class_="scroll", tabindex=0, role="region", aria_label=name)


def draw_name(method: str, look: Look | None, *, bound: bool = False) -> Html:
    """Return a method's name with its marker in its colour."""
    if look is None or look.marker == "none":
        dot = el("svg", el("line", class_="full", x1=0, x2=12, y1=6, y2=6), viewBox="0 0 12 12", aria_hidden="true")
    else:
        kind = "bound" if bound else "aware" if look.aware else "blind"
        marker = el("g", el("path", class_="dot", d=draw_marker(look, 6, 6, 3.4)), class_=f"sample {kind}")
        dot = el("svg", marker, viewBox="0 0 12 12", aria_hidden="true")
    note = el("span", " ceiling", class_="soft") if bound else ""
    return el("span", dot, el("span", break_name(method), note), class_=f"name {look.name if look else ''}".strip())


def draw_lines(table: Table, looks: Mapping[str, Look]) -> Html:
    """Return a table with a group of lines per fraction, the best first in each, the full cache above all."""
    head = [
        el("th", name, el("span", told, class_="told") if told else "", scope="col", class_=None if told else "words")
        for name, told in HEADS
    ]
    bodies = []
    full = table.find(FULL)
    if full is not None:
        bodies.append(el("tbody", draw_line(full, looks)))
    for fraction in sorted({line.setting.fraction for line in table.lines if not line.setting.is_full}):
        title = el("th", f"fraction {fraction_text(fraction)}", colspan=len(HEADS), scope="rowgroup")
        lines = [draw_line(line, looks) for line in table.at(fraction)]
        bodies.append(el("tbody", el("tr", title, class_="group"), *lines))
    made = el("table", el("thead", el("tr", *head)), *bodies)
    return draw_box(made, "Scores, differences to the full cache and bytes, by fraction and method")


def draw_line(line: Line, looks: Mapping[str, Look]) -> Html:
    """Return one row."""
    named = draw_name(line.setting.method, looks.get(line.setting.method), bound=line.bound)
    name = el("th", named, scope="row")
    m = line.measured
    to_full, tally = "–", "–"
    if line.delta is not None:
        to_full = join([points(line.delta.delta.mean), draw_small(point_span(line.delta.delta))])
        tally = f"{line.delta.wins} · {line.delta.ties} · {line.delta.losses}"
    shares = [percent(m[f"{kind}_fraction"]) for kind in ("read", "index", "kept", "resident")]
    cells = [
        draw_score(line),
        to_full,
        tally,
        percent(m["agrees"]),
        number(m["kl"]),
        *shares,
        number(m["tokens_per_s"]),
    ]
    row = [el("td", cell) for cell in cells]
    return el("tr", name, *row, el("td", line.proof, class_="words"), class_="is-best" if line.mark == "best" else None)


def draw_small(said: str) -> Html:
    """Return an interval, small, below its number."""
    return el("span", said, class_="small")


def draw_score(line: Line, digits: str = " %") -> Html:
    """Return a score, marked where it is the best or not different from it, its interval below."""
    shown = percent(line.score.mean) if digits else f"{100 * line.score.mean:.1f}"
    mark = MARKS.get(line.mark)
    number_ = el("b", shown) if line.mark == "best" else shown
    badge = (
        el("abbr", mark[0], title=mark[1], class_=f"mark {line.mark}")
        if mark and (digits or line.mark == "same")
        else ""
    )
    return join([badge, number_, draw_small(span(line.score))])


def draw_grid(study: Study, columns: Sequence[Table], fraction: float, looks: Mapping[str, Look]) -> Html:
    """Return the scores of one fraction: methods down, the mean, every length and every task across.

    Args:
        study: the cells.
        columns: `show.list_columns` of it.
        fraction: of the methods; the full cache stands above them.
        looks: of the methods.
    """
    head = [el("th", name, scope="col") for name in ("method", *(table.title for table in columns))]
    counts = [el("td", f"n = {table.samples}", class_="soft") for table in columns]
    rows = [el("tr", el("th", "samples", scope="row", class_="soft"), *counts)]
    order = {line.setting.method: i for i, line in enumerate(columns[0].at(fraction))}
    for method in sorted(study.methods, key=lambda m: -1 if m == FULL else order.get(m, len(order))):
        found = [table.find(method, None if method == FULL else fraction) for table in columns]
        if not any(found):
            continue
        cells = [el("td", "–" if line is None else draw_score(line, "")) for line in found]
        bound = any(line is not None and line.bound for line in found)
        rows.append(el("tr", el("th", draw_name(method, looks.get(method), bound=bound), scope="row"), *cells))
    made = el("table", el("thead", el("tr", *head)), el("tbody", *rows))
    return draw_box(made, f"Scores at {fraction_text(fraction)} by length and task, in percent")


def draw_tabs(group: str, title: str, panels: Sequence[tuple[str, Html]], chosen: int) -> Html:
    """Return panels of which one is shown: radio buttons and CSS; a browser that cannot do it shows all.

    Args:
        group: name of the buttons, once per page.
        title: said above them.
        panels: name and content of each.
        chosen: which is shown first.
    """
    if len(panels) == 1:
        return el("div", *(panel for _, panel in panels))
    buttons = []
    for i, (name, _) in enumerate(panels):
        button = el("input", type="radio", name=group, id=f"{group}-{i}", checked=i == chosen)
        buttons.append(el("span", button, el("label", name, for_=f"{group}-{i}"), class_="tab"))
    shown = [
        el("div", el("h4", name, class_="no-tabs"), panel, class_=f"panel-{i}")
        for i, (name, panel) in enumerate(panels)
    ]
    choice = el("fieldset", el("legend", title), *buttons, class_="tabs")
    return el("div", choice, *shown, class_=f"tabbed {group}")


def write_tab_css(group: str, n: int) -> str:
    """Return the rules that show the chosen panel alone."""
    return "".join(
        f".{group}:has(#{group}-{i}:checked)>[class^=panel-]:not(.panel-{i}){{display:none}}\n" for i in range(n)
    )


def list_absent(table: Table) -> str:
    """Return the settings that are not compared, as text."""
    return ", ".join(name_setting(setting) for setting in table.absent)
