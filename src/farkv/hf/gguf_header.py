"""What the head of a GGUF file says: whose weights it holds, how each is stored, and whether all of them are there.

In: a file that anybody may have written. Out: a `GgufHeader`, or one reason why the file is refused: transformers
reads a damaged one far enough to fail somewhere in numpy, or fills what is missing with random numbers.
Layout, little-endian:

    "GGUF"  version u32  tensors u64  fields u64
    per field    name  type u32  value; an array: type u32, count u64, values
    per tensor   name  dimensions u32  size of each u64  type u32  offset u64
    padding to the alignment, then the tensors' bytes

A name is its length u64 and UTF-8.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from math import prod
from typing import Any, BinaryIO, NamedTuple

from farkv.files import open_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_TEXT, _ARRAY = 8, 9
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Arrays in arrays, and dimensions: no file has more.
_DEEPEST = 4
_MOST_DIMENSIONS = 8


class GgufHeader(NamedTuple):
    """The fields that are single values, and each tensor's name, type number and elements; `n_bytes` of the file."""

    fields: dict[str, Any]
    tensors: dict[str, tuple[int, int]]
    n_bytes: int

    @property
    def architecture(self) -> str:
        """Return the model's family, in llama.cpp's words."""
        return str(self.fields.get("general.architecture", "unnamed"))

    def describe_types(self) -> str:
        """Return the names of the tensors' types, that of most weights first: `Q4_1, Q8_0, F32`."""
        from gguf import GGMLQuantizationType

        elements = Counter[int]()
        for kind, n in self.tensors.values():
            elements[kind] += n
        return ", ".join(GGMLQuantizationType(kind).name for kind, _ in elements.most_common())

    @property
    def is_quantised(self) -> bool:
        """Return whether any tensor is stored in blocks of codes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        return any(GGML_QUANT_SIZES[GGMLQuantizationType(kind)][0] > 1 for kind, _ in self.tensors.values())


class _Cursor:
    """Reads values one after another; whatever would lie behind the file's end is refused before it is read."""

    def __init__(self, file: BinaryIO):
        self.file, self.size = file, os.fstat(file.fileno()).st_size

    def left(self) -> int:
        return self.size - self.file.tell()

    def check(self, n_bytes: int) -> None:
        if n_bytes > self.left():
            raise ValueError(f"it ends after {self.size:,} bytes, in the middle of its header: it is cut or damaged")

    def numbers(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{form}")
        self.check(size)
        return struct.unpack(f"<{form}", self.file.read(size))

    def number(self, form: str) -> Any:
        return self.numbers(form)[0]

    def text(self) -> str:
        n = self.number("Q")
        self.check(n)
        return self.file.read(n).decode("utf-8", "replace")

    def skip(self, n_bytes: int) -> None:
        self.check(n_bytes)
        self.file.seek(n_bytes, os.SEEK_CUR)

    def value(self, kind: int) -> Any:
        """Return a field's value; None for an array, which is skipped."""
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self.skip_array(_DEEPEST)
        return self.number(find_form(kind))

    def skip_array(self, deepest: int) -> None:
        kind, count = self.numbers("IQ")
        if kind not in (_TEXT, _ARRAY):
            self.skip(count * struct.calcsize(f"<{find_form(kind)}"))
            return
        self.check(8 * count)
        for _ in range(count):
            if kind == _TEXT:
                self.skip(self.number("Q"))
            elif deepest:
                self.skip_array(deepest - 1)
            else:
                raise ValueError("its header has arrays in arrays in arrays: it is damaged")


def find_form(kind: int) -> str:
    """Return how numbers of a field's type are written."""
    if kind not in _FORMS:
        raise ValueError(f"its header has a field of type {kind}, which there is not: it is damaged")
    return _FORMS[kind]


def read_header(path: str) -> GgufHeader:
    """Read a file's head, and check that all its tensors are in it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none that can be read, in words.
    Cost: a walk over the vocabulary, some tenths of a second.
    """
    with open(open_file(path), "rb") as file:
        magic = file.read(4)
        if magic != MAGIC:
            raise ValueError(f"it begins with {magic!r}, not with {MAGIC!r}: it is no GGUF file")
        cursor = _Cursor(file)
        version, n_tensors, n_fields = cursor.numbers("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"it is of GGUF version {version}, expected {' or '.join(map(str, VERSIONS))}")
        # The least that a field and a tensor take.
        cursor.check(13 * n_fields + 24 * n_tensors)
        fields = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(n_fields)}
        tensors, end = read_tensors(cursor, n_tensors, fields.get("general.alignment", 32))
    if end > cursor.size:
        raise ValueError(f"it has {cursor.size:,} bytes, its tensors need {end:,}: it is cut; download it again")
    return GgufHeader(fields, tensors, cursor.size)


def read_tensors(cursor: _Cursor, count: int, alignment: Any) -> tuple[dict[str, tuple[int, int]], int]:
    """Return every tensor's type number and elements by its name, and where the last one ends in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its tensors are aligned to {alignment!r}, expected a number of bytes: it is damaged")
    tensors: dict[str, tuple[int, int]] = {}
    last = 0
    for _ in range(count):
        name, n_dimensions = cursor.text(), cursor.number("I")
        if n_dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"its tensor {name!r} has {n_dimensions} dimensions: it is damaged")
        n = prod(cursor.numbers(f"{n_dimensions}Q"))
        kind, offset = cursor.numbers("IQ")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise ValueError(f"its tensor {name!r} is of type {kind}, which this release of gguf lacks") from error
        tensors[name] = kind, n
        last = max(last, offset + n // block * block_bytes)
    start = -(-cursor.file.tell() // alignment) * alignment
    return tensors, start + last
