"""The header of a session file: what stands where, and what each part must hash to.

In: notes and the forms of tensors, or the first bytes of a file that nobody vouches for. Out: the bytes of a header,
or its checked content, or a SessionError. Knows JSON and sizes; `store.saved` knows files. See docs/session-format.md.
"""

from __future__ import annotations

import json
import re
from hashlib import blake2b
from math import prod
from reprlib import repr as brief
from typing import Any, NamedTuple

import torch

from farkv.errors import SessionError

FORMAT = "farkv-session-1"
# Far above what a session needs. In memory JSON can become 30 times what it is in the file.
MAX_HEADER_BYTES = 2**20
# Data begins at a multiple of this, so that pages lie as a device and a page cache want them.
ALIGN_BYTES = 4096
# Names that the container itself uses.
PAGES, PAGE_CRC = "pages", "page_crc"

# The digest stands first, at a place known without parsing: a reader hashes before it parses.
_PREFIX = b'{"__metadata__":{"digest":"'
_DIGEST = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 32)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./:-]{0,199}")
_FORMAT_SEEN = re.compile(rb'"format":\s?"([\w.-]{1,64})"')
_MAX_DIMS = 8
_MAX_ELEMENTS = 2**60

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_LETTERS = {dtype: letters for letters, dtype in DTYPES.items()}


class Form(NamedTuple):
    """The form of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """A checked header: forms and starts (bytes from the file's begin) of all tensors, hashes of the small ones."""

    notes: dict[str, Any]
    forms: dict[str, Form]
    starts: dict[str, int]
    checks: dict[str, str]


def hash_bytes(data: bytes | memoryview) -> str:
    """Return the 32 hex digits (blake2b, 128 bits) that a part is checked by."""
    return blake2b(data, digest_size=16).hexdigest()


def make_header(notes: dict[str, Any], forms: dict[str, Form], checks: dict[str, str]) -> bytes:
    """Return length and header; its size does not depend on the hashes in `checks`.

    Raises:
        SessionError: a name, dtype or note cannot be written.
    """
    at, entries = 0, {}
    for name, form in forms.items():
        if not _NAME.fullmatch(name) or form.dtype not in _LETTERS or len(form.shape) > _MAX_DIMS:
            raise SessionError(
                f"tensor {name!r}, {form.dtype}, {len(form.shape)} axes: expected a name of letters, digits and _./:-, "
                f"a plain dtype and at most {_MAX_DIMS} axes; rename or convert it"
            )
        end = at + form.n_bytes
        entries[name] = {"dtype": _LETTERS[form.dtype], "shape": list(form.shape), "data_offsets": [at, end]}
        at = end
    meta = {"digest": "0" * 32, "format": FORMAT, "notes": _write_notes(notes), "checks": _write_json(checks)}
    text = _write_json({"__metadata__": meta} | entries).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGN_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise SessionError(
            f"notes and names: expected at most {MAX_HEADER_BYTES:,} bytes, got {len(text):,}; store them as a tensor"
        )
    return seal_header(len(text).to_bytes(8, "little") + text)


def seal_header(raw: bytes) -> bytes:
    """Put the digest of everything else into its place."""
    return raw[: _DIGEST.start] + _digest(raw) + raw[_DIGEST.stop :]


def check_length(first: bytes, file_bytes: int) -> int:
    """Return the bytes of length and header from a file's first 8 bytes.

    Raises:
        SessionError: they do not fit the file, or what a header may take.
    """
    n_bytes, least = int.from_bytes(first, "little"), _DIGEST.stop - 8
    most = min(MAX_HEADER_BYTES, file_bytes - 8)
    if len(first) < 8 or not least <= n_bytes <= most:
        raise SessionError(f"expected a header of {least} to {most:,} bytes, got {n_bytes:,} in {file_bytes:,}")
    return 8 + n_bytes


def parse_header(raw: bytes, file_bytes: int) -> Header:
    """Check length and header of a file of `file_bytes` bytes and return what they say.

    Raises:
        SessionError: it is no session, of another version, damaged or contradicts itself.
    """
    if raw[8 : _DIGEST.start] != _PREFIX:
        seen = _FORMAT_SEEN.search(raw[:ALIGN_BYTES])
        raise SessionError(f"expected format {FORMAT}, got {seen[1].decode('ascii') if seen else 'another file'}")
    if raw[_DIGEST] != _digest(raw):
        raise SessionError("the header is damaged: its digest does not match")
    head = _read_json(raw[8:].rstrip(b" ").decode("ascii", "replace"), "the header")
    meta = _expect_keys(head.pop("__metadata__"), {"digest", "format", "notes", "checks"}, "__metadata__")
    if meta["format"] != FORMAT:
        raise SessionError(f"expected format {FORMAT}, got {brief(meta['format'])}")
    forms, starts = _read_entries(head, len(raw), file_bytes)
    checks = _expect_keys(_read_json(meta["checks"], "checks"), set(forms) - {PAGES}, "checks")
    return Header(_read_json(meta["notes"], "notes"), forms, starts, checks)


def _digest(raw: bytes) -> bytes:
    return hash_bytes(raw[: _DIGEST.start] + b"0" * 32 + raw[_DIGEST.stop :]).encode("ascii")


def _read_entries(head: dict[str, Any], start: int, file_bytes: int) -> tuple[dict[str, Form], dict[str, int]]:
    """Return forms and starts; together the tensors are exactly the file behind its header, in order."""
    forms: dict[str, Form] = {}
    starts: dict[str, int] = {}
    at = start
    for name, entry in head.items():
        where = f"tensor {brief(name)}"
        _expect_keys(entry, {"dtype", "shape", "data_offsets"}, where)
        form = _read_form(entry["dtype"], entry["shape"], where)
        expected, offsets = [at - start, at - start + form.n_bytes], entry["data_offsets"]
        # A list of bools or floats may compare equal; only ints are taken.
        if not _are_ints(offsets) or offsets != expected or not _NAME.fullmatch(name):
            raise SessionError(f"{where}: expected a plain name and offsets {expected}, got {brief(offsets)}")
        forms[name], starts[name] = form, at
        at += form.n_bytes
    if at != file_bytes:
        raise SessionError(f"expected {at:,} bytes in all, got {file_bytes:,}: the file was cut or extended")
    pages, crc = forms.get(PAGES), forms.get(PAGE_CRC)
    if pages is None or crc is None or pages.dtype != torch.uint8 or len(pages.shape) != 2 or pages.shape[1] == 0:
        raise SessionError(f"expected {PAGES}, U8 [n, bytes], and {PAGE_CRC}, got {pages} and {crc}")
    if crc != Form(torch.uint32, pages.shape[:1]):
        raise SessionError(f"expected one U32 of {PAGE_CRC} for each of {pages.shape[0]} pages, got {crc}")
    return forms, starts


def _read_form(letters: Any, shape: Any, where: str) -> Form:
    if not isinstance(letters, str) or letters not in DTYPES:
        raise SessionError(f"{where}: expected a dtype of {', '.join(DTYPES)}, got {brief(letters)}")
    if not _are_ints(shape) or len(shape) > _MAX_DIMS or any(n < 0 for n in shape):
        raise SessionError(f"{where}: expected a shape of at most {_MAX_DIMS} sizes, got {brief(shape)}")
    # A size of 0 hides what the others multiply to, and strides are made of them.
    if prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise SessionError(f"{where}: expected a shape that memory can hold, got {brief(shape)}")
    return Form(DTYPES[letters], tuple(shape))


def _are_ints(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int for n in values)


def _expect_keys(found: Any, keys: set[str], where: str) -> dict[str, Any]:
    if not isinstance(found, dict) or found.keys() != keys:
        raise SessionError(f"{where}: expected exactly {', '.join(sorted(keys))}, got {brief(found)}")
    return found


def _write_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _write_notes(notes: dict[str, Any]) -> str:
    try:
        text = _write_json(notes)
        same = _read_json(text, "notes") == notes
    except (TypeError, ValueError, RecursionError) as error:
        raise SessionError(f"notes: expected JSON values ({error}); convert them") from error
    if not same:
        raise SessionError("notes: expected JSON values, got some that come back changed (tuples, keys); convert them")
    return text


def _read_json(text: Any, where: str) -> dict[str, Any]:
    """Parse an object that is written as we write it.

    Parsers differ on what else there is: a key twice, NaN, -0, half a letter. None of it comes back as it was.
    """
    try:
        found = json.loads(text)
        same = _write_json(found) == text
    except (TypeError, ValueError, RecursionError) as error:
        raise SessionError(f"{where}: expected JSON ({str(error)[:200]})") from error
    if not same or not isinstance(found, dict):
        raise SessionError(f"{where}: expected an object in its plainest JSON, got {brief(text)}")
    return found
