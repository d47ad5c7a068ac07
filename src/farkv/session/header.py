"""The header of a session file: what stands where, and what each part must hash to.

In: notes and the forms of tensors, or the first bytes of a file that nobody vouches for. Out: the bytes of a header,
or its checked content, or a SessionError. Knows JSON and sizes, not files. See docs/session-format.md.
"""

from __future__ import annotations

import json
import re
from hashlib import blake2b
from math import prod
from typing import Any, NamedTuple

import torch

from farkv.errors import SessionError

FORMAT = "farkv-session-2"
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
_OLD = {"farkv-session-1": ", which farkv 0.1 wrote"}
_MAX_DIMS = 8
_MAX_ELEMENTS = 2**60

_LETTERS = {
    **{getattr(torch, f"{kind}{n}"): f"{kind[0].upper()}{n}" for kind in ("uint", "int") for n in (8, 16, 32, 64)},
    **{torch.bool: "BOOL", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
DTYPES: dict[str, torch.dtype] = {letters: dtype for dtype, letters in _LETTERS.items()}


class TensorForm(NamedTuple):
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
    forms: dict[str, TensorForm]
    starts: dict[str, int]
    checks: dict[str, str]


def hash_bytes(data: bytes | memoryview) -> str:
    """Return the 32 hex digits (blake2b, 128 bits) that a part is checked by."""
    return blake2b(data, digest_size=16).hexdigest()


def make_header(notes: dict[str, Any], forms: dict[str, TensorForm], checks: dict[str, str]) -> bytes:
    """Return length and header, whose size does not depend on `checks`, or raise SessionError where one cannot be."""
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
    blank = raw[: _DIGEST.start] + b"0" * 32 + raw[_DIGEST.stop :]
    return blank[: _DIGEST.start] + hash_bytes(blank).encode("ascii") + blank[_DIGEST.stop :]


def parse_header(begin: bytes, file_bytes: int) -> Header:
    """Check length and header of a file of `file_bytes` bytes, of which `begin` is as much as they may take.

    A header is taken only if `make_header` writes the same bytes from what was read in it. So whatever parsers differ
    on is refused (a key twice, NaN, -0, half a letter), and every offset, order and space is checked.
    """
    n_bytes, least, most = int.from_bytes(begin[:8], "little"), _DIGEST.stop - 8, min(MAX_HEADER_BYTES, len(begin) - 8)
    if not least <= n_bytes <= most:
        raise SessionError(f"expected a header of {least} to {most:,} bytes, got {n_bytes:,} in {file_bytes:,}")
    raw = begin[: 8 + n_bytes]
    seen = _FORMAT_SEEN.search(raw[:ALIGN_BYTES])
    found = seen[1].decode("ascii", "replace") if seen else "another file"
    if raw[8 : _DIGEST.start] != _PREFIX or found != FORMAT:
        raise SessionError(f"expected format {FORMAT}, got {found}{_OLD.get(found, '')}")
    if raw != seal_header(raw):
        raise SessionError("the header is damaged: its digest does not match")
    try:
        head = json.loads(raw[8:])
        meta = head.pop("__metadata__")
        forms = {name: _read_form(name, entry["dtype"], entry["shape"]) for name, entry in head.items()}
        notes, checks = json.loads(meta["notes"]), json.loads(meta["checks"])
        same = make_header(notes, forms, checks) == raw and checks.keys() == forms.keys() - {PAGES}
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise SessionError(f"header and notes: expected what farkv can write ({str(error)[:300]})") from error
    if not same:
        raise SessionError("header and notes: expected them as farkv writes them, got others that say the same or more")
    pages, crc = forms.get(PAGES), forms.get(PAGE_CRC)
    if pages is None or pages.dtype != torch.uint8 or len(pages.shape) != 2 or pages.shape[1] == 0:
        raise SessionError(f"expected {PAGES}, U8 [n, bytes], got {pages}")
    if crc != TensorForm(torch.uint32, pages.shape[:1]):
        raise SessionError(f"expected one U32 of {PAGE_CRC} for each of {pages.shape[0]} pages, got {crc}")
    starts, at = dict[str, int](), len(raw)
    for name, form in forms.items():
        starts[name], at = at, at + form.n_bytes
    if at != file_bytes:
        raise SessionError(f"expected {at:,} bytes in all, got {file_bytes:,}: the file was cut or extended")
    return Header(notes, forms, starts, checks)


def _read_form(name: str, letters: Any, shape: Any) -> TensorForm:
    dtype = DTYPES.get(letters) if isinstance(letters, str) else None
    plain = isinstance(shape, list) and len(shape) <= _MAX_DIMS and all(type(n) is int and n >= 0 for n in shape)
    # A size of 0 hides what the others multiply to, and strides are made of them.
    if dtype is None or not plain or prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise SessionError(
            f"tensor {name!r:.99}: expected a shape that memory can hold, a dtype, got {shape!r:.99}, {letters!r:.20}"
        )
    return TensorForm(dtype, tuple(shape))


def _write_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _write_notes(notes: dict[str, Any]) -> str:
    try:
        text = _write_json(notes)
        same = isinstance(notes, dict) and json.loads(text) == notes
    except (TypeError, ValueError, RecursionError) as error:
        raise SessionError(f"notes: expected JSON values ({error}); convert them") from error
    if not same:
        raise SessionError("notes: expected JSON values, got some that come back changed (tuples, keys); convert them")
    return text
