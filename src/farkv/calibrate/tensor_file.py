"""Named tensors and metadata as one safetensors file with a digest of itself.

In: tensors and texts, or the bytes of a file that nobody vouches for. Out: the bytes, or the same checked. Any tool
that reads safetensors can look into it. docs/decisions/0015-profiles-carry-a-digest.md says why.
"""

from __future__ import annotations

import re
from hashlib import blake2b

from safetensors import SafetensorError
from safetensors.torch import load, save

from farkv._axes import Tensor
from farkv.untrusted import parse_json

# Of 100 layers and their notes it takes a twentieth.
MAX_HEADER_BYTES = 4 * 2**20
_BLANK = b"0" * 32
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{32})"')


def pack_tensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the file's bytes; `digest` among its metadata is the hash of all others."""
    raw = save(tensors, {**metadata, "digest": _BLANK.decode()})
    start, stop = _find_digest(raw)
    return raw[:start] + hash_around(raw, start, stop) + raw[stop:]


def unpack_tensors(raw: bytes, expected_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of `pack_tensors`.

    Raises:
        ValueError: it is another file, or not one byte for byte as it was written.
    """
    n_bytes = int.from_bytes(raw[:8], "little")
    if not 2 <= n_bytes <= min(MAX_HEADER_BYTES, len(raw) - 8):
        raise ValueError(f"expected a header of at most {MAX_HEADER_BYTES:,} bytes, got {n_bytes:,} in {len(raw):,}")
    head = parse_json(raw[8 : 8 + n_bytes])
    metadata = head.get("__metadata__") if isinstance(head, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != expected_format:
        found = metadata.get("format") if isinstance(metadata, dict) else None
        raise ValueError(f"expected format {expected_format}, got {str(found)[:60]!r}")
    start, stop = _find_digest(raw)
    if hash_around(raw, start, stop) != raw[start:stop]:
        raise ValueError("its digest does not match: the file was damaged or changed since it was measured")
    try:
        return load(raw), metadata
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected tensors as farkv writes them ({str(error)[:200]})") from error


def hash_around(raw: bytes, start: int, stop: int) -> bytes:
    """Return the digest's 32 hex digits: blake2b, 128 bits, of all bytes with zeros in the digest's own place."""
    digest = blake2b(raw[:start] + _BLANK, digest_size=16)
    digest.update(memoryview(raw)[stop:])
    return digest.hexdigest().encode("ascii")


def _find_digest(raw: bytes) -> tuple[int, int]:
    """Return where the digest stands in the header."""
    found = list(_DIGEST.finditer(raw, 8, 8 + int.from_bytes(raw[:8], "little")))
    if len(found) != 1:
        raise ValueError(f"expected one digest, got {len(found)}")
    return found[0].span(1)
