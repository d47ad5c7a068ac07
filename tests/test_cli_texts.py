"""The text that `farkv run` reads: several files in order, pipes, documents, and what is refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from farkv.cli.documents import find_kind
from farkv.cli.texts import read_text, read_texts
from farkv.errors import InputError
from tests.command import QUESTION, farkv


def write(folder: Path, **texts: str) -> list[Path]:
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_files_are_read_in_order_each_on_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = write(tmp_path, a="one", b="two\n", c="three")
    assert read_texts([a, b, c]) == "one\ntwo\nthree"
    assert read_texts([c, a]) == "three\none"
    pipe(monkeypatch, "piped")
    assert read_texts([a, Path("-")]) == "one\npiped"
    pipe(monkeypatch, "piped")
    assert read_texts(None) == "piped"
    pipe(monkeypatch, "piped")
    assert read_texts([a]) == "one", "a file that is named is all"


def test_an_empty_file_is_refused_an_empty_pipe_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, empty = write(tmp_path, full="one", empty=" \n")
    with pytest.raises(InputError, match=r"empty: it is empty; expected a text: drop it"):
        read_texts([full, empty])
    pipe(monkeypatch, "")
    assert read_texts(None) == ""
    with pytest.raises(InputError, match="file stdin: it is empty"):
        read_texts([Path("-")])
    with pytest.raises(InputError, match="given twice"):
        read_texts([Path("-"), full, Path("-")])


def test_a_second_file_reaches_the_model(tmp_path: Path) -> None:
    a, b = write(tmp_path, a="import os\n" * 20 + "apple_river = 4821", b="import sys\n" * 20)
    done = farkv("run", "-f", str(a), "-f", str(b), "--max-new-tokens", "4", QUESTION)
    assert (done.returncode, done.stdout) == (0, "4821\n"), done.stderr


# --- documents ----------------------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html><html><head><title>no</title><style>p {}</style></head><body><script>no()</script>
<h1>Rivers</h1><p>An <b>apple</b>
   river.<br>Next &amp; last.</p><ul><li>one</li><li>two</li></ul>
<table><tr><td>a</td><td>b</td></tr></table><pre>def f():
    return 1
</pre><!-- no --></body></html>"""
SHOWN = "Rivers\n\nAn apple river.\nNext & last.\n\none\ntwo\n\na\tb\n\ndef f():\n    return 1\n"


def make_pdf(*pages: str) -> bytes:
    """Return a PDF of one line a page; an empty one has no text."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {5 + 2 * i} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    out, places = b"%PDF-1.4\n", []
    for i, body in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{i} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\n"
    )
    return out + f"{end}startxref\n{len(out)}\n%%EOF\n".encode()


def encrypt(data: bytes, password: str) -> bytes:
    pypdf = pytest.importorskip("pypdf")
    writer, out = pypdf.PdfWriter(pypdf.PdfReader(io.BytesIO(data))), io.BytesIO()
    writer.encrypt(password, "owner", algorithm="RC4-128")
    writer.write(out)
    return out.getvalue()


def put(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize(
    ("data", "suffix", "kind"),
    [
        (b"%PDF-1.7\n", "", "PDF"),
        (b"\n\n%PDF-1.7\n", ".txt", "PDF"),
        (b"words", ".PDF", "PDF"),
        (b"words", ".htm", "HTML"),
        (b"\xef\xbb\xbf <!-- x --> <!DOCTYPE html>", "", "HTML"),
        (b"<?xml version='1.0'?><html>", ".txt", "HTML"),
        (b"about <html>", ".txt", None),
        (b"<htmlish>", "", None),
        (b"%PDF", "", None),
    ],
)
def test_a_document_is_known_by_its_name_or_its_first_bytes(data: bytes, suffix: str, kind: str | None) -> None:
    assert find_kind(data, suffix) == kind


def test_html_is_read_as_it_is_shown_or_raw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bs4")
    path = put(tmp_path, "page", PAGE.encode())
    assert read_text(path, raw=True) == PAGE
    assert not caplog.records
    assert read_text(path) == SHOWN
    assert "read as HTML, its text without markup; --raw reads it as it is" in caplog.text
    latin = put(tmp_path, "latin.html", "<meta charset=latin-1><p>é</p>".encode("latin-1"))
    assert read_text(latin) == "é\n"
    with pytest.raises(InputError, match="this HTML has no text; or use --raw"):
        read_text(put(tmp_path, "none.html", b"<html><script>x</script></html>"))


def test_pages_of_a_pdf_are_read_one_after_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pypdf")
    assert read_text(put(tmp_path, "book.pdf", make_pdf("apple river", "stone cloud"))) == "apple river\nstone cloud\n"
    assert not caplog.records
    assert "apple" in read_text(put(tmp_path, "half.pdf", make_pdf("apple river", "")))
    assert "1 of 2 pages have no text" in caplog.text


def test_a_pdf_without_text_or_without_its_password_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    with pytest.raises(InputError, match="this PDF has no text; if its pages are pictures"):
        read_text(put(tmp_path, "scan.pdf", make_pdf("", "")))
    with pytest.raises(InputError, match=r"this PDF is encrypted; decrypt it first: qpdf --decrypt"):
        read_text(put(tmp_path, "locked.pdf", encrypt(make_pdf("apple river"), "secret")))
    assert read_text(put(tmp_path, "open.pdf", encrypt(make_pdf("apple river"), ""))) == "apple river\n"
    for damaged in (b"%PDF-1.4\nnonsense", make_pdf("apple")[:200], b"no PDF"):
        with pytest.raises(InputError, match="cannot be read as PDF"):
            read_text(put(tmp_path, "bad.pdf", damaged))


@pytest.mark.parametrize(("name", "data", "package"), [("a.pdf", make_pdf("x"), "pypdf"), ("a.html", b"<p>x", "bs4")])
def test_without_its_package_a_document_is_one_error(
    name: str, data: bytes, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    done = farkv("run", "--file", str(put(tmp_path, name, data)), "q")
    assert done.returncode == 2
    assert "pip install 'farkv[documents]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
