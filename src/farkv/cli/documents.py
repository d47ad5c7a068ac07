"""The text of a PDF or HTML document, by pypdf or Beautiful Soup. In: bytes. Out: text, or why there is none.

Both are in the extra `documents`. Whatever is wrong with a file that others wrote is one error of ours.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from importlib import import_module
from typing import Any

from farkv.cli.terminal import err
from farkv.errors import FarKVError, InputError
from farkv.show import show_progress

log = logging.getLogger("farkv")

SUFFIXES = {".pdf": "PDF", ".html": "HTML", ".htm": "HTML", ".xhtml": "HTML"}
# A PDF begins in its first kilobyte; HTML after blanks, comments or a line about its encoding.
PDF_STARTS = re.compile(rb"%PDF-\d")
HTML_STARTS = re.compile(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html)\b", re.I | re.S)
PACKAGES = {"PDF": "pypdf", "HTML": "bs4"}
# Elements that are no text, those that end a line, and those that stand apart.
UNSEEN = ["head", "script", "style", "template", "noscript"]
LINES = "caption dd dt li tr".split()
BLOCKS = (
    "address article aside blockquote body details dialog div dl fieldset figcaption figure footer form h1 h2 h3 h4 h5 "
    "h6 header hr main nav ol p pre section summary table ul"
).split()


def find_kind(data: bytes, suffix: str) -> str | None:
    """Return `PDF` or `HTML` where a file's name or its first bytes say so."""
    if PDF_STARTS.search(data, 0, 1024):
        return "PDF"
    return SUFFIXES.get(suffix.lower()) or ("HTML" if HTML_STARTS.match(data, 0, 4096) else None)


def read_document(kind: str, data: bytes, name: str, *, quiet: bool) -> str:
    """Return a document's text.

    Args:
        name: of the file, as it is shown.
        quiet: show no progress.

    Raises:
        InputError: a package is missing, or the document is damaged, encrypted or has no text.
    """
    try:
        package = import_module(PACKAGES[kind])
    except ImportError as error:
        also = ", or read its markup as it is: --raw" if kind == "HTML" else ""
        raise InputError(
            f"file {name}: {kind} needs the package {PACKAGES[kind]} ({error}); install it: "
            f"pip install 'farkv[documents]'{also}"
        ) from error
    try:
        text = read_pdf(package, data, name, quiet=quiet) if kind == "PDF" else read_html(package, data)
    except (FarKVError, MemoryError):
        raise
    # Of a damaged file a parser may raise anything.
    except Exception as error:
        raise InputError(f"file {name}: cannot be read as {kind} ({type(error).__name__}: {error})") from error
    # Fonts without names of their letters give NUL and halves of pairs.
    text = text.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not text.strip():
        remedy = "if its pages are pictures, recognise their text first: ocrmypdf" if kind == "PDF" else "or use --raw"
        raise InputError(f"file {name}: this {kind} has no text; {remedy}")
    if kind == "HTML":
        log.warning("file %s: read as HTML, its text without markup; --raw reads it as it is", name)
    return text


def read_pdf(pypdf: Any, data: bytes, name: str, *, quiet: bool) -> str:
    """Return the text of all pages, one after another."""
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    locked = f"file {name}: this PDF is encrypted; decrypt it first: qpdf --decrypt"
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        # Many are encrypted with no password: they forbid printing, not reading.
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError(locked)
        total, texts = len(reader.pages), list[str]()
        with show_progress(err, "pages", quiet=quiet) as tell:
            tell(0, total)
            for page in reader.pages:
                texts.append(page.extract_text())
                tell(len(texts), total)
    except pypdf.errors.DependencyError as error:
        raise InputError(locked) from error
    blank = sum(not text.strip() for text in texts)
    if 0 < blank < total:
        log.warning("file %s: %d of %d pages have no text; pictures are not read", name, blank, total)
    return "\n".join(texts) + "\n"


def read_html(bs4: Any, data: bytes) -> str:
    """Return what a page says: its blocks as lines, blanks as a browser shows them."""
    logging.getLogger("bs4").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = bs4.BeautifulSoup(data, "html.parser")
    for tag in page(UNSEEN):
        tag.decompose()
    for string in page.find_all(string=True):
        if type(string) is bs4.NavigableString and string.find_parent("pre") is None:
            string.replace_with(re.sub(r"\s+", " ", string))
    for tag in page("br"):
        tag.replace_with("\n")
    for tag in page(["td", "th"]):
        tag.append("\t")
    for tag in page(BLOCKS):
        tag.insert(0, "\n")
    for tag in page(BLOCKS + LINES):
        tag.append("\n")
    text = re.sub(r"[ \t]+\n", "\n", page.get_text())
    text = re.sub(r"\n (?! )", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"
