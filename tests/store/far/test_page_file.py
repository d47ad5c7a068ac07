"""Pages come back as they were written, whatever happens to the process, the file or the disk in between."""

from __future__ import annotations

import copy
import errno
import gc
import os
import resource
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.errors import CapacityError, StoreError
from farkv.store.far import page_file as disk_module
from farkv.store.far import page_reader as reader_module
from farkv.store.far.page_file import LOCK_NAME, DiskSpace, PageFile
from farkv.store.far.page_reader import bytes_of
from farkv.store.ledger import Ledger

# A process that holds the folder and writes without end.
WRITER = """
import sys, torch
from pathlib import Path
from farkv.store.far.page_file import DiskSpace
space = DiskSpace(Path(sys.argv[1]), None)
file = space.open_file(4096)
while True:
    file.write(torch.ones(16, 4096, dtype=torch.uint8))
    if file.n_pages == 64:
        print("writing", flush=True)
    if file.n_pages == 1 << 14:
        file = space.open_file(4096)
"""


def noise(n: int, page_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, page_bytes), dtype=torch.uint8)


def read(file: PageFile, ids: list[int]) -> torch.Tensor:
    out = torch.empty(len(ids), file.page_bytes, dtype=torch.uint8)
    file.read(torch.tensor(ids, dtype=torch.int64), out)
    return out


def open_files() -> dict[int, str]:
    """Return this process's open files and what they are."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own is closed again
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def nameless(folder: Path) -> list[int]:
    """Return the open files in a folder that have no name."""
    return [fd for fd, is_at in open_files().items() if is_at.startswith(f"{folder}/") and is_at.endswith(" (deleted)")]


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Let the system refuse to make any file larger: a full disk that needs no disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def space(tmp_path: Path) -> Iterator[DiskSpace]:
    with DiskSpace(tmp_path / "store", None) as made:
        yield made


@pytest.mark.parametrize("page_bytes", [8, 1000, 4096, 65536])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool]
)
def test_pages_of_any_dtype_and_size_come_back(space: DiskSpace, dtype: torch.dtype, page_bytes: int) -> None:
    file = space.open_file(page_bytes)
    # Any bits: also those that are NaN, which no comparison of numbers would find equal.
    raw = noise(5, page_bytes)
    pages = (raw % 2 if dtype == torch.bool else raw).view(dtype)
    assert file.write(pages[:3]) == 0
    assert file.write(pages[3:]) == 3
    assert (file.n_pages, space.ledger.used) == (5, 5 * page_bytes)
    out = torch.empty_like(pages)
    file.read(torch.arange(5), out)
    assert bytes(bytes_of(out)) == bytes(bytes_of(pages))


@given(st.data(), st.sampled_from([1, 24, 4096]), st.sampled_from([1, 3, 1 << 20]))
def test_a_file_is_a_list_of_pages(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, page_bytes: int, pages_a_read: int
) -> None:
    before, reader_module.PIECE_BYTES = reader_module.PIECE_BYTES, pages_a_read * page_bytes
    try:
        with DiskSpace(tmp_path_factory.mktemp("list"), None) as space:
            file, model = space.open_file(page_bytes), list[bytes]()
            for n in data.draw(st.lists(st.integers(0, 6), max_size=5)):
                new = noise(n, page_bytes)
                assert file.write(new) == len(model)
                model += [bytes(bytes_of(page)) for page in new]
                # Runs, repeats and leaps.
                run = st.tuples(st.integers(0, max(0, len(model) - 1)), st.integers(1, 4))
                runs = data.draw(st.lists(run, max_size=6)) if model else []
                ids = [i for start, length in runs for i in range(start, min(start + length, len(model)))]
                assert bytes(bytes_of(read(file, ids))) == b"".join(model[i] for i in ids)
            assert file.n_pages == len(model)
            assert space.ledger.used == len(model) * page_bytes
    finally:
        reader_module.PIECE_BYTES = before


def test_reads_and_writes_that_come_in_parts_are_finished(space: DiskSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may do less than it was asked for, as it does beyond 2 GiB or after a signal."""
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: preadv(fd, [parts[0][:100]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, part, at: pwrite(fd, part[:77], at))
    file, pages = space.open_file(512), noise(6, 512)
    file.write(pages)
    assert torch.equal(read(file, [4, 5, 1]), pages[[4, 5, 1]])


def test_pages_tidied_from_the_cache_come_back(space: DiskSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "TIDY_BYTES", 8192)
    file, pages = space.open_file(4096), noise(20, 4096)
    for at in range(0, 20, 5):
        file.write(pages[at : at + 5])
    assert torch.equal(read(file, list(range(20))), pages)
    file.drop_cached()
    assert torch.equal(read(file, list(range(20))), pages)


def test_many_threads_read_what_one_reads(space: DiskSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 2048)
    file, pages = space.open_file(1024), noise(200, 1024)
    file.write(pages)
    wanted = [torch.randint(0, 200, (150,)).tolist() for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        writing = threads.submit(lambda: [file.write(pages[:1]) for _ in range(50)])
        for ids, out in zip(wanted, threads.map(lambda ids: read(file, ids), wanted), strict=True):
            assert torch.equal(out, pages[ids])
            assert torch.equal(out, torch.cat([read(file, [i]) for i in ids]))
        assert writing.result() == list(range(200, 250))


def test_what_passes_the_limit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with DiskSpace(tmp_path, 10 * 512) as space:
        file, other = space.open_file(512), space.open_file(1024)
        file.write(noise(4, 512))
        with pytest.raises(CapacityError, match="raise --disk"):
            file.write(noise(7, 512))
        assert (file.n_pages, space.ledger.used) == (4, 4 * 512)
        assert sorted(os.fstat(fd).st_size for fd in nameless(tmp_path)) == [0, 4 * 512]
        other.write(noise(3, 1024))
        with pytest.raises(CapacityError):
            file.write(noise(1, 512))
        other.close()
        file.write(noise(6, 512))
        assert space.ledger.peak == 10 * 512


def test_a_folder_is_for_one_space_at_a_time(tmp_path: Path) -> None:
    first = DiskSpace(tmp_path / "a" / "b", None)
    with pytest.raises(StoreError, match=f"in use by process {os.getpid()}; .*choose another folder"):
        DiskSpace(tmp_path / "a" / "b", None)
    file = first.open_file(16)
    first.close()
    first.close()
    with DiskSpace(tmp_path / "a" / "b", None):
        file.write(noise(2, 16))
        assert torch.equal(read(file, [1, 1])[0], read(file, [1])[0])
    with pytest.raises(StoreError, match="is closed"):
        first.open_file(16)
    last = DiskSpace(tmp_path / "a" / "b", None)
    del last
    gc.collect()
    DiskSpace(tmp_path / "a" / "b", None).close()


@pytest.mark.parametrize("planted", ["a link", "a second name", "a file of all", "other text", "a pipe"])
def test_a_lock_that_somebody_planted_is_refused_and_left_alone(tmp_path: Path, planted: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "kv"
    victim.write_bytes(b"12345")
    folder.mkdir()
    lock = folder / LOCK_NAME
    if planted == "a link":
        lock.symlink_to(victim)
    elif planted == "a second name":
        lock.hardlink_to(victim)
    elif planted == "a pipe":
        os.mkfifo(lock)
    else:
        lock.write_bytes(b"dear diary" if planted == "other text" else b"")
        lock.chmod(0o666 if planted == "a file of all" else 0o600)
    with pytest.raises(StoreError, match=r"disk store .*kv: \.farkv\.lock .*; expected a lock of farkv's; remove it"):
        DiskSpace(folder, None)
    assert victim.read_bytes() == b"12345"
    assert planted != "other text" or lock.read_bytes() == b"dear diary"
    lock.unlink()
    DiskSpace(folder, None).close()


def test_a_forked_child_leaves_its_parents_lock(tmp_path: Path) -> None:
    with DiskSpace(tmp_path, None) as space:
        # A plain fork would warn of our threads. A duplicate is what the child has: the same lock, another number.
        (held,) = [fd for fd, is_at in open_files().items() if is_at == str(tmp_path / LOCK_NAME)]
        disk_module._end_space(os.dup(held), owner=os.getppid())
        with pytest.raises(StoreError, match="in use"):
            DiskSpace(tmp_path, None)
        space.open_file(8)


def test_a_killed_process_leaves_no_lock_and_no_bytes(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        try:
            assert child.stdout.readline() == "writing\n"
            with pytest.raises(StoreError, match=f"in use by process {child.pid}"):
                DiskSpace(tmp_path, None)
        finally:
            child.kill()
            child.wait()
    assert os.listdir(tmp_path) == [LOCK_NAME]
    with DiskSpace(tmp_path, None) as space:
        assert space.open_file(8).write(noise(1, 8)) == 0


def test_a_changed_bit_is_found_and_named(space: DiskSpace) -> None:
    file, pages = space.open_file(4096), noise(12, 4096)
    file.write(pages)
    (fd,) = nameless(space.folder)
    byte = os.pread(fd, 1, 7 * 4096 + 99)[0]
    os.pwrite(fd, bytes([byte ^ 4]), 7 * 4096 + 99)
    for ids in ([7], list(range(12)), [1, 3, 7, 9]):
        with pytest.raises(
            StoreError, match=r"file 0: page 7 is damaged: expected checksum [0-9a-f]{8}, got"
        ) as caught:
            read(file, ids)
        assert f"{zlib.crc32(bytes_of(pages[7])):08x}" in str(caught.value)
    rest = [i for i in range(12) if i != 7]
    assert torch.equal(read(file, rest), pages[rest])


def test_a_truncated_file_is_found(space: DiskSpace) -> None:
    file, pages = space.open_file(4096), noise(6, 4096)
    file.write(pages)
    os.truncate(nameless(space.folder)[0], 4 * 4096 + 10)
    with pytest.raises(StoreError, match="page 4 is cut off: expected 8,192 bytes from byte 16,384 on, got 10"):
        read(file, [4, 5])
    assert torch.equal(read(file, [3, 0]), pages[[3, 0]])


def test_a_disk_that_is_full_in_the_middle_of_a_page_costs_nothing_but_that_write(space: DiskSpace) -> None:
    file, pages = space.open_file(4096), noise(10, 4096)
    with largest_file(6 * 4096 + 1000):
        file.write(pages[:4])
        with pytest.raises(StoreError, match=r"page 6 cannot be written .*make room there") as caught:
            file.write(pages[4:])
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EFBIG
        assert (file.n_pages, space.ledger.used) == (4, 4 * 4096)
        assert os.fstat(nameless(space.folder)[0]).st_size == 4 * 4096, "the torn bytes are given back"
        assert torch.equal(read(file, [0, 1, 2, 3]), pages[:4])
        assert file.write(pages[4:6]) == 4
    assert file.write(pages[6:]) == 6
    assert torch.equal(read(file, list(range(10))), pages)


def test_a_device_without_room_is_an_error_of_the_store() -> None:
    ledger = Ledger("disk")
    file = PageFile(os.open("/dev/full", os.O_RDWR), 64, ledger, "full disk")
    with pytest.raises(StoreError, match=r"full disk: page 0 cannot be written .*No space left on device"):
        file.write(noise(3, 64))
    assert (file.n_pages, ledger.used) == (0, 0)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=r"expected a folder that can be written, got the error '.*choose another"):
            DiskSpace(folder, None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="not writable"):
        DiskSpace(tmp_path, None)


def test_a_file_system_that_gives_every_file_a_name(space: DiskSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Opening the folder itself for writing fails, as it does where a file without a name is unknown.
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    file, pages = space.open_file(32), noise(3, 32)
    file.write(pages)
    assert os.listdir(space.folder) == [LOCK_NAME]
    assert torch.equal(read(file, [2, 0]), pages[[2, 0]])


def test_a_folder_that_is_gone_gives_no_files(space: DiskSpace) -> None:
    (space.folder / LOCK_NAME).unlink()
    space.folder.rmdir()
    with pytest.raises(StoreError, match="No such file"):
        space.open_file(8)


def test_copies_share_the_file_and_the_last_one_gives_it_back(space: DiskSpace) -> None:
    file = space.open_file(64)
    file.write(noise(3, 64))
    held = copy.deepcopy({"a": file, "space": space})
    assert held["a"] is file
    assert held["space"] is space
    del file
    gc.collect()
    assert space.ledger.used == 3 * 64
    assert len(nameless(space.folder)) == 1
    held.clear()
    gc.collect()
    assert (space.ledger.used, nameless(space.folder)) == (0, [])


def test_a_closed_file_says_so(space: DiskSpace) -> None:
    file = space.open_file(64)
    file.write(noise(3, 64))
    file.close()
    file.close()
    assert (space.ledger.used, nameless(space.folder)) == (0, [])
    for use in (lambda: file.write(noise(1, 64)), lambda: read(file, [0]), file.drop_cached):
        with pytest.raises(StoreError, match="file 0: it is closed"):
            use()
    assert space.ledger.used == 0
