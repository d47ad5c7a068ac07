"""Headers: what contradicts itself is refused even where its digest is right, and never with another error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from farkv.errors import SessionError, StoreError
from farkv.session.file import Saved, write_saved
from farkv.session.header import ALIGN_BYTES, DTYPES, FORMAT, MAX_HEADER_BYTES, TensorForm, make_header, seal_header
from tests.session.test_file import read_all, write


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.farkv"
    write(path, ids=torch.arange(4, dtype=torch.int32), flags=torch.tensor([True, False]), none=torch.empty(0, 2))
    return path


def forge(path: Path, old: str, new: str) -> None:
    """Change a header's text and seal it again, as someone who knows the format would."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = raw[8:end].rstrip().decode()
    assert text.count(old) == 1
    put_header(path, text.replace(old, new), raw[end:])


def put_header(path: Path, text: str, data: bytes) -> None:
    head = text.encode()
    # As a writer pads it: what is wrong shall be the text alone.
    head += b" " * (-(8 + len(head)) % ALIGN_BYTES)
    path.write_bytes(seal_header(len(head).to_bytes(8, "little") + head) + data)


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def test_a_newer_version_is_named(tiny: Path) -> None:
    forge(tiny, FORMAT, "farkv-session-3")
    with pytest.raises(
        SessionError, match="expected format farkv-session-2, got farkv-session-3; save the session anew"
    ):
        Saved.open(tiny)


def test_an_older_version_says_who_wrote_it_and_what_to_do(tiny: Path) -> None:
    forge(tiny, FORMAT, "farkv-session-1")
    with pytest.raises(SessionError, match=r"got farkv-session-1, which farkv 0\.1 wrote; save the session anew"):
        Saved.open(tiny)


def test_a_header_that_says_the_same_is_taken_and_one_without_its_padding_is_not(tiny: Path) -> None:
    whole, content = tiny.read_bytes(), read_all(tiny)
    forge(tiny, IDS, IDS)
    assert tiny.read_bytes() == whole
    assert read_all(tiny) == content
    end = 8 + int.from_bytes(whole[:8], "little")
    for head in (whole[8:end].rstrip(), whole[8:end] + b" ", whole[8:end] + b" " * ALIGN_BYTES):
        tiny.write_bytes(seal_header(len(head).to_bytes(8, "little") + head) + whole[end:])
        with pytest.raises(SessionError, match="as farkv writes them"):
            Saved.open(tiny)


IDS = '"ids":{"dtype":"I32","shape":[4],"data_offsets":[240,256]}'
FORGED = {
    "dtype": (IDS, IDS.replace("I32", "V128")),
    "a dtype that is no text": (IDS, IDS.replace('"I32"', "[]")),
    "a wider dtype": (IDS, IDS.replace("I32", "I64")),
    "shape": (IDS, IDS.replace("[4]", "[5]")),
    "a negative size": (IDS, IDS.replace("[4]", "[-4]")),
    "two negative sizes": (IDS, IDS.replace("[4]", "[-2,-2]")),
    "a float size": (IDS, IDS.replace("[4]", "[4.0]")),
    "a bool size": (IDS, IDS.replace("[4]", "[4,true]")),
    "a huge size": (IDS, IDS.replace("[4]", "[4,9223372036854775808]")),
    "a huge size beside nothing": ("[0,2]", "[0,9223372036854775807]"),
    "huge sizes beside nothing": ("[0,2]", "[0,1073741824,1073741824,4]"),
    "many sizes": (IDS, IDS.replace("[4]", f"[4{',1' * 8}]")),
    "sizes in sizes": (IDS, IDS.replace("[4]", "[" * 400 + "]" * 400)),
    "more digits than are taken": (IDS, IDS.replace("[4]", f"[{'9' * 5000}]")),
    "shape that is none": (IDS, IDS.replace("[4]", "4")),
    "negative offsets": (IDS, IDS.replace("240", "-240")),
    "offsets over another": (IDS, IDS.replace("[240,256]", "[0,16]")),
    "offsets with a gap": (IDS, IDS.replace("[240,256]", "[241,257]")),
    "offsets in floats": (IDS, IDS.replace("240", "240.0")),
    "a zero below zero": ('"shape":[0,2]', '"shape":[-0,2]'),
    "a space": (IDS, IDS.replace(":", ": ")),
    "one offset": (IDS, IDS.replace("240,", "")),
    "a key too many": (IDS, IDS.replace("{", '{"x":1,')),
    "a key too few": (IDS, IDS.replace('"dtype":"I32",', "")),
    "an entry that is none": (IDS, '"ids":null'),
    "a name twice": (IDS, f"{IDS},{IDS}"),
    "a name that is a path": ('"ids"', '"../ids"'),
    "a name with half a letter": ('"ids"', r'"\ud800"'),
    "a tensor without its hash": ('"ids":{', '"idz":{'),
    "pages of another dtype": ('{"dtype":"U8","shape":[5,48]', '{"dtype":"I8","shape":[5,48]'),
    "pages with other axes": ('"shape":[5,48]', '"shape":[240]'),
    "other pages than checksums": ('"shape":[5,48]', '"shape":[10,24]'),
    "no pages": ('"pages":{', '"papers":{'),
    "no checksums": ('"page_crc":{', '"page_cry":{'),
    "metadata that is no text": (f'"format":"{FORMAT}"', '"format":[1]'),
    "one more in the metadata": (f'"format":"{FORMAT}"', f'"format":"{FORMAT}","x":"1"'),
    "broken notes": ('"notes":"{', '"notes":"{{'),
    "notes without end": ('"notes":"{', '"notes":"' + '{\\"a\\":' * 5000),
    "not a number": ('\\"list\\":[1', '\\"list\\":[NaN'),
    "half a letter in the notes": ('\\"who\\"', '\\"w\\ud800ho\\"'),
    "a note twice": ('\\"in\\":', '\\"who\\":'),
    "no end": ('"ids":{', '"ids":' + "[" * 100_000),
    "letters beyond ASCII": ('"ids"', '"ïds"'),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_contradicts_itself_is_refused_even_with_a_right_digest(tiny: Path, what: str) -> None:
    forge(tiny, *FORGED[what])
    with pytest.raises(SessionError, match=r"tiny\.farkv: ") as raised:
        Saved.open(tiny)
    assert len(str(raised.value)) < 1000
    str(raised.value).encode()


def test_forged_bools_and_headers_larger_than_the_file_are_refused(tiny: Path, tmp_path: Path) -> None:
    for n_bytes in (2**63, 2**64 - 1, MAX_HEADER_BYTES, 5, 0):
        (tmp_path / "a").write_bytes(n_bytes.to_bytes(8, "little") + tiny.read_bytes()[8:])
        with pytest.raises(SessionError, match="expected a header of"):
            Saved.open(tmp_path / "a")
    write(tiny, flags=torch.tensor([7, 0], dtype=torch.uint8))
    forge(tiny, '"flags":{"dtype":"U8"', '"flags":{"dtype":"BOOL"')
    with pytest.raises(SessionError, match="bools of 0 and 1"):
        Saved.open(tiny).tensor("flags")


def test_pages_have_bytes_and_notes_are_an_object_in_text(tmp_path: Path) -> None:
    for old, new in (("[0,64]", "[0,0]"), ('"{}"', "7"), ('"{}"', "{}"), ('"{}"', '"[]"'), ('"{}"', '""')):
        write_saved(tmp_path / "a", {}, {}, [], 0, 64)
        forge(tmp_path / "a", old, new)
        with pytest.raises(SessionError, match=r"notes: expected|expected pages, U8"):
            Saved.open(tmp_path / "a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(DTYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.integers(0))
def test_any_value_anywhere_in_a_sealed_header_is_refused_or_read_as_others_read_it(
    tmp_path_factory: pytest.TempPathFactory, value: Any, place: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a"
    write(path, ids=torch.arange(4), none=torch.empty(0, 3))
    raw, head = path.read_bytes(), header_of(path)
    end = 8 + int.from_bytes(raw[:8], "little")
    spots: list[tuple[Any, Any]] = []

    def collect(at: Any) -> None:
        for key in at.keys() if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ():
            spots.append((at, key))
            collect(at[key])

    collect(head)
    where, key = spots[place % len(spots)]
    where[key] = value
    put_header(path, json.dumps(head, separators=(",", ":")), raw[end:])
    try:
        notes, named, pages = read_all(path)
    except (SessionError, StoreError):
        return
    with safe_open(str(path), framework="pt") as file:
        assert notes == json.loads(file.metadata()["notes"])
        assert pages == file.get_tensor("pages").tolist()
        for name, dtype, shape, values in named:
            other = file.get_tensor(name)
            assert (dtype, shape, values) == (other.dtype, tuple(other.shape), other.tolist())


def test_the_header_size_does_not_depend_on_hashes() -> None:
    forms = {"a": TensorForm(torch.int8, (3,))}
    sizes = {len(make_header({}, forms, {"a": digit * 32})) for digit in "0f"}
    assert sizes == {4096}
    assert re.match(rb'.{8}\{"__metadata__":\{"digest":"[0-9a-f]{32}","format"', make_header({}, forms, {}), re.S)
