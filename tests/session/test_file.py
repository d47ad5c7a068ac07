"""The session file: what is written is read, whole or not at all, and nothing damaged, cut or forged is believed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from farkv.errors import SessionError, StoreError
from farkv.session.file import Saved, write_saved
from farkv.session.header import DTYPES, FORMAT, MAX_HEADER_BYTES

NOTES: dict[str, Any] = {"who": "tiny ☺ \udc80", "list": [1, 2.5, None, True], "in": {"a": {}}}
N_PAGES, PAGE_BYTES = 5, 48


def make_pages() -> torch.Tensor:
    return torch.arange(N_PAGES * PAGE_BYTES, dtype=torch.int64).mul(7).remainder(251).to(torch.uint8).view(N_PAGES, -1)


def make_tensors() -> dict[str, torch.Tensor]:
    made = {name.lower(): torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    return made | {"none": torch.empty(0, 3), "one": torch.tensor(2.5), "turned": torch.arange(6.0).view(2, 3).T}


def write(path: Path, notes: dict[str, Any] = NOTES, **tensors: torch.Tensor) -> None:
    pages = make_pages()
    write_saved(path, notes, tensors, iter([pages[:2], pages[2:2], pages[2:]]), N_PAGES, PAGE_BYTES)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.farkv"
    write(path, ids=torch.arange(4, dtype=torch.int32), flags=torch.tensor([True, False]), none=torch.empty(0, 2))
    return path


def read_all(path: Path) -> tuple[Any, ...]:
    """Return all that is in a session, comparable with ==."""
    saved = Saved.open(path)
    try:
        pages = torch.empty(saved.n_pages, saved.page_bytes, dtype=torch.uint8)
        saved.reader.read(torch.arange(saved.n_pages), pages)
        named = [(n, t.dtype, tuple(t.shape), t.tolist()) for n in saved.names for t in [saved.tensor(n)]]
        return saved.notes, named, pages.tolist()
    finally:
        saved.close()


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.farkv", make_tensors()
    write(path, **tensors)
    write(path, **tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["a.farkv"]
    # It holds somebody's text.
    assert path.stat().st_mode & 0o777 == 0o600
    saved = Saved.open(path)
    assert (saved.notes, saved.n_pages, saved.page_bytes) == (NOTES, N_PAGES, PAGE_BYTES)
    assert saved.names == list(tensors)
    for name, tensor in tensors.items():
        got = saved.tensor(name)
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got.double(), tensor.double())
    ids = torch.tensor([4, 0, 0, 3])
    out = torch.empty(4, PAGE_BYTES // 2, dtype=torch.bfloat16)
    saved.reader.read(ids, out)
    assert torch.equal(out.view(torch.uint8), make_pages()[ids])
    saved.close()
    saved.close()
    with pytest.raises(SessionError, match="a closed file"):
        saved.tensor("one")


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = make_tensors()
    write(tmp_path / "a", **tensors)
    with safe_open(str(tmp_path / "a"), framework="pt") as file:
        assert set(file.keys()) == {*tensors, "pages", "page_crc"}
        assert torch.equal(file.get_tensor("pages"), make_pages())
        for name, tensor in tensors.items():
            got = file.get_tensor(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got.double(), tensor.double())
        metadata = file.metadata()
    assert metadata["format"] == FORMAT
    assert json.loads(metadata["notes"]) == NOTES


def test_nothing_at_all_is_a_session_too(tmp_path: Path) -> None:
    write_saved(tmp_path / "a", {}, {}, [], 0, 64)
    assert read_all(tmp_path / "a") == ({}, [], [])
    with safe_open(str(tmp_path / "a"), framework="pt") as file:
        assert file.get_tensor("pages").shape == (0, 64)


def test_the_reader_alone_keeps_the_file_open(tiny: Path) -> None:
    reader = Saved.open(tiny).reader
    out = torch.empty(1, PAGE_BYTES, dtype=torch.uint8)
    reader.read(torch.tensor([1]), out)
    assert torch.equal(out[0], make_pages()[1])
    os.fstat(reader.fd)
    fd = reader.fd
    del reader
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_damaged_pages_are_found_when_they_are_read_and_others_are_read(tiny: Path) -> None:
    saved = Saved.open(tiny)
    start = 8 + int.from_bytes(tiny.read_bytes()[:8], "little")
    assert start % 4096 == 0
    out = torch.empty(1, PAGE_BYTES, dtype=torch.uint8)
    # The file is changed under an open session, and opened once more with the damage in it.
    with tiny.open("r+b") as file:
        for at in range(0, N_PAGES * PAGE_BYTES, 7):
            page = at // PAGE_BYTES
            before = os.pread(file.fileno(), 1, start + at)
            os.pwrite(file.fileno(), bytes([before[0] ^ (1 << at % 8)]), start + at)
            again = Saved.open(tiny)
            for session in (saved, again):
                with pytest.raises(StoreError, match=rf"tiny\.farkv: page {page} is damaged"):
                    session.reader.read(torch.tensor([page]), out)
                other = (page + 1) % N_PAGES
                session.reader.read(torch.tensor([other]), out)
                assert torch.equal(out[0], make_pages()[other])
                assert session.tensor("ids").tolist() == [0, 1, 2, 3]
            again.close()
            os.pwrite(file.fileno(), before, start + at)
    saved.close()


def test_every_changed_byte_of_header_and_small_tensors_is_noticed(tiny: Path) -> None:
    whole, expected = tiny.read_bytes(), read_all(tiny)
    start = 8 + int.from_bytes(whole[:8], "little")
    with tiny.open("r+b") as file:
        for at in [*range(start), *range(start + N_PAGES * PAGE_BYTES, len(whole))]:
            os.pwrite(file.fileno(), bytes([whole[at] ^ (1 << at % 8)]), at)
            with pytest.raises(SessionError, match=r"session .*tiny\.farkv: .*; save the session anew"):
                read_all(tiny)
            os.pwrite(file.fileno(), whole[at : at + 1], at)
    assert read_all(tiny) == expected


def test_every_cut_and_what_is_appended_is_noticed(tiny: Path) -> None:
    whole = tiny.read_bytes()
    for data in (whole + b"\0", whole + whole):
        tiny.write_bytes(data)
        with pytest.raises(SessionError, match="cut or extended"):
            Saved.open(tiny)
    tiny.write_bytes(whole)
    for n_bytes in reversed(range(len(whole))):
        os.truncate(tiny, n_bytes)
        with pytest.raises(SessionError, match=r"tiny\.farkv: expected"):
            Saved.open(tiny)


def test_a_file_that_is_cut_after_it_was_opened_is_noticed(tiny: Path) -> None:
    saved = Saved.open(tiny)
    os.truncate(tiny, 4200)
    with pytest.raises(SessionError, match="the file was cut"):
        saved.tensor("ids")
    with pytest.raises(StoreError, match="cut off"):
        saved.reader.read(torch.tensor([4]), torch.empty(1, PAGE_BYTES, dtype=torch.uint8))
    saved.close()


def test_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other"
    save_file({"a": torch.zeros(80)}, path, metadata={"format": "farkv-profile-1"})
    with pytest.raises(SessionError, match=f"expected format {FORMAT}, got farkv-profile-1"):
        Saved.open(path)
    path.write_bytes(b"hello" * 100)
    with pytest.raises(SessionError, match="expected a header of"):
        Saved.open(path)
    with pytest.raises(SessionError, match="there is none"):
        Saved.open(tmp_path / "missing")
    with pytest.raises(SessionError, match="there is none"):
        Saved.open(path / "below")
    with pytest.raises(SessionError, match="is a folder, expected a file"):
        Saved.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SessionError, match="is a pipe, expected a file"):
        Saved.open(tmp_path / "pipe")
    with pytest.raises(SessionError, match="is a device, expected a file"):
        Saved.open(Path("/dev/zero"))
    for name in ("a\0b", "\ud800"):
        with pytest.raises(SessionError, match="no file has such a name"):
            Saved.open(tmp_path / name)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StoreError, match="cannot be read"):
        Saved.open(tmp_path / "loop")


def test_what_cannot_be_written_is_refused_and_nothing_changes(tiny: Path) -> None:
    before = tiny.read_bytes()
    page = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
    tries: list[tuple[str, dict[str, Any], dict[str, torch.Tensor], list[torch.Tensor], int]] = [
        ("expected 3 pages, got 2", {}, {}, [page, page], 3),
        ("expected 1 pages of 48 bytes, got 48 bytes after 1", {}, {}, [page, page], 1),
        ("expected 1 pages of 48 bytes, got 47 bytes after 0", {}, {}, [page[1:]], 1),
        ("expected names other than", {}, {"pages": page}, [], 0),
        ("pages of at least a byte", {}, {}, [], -1),
        ("expected a name of letters", {}, {"a b": page}, [], 0),
        ("a plain dtype", {}, {"a": torch.zeros(1, dtype=torch.complex64)}, [], 0),
        ("expected JSON values", {"a": torch}, {}, [], 0),
        ("come back changed", {"a": (1, 2)}, {}, [], 0),
        ("expected JSON values", {"a": float("nan")}, {}, [], 0),
        ("expected at most", {"a": "x" * MAX_HEADER_BYTES}, {}, [], 0),
        ("a shape that memory can hold", {}, {}, [], 2**60),
    ]
    for match, notes, tensors, pages, n_pages in tries:
        with pytest.raises(SessionError, match=match):
            write_saved(tiny, notes, tensors, pages, n_pages, PAGE_BYTES)
    with pytest.raises(StoreError, match=r"in a folder that can be written, with room for 4,096 bytes"):
        write_saved(tiny.parent / "no" / "folder", {}, {}, [], 0, 1)
    with pytest.raises(StoreError, match="cannot be written"):
        write_saved(tiny.parent, {}, {}, [], 0, 1)
    assert [p.name for p in tiny.parent.iterdir()] == [tiny.name]
    assert tiny.read_bytes() == before


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), StoreError("page 7 is damaged"), OSError("x")])
def test_an_error_of_whoever_gives_the_pages_passes_and_nothing_changes(tiny: Path, error: BaseException) -> None:
    before = tiny.read_bytes()

    def pages() -> Iterator[torch.Tensor]:
        yield make_pages()[:2]
        raise error

    with pytest.raises(type(error)) as raised:
        write_saved(tiny, {}, {}, pages(), N_PAGES, PAGE_BYTES)
    assert raised.value is error
    assert [p.name for p in tiny.parent.iterdir()] == [tiny.name]
    assert tiny.read_bytes() == before


def test_one_writes_at_a_time_and_readers_keep_what_they_opened(tiny: Path) -> None:
    old, first = Saved.open(tiny), read_all(tiny)

    def pages() -> Iterator[torch.Tensor]:
        with pytest.raises(StoreError, match=f"is being written by process {os.getpid()}; wait"):
            write(tiny)
        assert read_all(tiny) == first
        yield torch.zeros(PAGE_BYTES, dtype=torch.uint8)

    write_saved(tiny, {"new": 1}, {}, pages(), 1, PAGE_BYTES)
    assert read_all(tiny) == ({"new": 1}, [], [[0] * PAGE_BYTES])
    assert old.tensor("ids").tolist() == [0, 1, 2, 3]
    assert [p.name for p in tiny.parent.iterdir()] == [tiny.name]
    old.close()


def test_a_link_in_the_place_of_the_session_is_refused(tiny: Path) -> None:
    (tiny.parent / "a").symlink_to(tiny)
    before = tiny.read_bytes()
    with pytest.raises(StoreError, match=r"is a link, .*; give the name"):
        write(tiny.parent / "a")
    assert tiny.read_bytes() == before
    assert sorted(os.listdir(tiny.parent)) == ["a", tiny.name]


# Children of a process of its own: this one has threads, and its limits are the suite's.
PRELUDE = """
import os, resource, signal, sys
from contextlib import suppress
from pathlib import Path
import torch
from farkv.errors import StoreError
from farkv.session.file import Saved, write_saved
from tests.session.test_file import make_pages, read_all, write, N_PAGES, PAGE_BYTES

def in_child(work, *args):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(*args)
            code = 0
        finally:
            os._exit(code)
    return pid

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run_alone(code: str, *args: Any) -> None:
    command = [sys.executable, "-c", PRELUDE + code, *map(str, args)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


KILLS = """
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def work(path, moment):
    pages = make_pages()
    def give():
        for i in range(N_PAGES):
            if moment == f"page {i}":
                die()
            yield pages[i] + 1
        if moment == "after the last page":
            die()
    if moment == "fsync":
        os.fsync = die
    if moment == "rename":
        os.rename = die
    if moment == "after rename":
        rename = os.rename
        os.rename = lambda *names, **folders: die(rename(*names, **folders))
    write_saved(path, {"new": moment}, {}, give(), N_PAGES, PAGE_BYTES)

for path in Path(sys.argv[1]).iterdir():
    assert status(in_child(work, path / "a", path.name)) == -signal.SIGKILL
"""
MOMENTS = ("page 0", "page 3", "after the last page", "fsync", "rename", "after rename")


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    for moment in MOMENTS:
        (tmp_path / moment).mkdir()
        write(tmp_path / moment / "a", ids=torch.arange(3))
    old = read_all(tmp_path / "page 0" / "a")
    run_alone(KILLS, tmp_path)
    for moment in MOMENTS:
        path = tmp_path / moment / "a"
        new = ({"new": moment}, [], (make_pages() + 1).tolist())
        assert read_all(path) == (new if moment == "after rename" else old), moment
        left = {re.sub(r"[0-9a-f]{8}\.\d+-[0-9a-f]{16}", "…", p.name) for p in path.parent.iterdir()}
        assert left == ({"a"} if moment == "after rename" else {"a", ".a.….part"}), moment
        write(path, {"next": 1})
        assert read_all(path)[0] == {"next": 1}
        assert [p.name for p in path.parent.iterdir()] == ["a"]


FULL = """
path = Path(sys.argv[1])
before = path.read_bytes()
limit = lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))

def at_once():
    limit(1 << 20)
    asked = []
    pages = (asked.append(i) or torch.zeros(1 << 20, dtype=torch.uint8) for i in range(4))
    try:
        write_saved(path, {}, {}, pages, 4, 1 << 20)
    except StoreError as error:
        assert "File too large" in str(error) and "room for 4,198,4" in str(error), error
        assert not asked
        return
    raise AssertionError

def later():
    def pages():
        yield make_pages()[:1]
        limit(4096 + 100)
        yield make_pages()[1:]
    try:
        write_saved(path, {}, {}, pages(), N_PAGES, PAGE_BYTES)
    except StoreError as error:
        assert "File too large" in str(error), error
        return
    raise AssertionError

for work in (at_once, later):
    assert status(in_child(work)) == 0, work
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
"""


def test_a_full_disk_is_told_before_the_work_or_during_it_and_nothing_changes(tiny: Path) -> None:
    run_alone(FULL, tiny)


RACE = """
path = Path(sys.argv[1])
write(path, {"who": 0, "i": 0})

def work(who):
    for i in range(60):
        with suppress(StoreError):
            write(path, {"who": who, "i": i})

pids = [in_child(work, who) for who in (1, 2, 3)]
for _ in range(200):
    assert read_all(path)[2] == make_pages().tolist()
assert [status(pid) for pid in pids] == [0, 0, 0]
assert read_all(path)[0]["who"] > 0
assert list(path.parent.iterdir()) == [path]
"""


def test_a_file_that_several_write_is_whole_at_any_time(tmp_path: Path) -> None:
    run_alone(RACE, tmp_path / "a")


@contextmanager
def refused_or(expected: tuple[Any, ...], path: Path) -> Iterator[None]:
    yield
    try:
        got = read_all(path)
    except (SessionError, StoreError):
        return
    assert got == expected


EDITS = st.lists(
    st.tuples(st.sampled_from("flip put cut insert".split()), st.integers(0), st.binary(max_size=9)), min_size=1
)


@given(EDITS)
def test_a_random_change_is_refused_or_changes_nothing(tmp_path_factory: pytest.TempPathFactory, edits: Any) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a"
    write(path, ids=torch.arange(4))
    with refused_or(read_all(path), path):
        data = bytearray(path.read_bytes())
        for kind, place, value in edits:
            at = place % max(1, len(data))
            if kind == "flip":
                data[at : at + 1] = bytes(b ^ (1 << place % 8) for b in data[at : at + 1])
            elif kind == "cut":
                del data[at : at + len(value)]
            else:
                data[at : at + (len(value) if kind == "put" else 0)] = value
        path.write_bytes(data)
