"""PG-19: whole books; a model prefills a passage of one and is then fed what follows, token by token.

In: a folder of .txt books, or JSON lines with a field text. Out: samples `pg19` with a continuation and no turns. A
passage begins at a random paragraph; books shorter than text and continuation together are skipped.

Source of the format: github.com/google-deepmind/pg19 (one .txt per book in train, validation and test); the hub's
emozilla/pg19-test has the fields short_book_title, publication_date, url, text, in parquet files that we do not read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from farkv.errors import InputError
from farkv.evals.public.choose import Wanted
from farkv.evals.public.read import find_files, read_records, read_text
from farkv.evals.sample import Sample
from farkv.evals.text import CONTINUATION

# Assumed maximum characters per token when a passage is cut out before tokenising; if too few, the whole book is used.
WIDE = 8


class Book(NamedTuple):
    """One book and the file it is from."""

    number: int
    source: str
    text: str


def load(path: str, wanted: Wanted) -> Iterator[Sample]:
    """Read passages of books."""
    books = list(read_books(find_files(path, ".txt", ".jsonl", ".json")))
    return make_samples(books, path, wanted)


def read_books(files: list[Path]) -> Iterator[Book]:
    """Yield every book of the files."""
    texts: list[tuple[str, str]] = []
    for file in files:
        if file.suffix == ".txt":
            texts.append((str(file), read_text(file)))
        else:
            texts += [(record.place, record.text("text")) for record in read_records(file)]
    yield from (Book(i, source, text) for i, (source, text) in enumerate(texts))


def make_samples(books: list[Book], path: str, wanted: Wanted) -> Iterator[Sample]:
    """Yield one passage per book and length, up to the limit of each length."""
    order = list(books)
    random.Random(wanted.seed).shuffle(order)
    n_found = 0
    for length in wanted.lengths:
        found: list[Sample] = []
        for book in order:
            if wanted.limit is not None and len(found) >= wanted.limit:
                break
            sample = cut_passage(book, length, wanted)
            found += [sample] if sample else []
        n_found += len(found)
        yield from sorted(found, key=lambda s: s.seed)
    if not n_found:
        raise InputError(
            f"{path}: expected books of at least {min(wanted.lengths) + CONTINUATION} tokens; {len(books)} books are "
            "all shorter. Use a smaller --lengths"
        )


def cut_passage(book: Book, length: int, wanted: Wanted) -> Sample | None:
    """Return `length` tokens of a book with the continuation; None if the book is too short."""
    total = length + CONTINUATION
    rng = random.Random(f"{wanted.seed}/{book.number}/{length}")
    drawn = max(0, book.text.find("\n\n", rng.randint(0, max(0, len(book.text) - WIDE * total))))
    for start, stop in ((drawn, drawn + WIDE * total), (0, len(book.text))):
        text = book.text[start:stop]
        ends = wanted.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(ends) > total:
            cut, end = ends[length - 1][1], ends[total - 1][1]
            meta = {"source": book.source, "starts_at": str(start)}
            return Sample("pg19", length, book.number, text[:cut], (), continuation=text[cut:end], meta=meta)
    return None
