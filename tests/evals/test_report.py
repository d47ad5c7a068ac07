"""The report: one file, nothing outside it, nothing that runs, whatever stands in the rows."""

from __future__ import annotations

import base64
import re
import struct
import time
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from farkv.errors import InputError, StoreError
from farkv.evals.cells import study_rows
from farkv.evals.report import write_report
from farkv.evals.report.curves import Axis, find_reads, round_range
from farkv.evals.report.heat import bin_scores, find_known
from farkv.evals.report.looks import choose_looks
from farkv.evals.report.page import Page, make_page
from farkv.evals.report.reads import load_reads, write_png
from farkv.evals.report.words import summarize
from farkv.evals.row import READS, RUN
from farkv.evals.tables import make_table
from tests.evals.results import QUALITY, make_reads, make_row, make_rows, make_run, write_folder

VOID = {"meta", "input", "br", "wbr"}
EVIL = '<script>alert(1)</script><img src="http://evil.example/x" onerror="alert(2)">&amp;\'"'


class Walk(HTMLParser):
    """Elements, attributes and texts of a page; every element is closed in its order."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def check_page(html: str) -> Walk:
    """Check what holds for every page, and return its elements."""
    walk = Walk(html)
    tags = {tag for tag, _ in walk.tags}
    assert not tags & {"script", "iframe", "object", "embed", "base", "img", "a"}
    for _, attributes in walk.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "data:image/png").startswith("data:image/png")
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(
        r'(?:d|x|y|cx|cy|points|transform|width|height|viewBox|style|fill-opacity)="[^"]*(?:nan|inf)', html
    )
    identities = [attributes["id"] for _, attributes in walk.tags if attributes.get("id")]
    assert len(identities) == len(set(identities))
    targets = {attributes["for"] for tag, attributes in walk.tags if tag == "label"}
    assert targets <= set(identities)
    for tag, attributes in walk.tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden")
    return walk


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("eval")
    rows = make_rows(fractions=(0.1,), tasks=("niah_single", "cwe", "ppl"), limit=3)
    write_folder(folder, rows, [make_reads(method, 0.1, layers=2) for method in ("infinigen", "window")])
    return write_report(folder, folder / "report.html")


def test_page_stands_alone_and_is_well_formed(page: Page):
    walk = check_page(page.html)
    policy = [a["content"] for tag, a in walk.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert "http:" not in page.html
    assert "https:" not in page.html


def test_page_says_everything_that_was_run(page: Page):
    said = " ".join(Walk(page.html).texts)
    for expected in (*QUALITY, "0123abcd", "farkv eval --model demo", "torch 2.13.0", "A processor of 2.4 GHz"):
        assert expected in said
    assert "its index alone reads more than this fraction" in said
    assert "The full cache itself is near the floor here" in said
    headings = [
        part
        for part in ("Reads by position and decode step", "Retrieval by depth and length", "How to read this")
        if part in said
    ]
    assert len(headings) == 3


def test_headline_is_made_from_the_numbers(page: Page):
    line = page.table.find("infinigen", 0.1)
    assert line is not None
    assert page.findings.headline.startswith(f"infinigen at 10 % scores {100 * line.score.mean:.1f} %, the full cache")


def test_where_ours_is_not_best_is_said():
    rows = [replace(make_row("vt", "full", 1.0, 2048, i), score=1.0) for i in range(30)]
    rows += [replace(make_row("vt", "infinigen", 0.1, 2048, i), score=float(i % 3 > 0)) for i in range(30)]
    rows += [replace(make_row("vt", "pages", 0.1, 2048, i), score=1.0) for i in range(30)]
    study = study_rows(rows)
    said = " ".join(summarize(study, make_table(study)).more)
    assert "Not best on average: at 10 % pages has 100.0 %, +33.3 points" in said
    assert "], significant." in said
    assert "significantly better on 1 of 1 cells: vt at 2 K (pages +33.3)" in said
    assert "Within one point of the full cache at 10 %: no, −33.3 points" in said


def find_verdict(n: int, lost: int) -> tuple[str, str]:
    """Return headline and verdict of n samples, of which ours lost some."""
    rows = [replace(make_row("vt", "full", 1.0, 2048, i), score=1.0) for i in range(n)]
    rows += [replace(make_row("vt", "infinigen", 0.1, 2048, i), score=float(i >= lost)) for i in range(n)]
    rows += [replace(make_row("vt", "pages", 0.1, 2048, i), score=1.0) for i in range(n)]
    study = study_rows(rows)
    found = summarize(study, make_table(study))
    return found.headline, " ".join(found.more)


def test_few_samples_say_nothing_of_a_point() -> None:
    for n, lost in ((2, 0), (2, 2), (19, 0)):
        headline, said = find_verdict(n, lost)
        assert f"Only {n} samples: too few to say more." in headline
        assert f"at 10 %: too few samples to say ({n}, expected 20 or more)." in said
        assert "significant" not in said
        assert "Best on average" not in said
    headline, said = find_verdict(40, 0)
    assert "Only" not in headline
    assert "as far as 40 samples tell, yes; a loss of up to 7.5 points may show in none of them" in said
    assert "yes, with the whole interval" in find_verdict(400, 0)[1]
    assert "at 10 %: no, −50.0 points." in find_verdict(40, 20)[1]
    assert "at 10 %: on average no (−2.5), but the interval reaches " in find_verdict(40, 1)[1]


def test_five_samples_of_a_cell_are_never_significant() -> None:
    for n, lost in ((5, 0), (6, 1)):
        rows = [
            replace(make_row(task, method, 1.0 if method == "full" else 0.1, 2048, i), score=score)
            for task, samples, worse in (("vt", n, 0.0), ("cwe", 30, 1.0))
            for method, score in (("full", 1.0), ("infinigen", worse), ("pages", 1.0))
            for i in range(samples)
        ]
        study = study_rows(rows)
        said = " ".join(summarize(study, make_table(study)).more)
        assert (f"significantly better on {lost} of 2 cells" in said) == bool(lost)


def test_every_axis_has_a_title_and_the_oracle_its_bytes(page: Page):
    said = Walk(page.html).texts
    for title in (
        "score, %",
        "difference to the full cache, points",
        "read + index, %",
        "KL to the full cache, nats per token",
    ):
        assert any(title in text for text in said), title
    oracle = page.table.find("oracle", 0.1)
    assert oracle is not None
    assert find_reads(oracle) == oracle.measured["read_fraction"] + oracle.measured["index_fraction"]


def test_answers_and_names_cannot_break_out(tmp_path: Path):
    rows = make_rows(("infinigen", EVIL), (0.1,), ("niah_single",), (2048,), 8)
    rows = [replace(row, answer=EVIL, expected=[EVIL], proof=EVIL if row.method == EVIL else row.proof) for row in rows]
    rows = [replace(row, score=0.0) if row.method == "infinigen" else row for row in rows]
    skipped = [{"method": EVIL, "fraction": 0.1, "why": EVIL}]
    folder = write_folder(tmp_path, rows, [make_reads(EVIL, 0.1, layers=1)], model=EVIL, command=EVIL, skipped=skipped)
    made = write_report(folder, tmp_path / "r.html", title=EVIL)
    walk = check_page(made.html)
    assert any(EVIL in said for said in walk.texts)
    assert "<script" not in made.html


@pytest.mark.parametrize(
    ("methods", "fractions", "tasks", "lengths", "limit"),
    [
        ((), (), ("vt",), (2048,), 1),
        (("infinigen",), (0.1,), ("vt",), (2048,), 1),
        (("window",), (0.05,), ("niah_single",), (1500,), 2),
        (("infinigen", "kvpress:A", "kvpress:B", "kvpress:C", "x-new"), (0.1, 0.2), ("qa", "ppl"), (2048,), 3),
        (("oracle",), (0.1,), ("cwe",), (8192,), 2),
    ],
)
def test_small_and_odd_runs_make_a_page(methods, fractions, tasks, lengths, limit):
    rows = make_rows(methods, fractions, tasks, lengths, limit)
    made = make_page(rows, [], {}, "title")
    check_page(made.html)
    assert "Reads by position and decode step" not in made.html


def test_missing_numbers_make_a_page():
    rows = make_rows(("infinigen",), (0.1,), ("vt", "ppl"), (2048,), 3)
    nothing = {"kl": None, "nll": None, "agrees": None, "depth": None, "tokens_per_s": float("nan")}
    rows = [replace(row, read_fraction=float("nan"), resident_fraction=0.0, **nothing) for row in rows]
    check_page(make_page(rows, [], make_run(machine=None, versions=[], skipped="all"), "title").html)


def test_without_reads_and_run_a_folder_still_makes_a_page(tmp_path: Path):
    write_folder(tmp_path, make_rows(("infinigen",), (0.1,), ("vt",), (2048,), 2))
    (tmp_path / RUN).unlink()
    assert load_reads(tmp_path) == []
    check_page(write_report(tmp_path, tmp_path / "report.html").html)


@pytest.mark.parametrize("damage", ['{"task"', "[]", '{"read": []}', '{"read": [[1]]}'])
def test_damaged_reads_are_one_error(tmp_path: Path, damage: str):
    write_folder(tmp_path, make_rows(("infinigen",), (0.1,), ("vt",), (2048,), 1))
    (tmp_path / READS).write_text(damage + "\n", "utf-8")
    with pytest.raises(InputError, match=r"reads\.jsonl, line 1"):
        write_report(tmp_path, tmp_path / "report.html")


@pytest.mark.parametrize("damage", ["", "{", "[1]"])
def test_damaged_run_is_one_error(tmp_path: Path, damage: str):
    write_folder(tmp_path, make_rows(("infinigen",), (0.1,), ("vt",), (2048,), 1))
    (tmp_path / RUN).write_text(damage, "utf-8")
    with pytest.raises(InputError, match=r"run\.json"):
        write_report(tmp_path, tmp_path / "report.html")


def test_a_page_that_cannot_be_written_is_one_error(tmp_path: Path):
    write_folder(tmp_path, make_rows(("infinigen",), (0.1,), ("vt",), (2048,), 1))
    with pytest.raises(StoreError, match="cannot be written"):
        write_report(tmp_path, tmp_path / "none" / "report.html")


def test_what_no_html_has_is_shown(tmp_path: Path):
    rows = make_rows(("infinigen",), (0.1,), ("vt",), (2048,), 1)
    rows = [replace(row, answer="half \ud800, a\0b \x1b[2J", score=float(row.method == "full")) for row in rows]
    write_folder(tmp_path, rows)
    write_report(tmp_path, tmp_path / "report.html", "t\ud800\0<b>")
    text = (tmp_path / "report.html").read_bytes().decode()
    assert r"half \ud800, a\x00b \x1b[2J" in text
    assert r"t\ud800\x00&lt;b&gt;" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o600


def test_same_rows_same_page():
    rows = make_rows(("infinigen", "window"), (0.1,), ("vt",), (2048,), 3)
    assert make_page(rows, [], make_run(), "t").html == make_page(list(rows), [], make_run(), "t").html
    assert time.strftime("%Y-%m-%d") not in make_page(rows, [], make_run(), "t").html


def test_retrieval_bins_by_depth_and_length():
    rows = []
    for seed in range(8):
        depth = seed / 8
        rows.append(replace(make_row("niah_single", "full", 1.0, 2048, seed), depth=depth, score=1.0))
        rows.append(
            replace(make_row("niah_single", "window", 0.1, 2048, seed), depth=depth, score=float(depth >= 0.75))
        )
    study = study_rows(rows)
    window = next(setting for setting in study.settings if setting.method == "window")
    lengths, means, counts = bin_scores(find_known(study), window, 4)
    assert lengths == [2048]
    assert means[:, 0].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert counts[:, 0].tolist() == [2, 2, 2, 2]


def test_image_holds_the_shares():
    shares = np.array([[0.0, 0.25, 1.0], [0.01, 0.5, 2.0]])
    data = base64.b64decode(write_png(shares).split(",")[1])
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    start = data.index(b"IDAT")
    size = struct.unpack(">I", data[start - 4 : start])[0]
    lines = zlib.decompress(data[start + 4 : start + 4 + size])
    assert list(lines) == [0, 0, 128, 255, 0, 26, 180, 255]


def test_every_method_has_one_look_and_others_have_their_own():
    looks = choose_looks(["kvpress:B", "full", "infinigen", "kvpress:A", "xkv"], {"infinigen"})
    assert list(looks) == ["full", "infinigen", "xkv", "kvpress:A", "kvpress:B"]
    assert len({look.light for look in looks.values()}) == len({look.name for look in looks.values()}) == 5
    assert looks["infinigen"].aware
    assert not looks["xkv"].aware


def test_axes():
    assert Axis(0.0, 1.0, 0, 1).ticks(5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis(0.016, 1.15, 0, 1, log=True).ticks(9) == [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert Axis(1e-6, 10, 0, 1, log=True).ticks(4) == [1e-6, 1e-4, 1e-2, 1.0]
    assert Axis(0.6, 0.8, 0, 1, log=True).ticks(9) == [0.6, 0.8]
    assert Axis(0.01, 1.0, 0, 100, log=True).place(0.1) == pytest.approx(50)
    assert Axis(0.0, 1.0, 100, 0).place(2.0) == 0
    assert round_range([0.93, 0.981])[1] == 1.0
    assert round_range([0.5, 0.5])[0] < 0.5 < round_range([0.5, 0.5])[1]


def test_every_place_of_a_text_is_escaped():
    evil = EVIL.replace("http:", "")  # a name may be broken after a colon
    rows = make_rows((evil,), (0.1, 0.2), ("niah_single", "vt"), limit=2)
    rows = [replace(row, task=f"{row.task}{evil}") for row in rows]
    html = make_page(rows, [], make_run(versions={evil: evil}, filler=evil, machine={"processor": evil}), "title").html
    walk = check_page(html)
    named = [value for _, attributes in walk.tags for value in attributes.values() if value and evil in value]
    shown = [said for said in walk.texts if evil in said]
    assert len(shown) > 20
    assert len(named) > 4
    assert html.count("alert(1)") == "".join(shown + named).count(evil)
