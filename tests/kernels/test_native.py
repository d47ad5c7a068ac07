"""The native kernels against float64: attention over chosen and over all records, gathering, loading."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farkv.errors import CacheStateError, ConfigError
from farkv.kernels import native, native_abi
from farkv.kernels.native import Native, Rows, list_native, load_native
from farkv.math.logits import Logits
from farkv.store.far.quantize import Codec

FORMS = ("float32", "bfloat16", "float16", "int8", "int4")
# B, Hkv, G, Dk, Dv, records: odd sizes, several blocks, one record, groups that are no power of two.
SHAPES = [
    (1, 1, 1, 20, 20, 1),
    (2, 3, 3, 80, 64, 61),
    (1, 2, 8, 33, 17, 130),
    (2, 1, 5, 64, 48, 77),
    (1, 3, 4, 128, 96, 40),
]

pytestmark = pytest.mark.skipif(not list_native(), reason="the native library was not built")


@pytest.fixture(params=list_native() or ["none"])
def kernels(request: pytest.FixtureRequest) -> Native:
    return Native(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_rows(form: str, shape: tuple[int, ...]) -> tuple[Rows, Tensor, Tensor]:
    """Records of a form in a wider pool, and what they hold, in float64."""
    batch, heads, _, k_dim, v_dim, n = shape
    kv = torch.randn(batch, heads, n, k_dim + v_dim)
    if form in ("int8", "int4"):
        codec = Codec(form, k_dim, v_dim, torch.float32)
        data = codec.encode(kv[..., :k_dim], kv[..., k_dim:])
        values, kind = codec.decode(data), form
    else:
        data, kind = kv.to(getattr(torch, form)), "plain"
        values = data
    # What stands behind the rows must not be read: as numbers it would be NaN.
    pool = torch.full((batch, heads, n + 3, data.shape[-1]), 255 if data.dtype == torch.uint8 else math.nan).to(
        data.dtype
    )
    pool[:, :, :n] = data
    return Rows(pool[:, :, :n], k_dim, v_dim, kind), values[..., :k_dim].double(), values[..., k_dim:].double()


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, logits: Logits, sinks: Tensor | None, odds: Tensor | None = None
) -> Tensor:
    batch, heads = k.shape[:2]
    scores = q.double().reshape(batch, heads, -1, q.shape[-1]) @ k.mT * logits.scaling
    if logits.softcap:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    if odds is not None:
        scores = scores + odds.double()[:, :, None]
    if sinks is not None:
        sink = sinks.double().reshape(1, heads, -1, 1).expand(batch, -1, -1, -1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v).reshape(batch, -1, 1, v.shape[-1])


def choose(shape: tuple[int, ...], reach: int, n_chosen: int) -> Tensor:
    batch, heads = shape[:2]
    picks = [torch.randperm(reach)[:n_chosen].sort().values for _ in range(batch * heads)]
    return torch.stack(picks).view(batch, heads, n_chosen)


def take(x: Tensor, positions: Tensor) -> Tensor:
    return x.gather(2, positions[..., None].expand(*positions.shape, x.shape[-1]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_dense_twin(kernels: Native, threads: int, form: str, shape: tuple[int, ...]) -> None:
    rows, k, v = make_rows(form, shape)
    q = torch.randn(shape[0], shape[1] * shape[2], 1, shape[3])
    logits = Logits(2 * shape[3] ** -0.5)
    n = max(1, shape[-1] - 2)
    got = kernels.attend(q, rows, logits, positions=None, n=n)
    # float32 sums of a few hundred terms of order one.
    torch.testing.assert_close(
        got.double(), attend_plainly(q, k[:, :, :n], v[:, :, :n], logits, None), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_chosen_records_and_tail(kernels: Native, threads: int, form: str, shape: tuple[int, ...]) -> None:
    rows, k, v = make_rows(form, shape)
    n = shape[-1]
    tail = min(3, n)
    positions = choose(shape, n - tail, (n - tail) // 2)
    newest = torch.arange(n - tail, n).expand(*shape[:2], tail)
    q, sinks = torch.randn(shape[0], shape[1] * shape[2], 1, shape[3]), torch.randn(shape[1] * shape[2])
    read = torch.cat([positions, newest], -1)
    for logits, sink in ((Logits(shape[3] ** -0.5, 2.0), None), (Logits(shape[3] ** -0.5), sinks)):
        got = kernels.attend(q, rows, logits, positions=positions, n=n, tail=tail, sinks=sink)
        expected = attend_plainly(q, take(k, read), take(v, read), logits, sink)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 2, 64, 64, 900)])
@pytest.mark.parametrize("form", FORMS)
def test_odds_are_added_to_what_was_chosen(kernels: Native, threads: int, form: str, shape: tuple[int, ...]) -> None:
    rows, k, v = make_rows(form, shape)
    n = shape[-1]
    tail = min(3, n)
    positions = choose(shape, n - tail, (n - tail) // 2)
    odds = 4 * torch.rand(positions.shape)
    read = torch.cat([positions, torch.arange(n - tail, n).expand(*shape[:2], tail)], -1)
    q, logits = torch.randn(shape[0], shape[1] * shape[2], 1, shape[3]), Logits(2 * shape[3] ** -0.5, 5.0)
    got = kernels.attend(q, rows, logits, positions=positions, n=n, tail=tail, odds=odds)
    more = torch.nn.functional.pad(odds, (0, tail))
    expected = attend_plainly(q, take(k, read), take(v, read), logits, None, more)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    with pytest.raises(CacheStateError, match="odds of every position"):
        kernels.attend(q, rows, logits, positions=None, n=n, odds=odds)


def test_one_long_head_is_shared_by_threads(kernels: Native) -> None:
    shape = (1, 1, 2, 64, 64, 1500)
    rows, k, v = make_rows("bfloat16", shape)
    q, logits, before = torch.randn(1, 2, 1, 64), Logits(1.0), torch.get_num_threads()
    try:
        for n_threads in (2, 3):
            torch.set_num_threads(n_threads)
            got = kernels.attend(q, rows, logits, positions=None, n=1500)
            torch.testing.assert_close(got.double(), attend_plainly(q, k, v, logits, None), rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_output_has_the_dtype_of_the_query(kernels: Native) -> None:
    rows, k, v = make_rows("bfloat16", (1, 1, 1, 64, 64, 9))
    q = torch.randn(1, 1, 1, 64, dtype=torch.bfloat16)
    got = kernels.attend(q, rows, Logits(0.125), positions=None, n=9)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, attend_plainly(q, k, v, Logits(0.125), None).bfloat16(), rtol=2**-8, atol=2**-8)


def test_large_logits_do_not_overflow(kernels: Native) -> None:
    rows, k, v = make_rows("float32", (1, 1, 4, 64, 64, 50))
    q = 1000 * torch.randn(1, 4, 1, 64)
    got = kernels.attend(q, rows, Logits(1.0), positions=None, n=50)
    torch.testing.assert_close(got.double(), attend_plainly(q, k, v, Logits(1.0), None), rtol=0, atol=2e-3)


def test_nothing_to_read_gives_zeros(kernels: Native) -> None:
    rows, _, _ = make_rows("float32", (1, 2, 1, 8, 8, 4))
    none = torch.zeros(1, 2, 0, dtype=torch.int64)
    for sinks in (None, torch.zeros(2)):
        got = kernels.attend(torch.randn(1, 2, 1, 8), rows, Logits(1.0), positions=none, n=4, sinks=sinks)
        assert torch.equal(got, torch.zeros(1, 2, 1, 8))


def test_values_that_are_no_numbers_spoil_their_own_head(kernels: Native) -> None:
    rows, k, v = make_rows("float32", (1, 2, 2, 16, 16, 20))
    rows.data[0, 0, 7, 3] = math.nan
    q = torch.randn(1, 4, 1, 16)
    got = kernels.attend(q, rows, Logits(0.25), positions=None, n=20)
    assert got[:, :2].isnan().all()
    expected = attend_plainly(q, k, v, Logits(0.25), None)
    torch.testing.assert_close(got[:, 2:].double(), expected[:, 2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 18, 1 << 40])
def test_positions_out_of_reach_are_refused(kernels: Native, wrong: int) -> None:
    rows, _, _ = make_rows("float32", (1, 1, 1, 8, 8, 20))
    positions = torch.tensor([[[0, 5, wrong]]])
    with pytest.raises(CacheStateError, match="out of range"):
        kernels.attend(torch.randn(1, 1, 1, 8), rows, Logits(1.0), positions=positions, n=20, tail=2)


def test_operands_that_do_not_fit_are_refused(kernels: Native) -> None:
    rows, _, _ = make_rows("float32", (1, 1, 1, 8, 8, 20))
    q = torch.randn(1, 1, 1, 8)
    wrong: list[Callable[[], Tensor]] = [
        lambda: kernels.attend(q, rows._replace(v_dim=7), Logits(1.0), positions=None, n=20),
        lambda: kernels.attend(q, rows._replace(form="int8"), Logits(1.0), positions=None, n=20),
        lambda: kernels.attend(q, rows._replace(data=rows.data.double()), Logits(1.0), positions=None, n=20),
        lambda: kernels.attend(q[..., :7], rows, Logits(1.0), positions=None, n=20),
        lambda: kernels.attend(q, rows, Logits(1.0), positions=None, n=21),
    ]
    for call in wrong:
        with pytest.raises(CacheStateError, match="expected"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_gather(kernels: Native, threads: int, dtype: torch.dtype) -> None:
    data = torch.randint(0, 100, (2, 3, 40, 13)).to(dtype)
    heads, positions = torch.randint(0, 6, (600,)), torch.randint(0, 40, (600,))
    out = torch.empty(600, 13, dtype=dtype)
    kernels.gather(data, heads, positions, out)
    assert torch.equal(out, data.view(6, 40, 13)[heads, positions])
    kernels.gather(data, heads[:0], positions[:0], out[:0])
    positions[599] = 40
    with pytest.raises(CacheStateError, match="out of range"):
        kernels.gather(data, heads, positions, out)


def test_bandwidth_is_measured(kernels: Native, threads: int) -> None:
    data = torch.ones(1 << 20)
    assert kernels.read_bandwidth(data) > 0
    assert kernels.gather_bandwidth(data, torch.arange(0, 8192, 7), 512) > 0
    with pytest.raises(CacheStateError, match="8192 rows"):
        kernels.gather_bandwidth(data, torch.tensor([8192]), 512)


def test_environment_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FARKV_KERNEL", raising=False)
    best = load_native()
    assert best is not None and best.name == f"native-{list_native()[0]}" and load_native() is best
    monkeypatch.setenv("FARKV_KERNEL", "plain")
    assert load_native() is None
    monkeypatch.setenv("FARKV_KERNEL", "generic")
    generic = load_native()
    assert generic is not None and generic.name == "native-generic"
    monkeypatch.setenv("FARKV_KERNEL", "sse9")
    with pytest.raises(ConfigError, match="'sse9'"):
        load_native()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("FARKV_KERNEL", raising=False)
    monkeypatch.setattr(native_abi, "LIBRARY", tmp_path / "none.so")
    native_abi.load_library.cache_clear()
    native._load.cache_clear()
    try:
        assert list_native() == () and load_native() is None
        monkeypatch.setenv("FARKV_KERNEL", "avx2")
        with pytest.raises(ConfigError, match="expected one of plain"):
            load_native()
    finally:
        native_abi.load_library.cache_clear()
        native._load.cache_clear()


def test_a_forked_child_makes_its_own_threads() -> None:
    script = """
import os, torch
from farkv.kernels.native import Rows, load_native
from farkv.math.logits import Logits
torch.set_num_threads(2)
kernels, rows, q = load_native(), Rows(torch.ones(1, 4, 300, 32), 16, 16), torch.ones(1, 4, 1, 16)
attend = lambda: kernels.attend(q, rows, Logits(1.0), positions=None, n=300)
assert (attend() == 1).all()
child = os.fork()
if child == 0:
    os._exit(0 if (attend() == 1).all() else 1)
assert os.waitpid(child, 0)[1] == 0
assert (attend() == 1).all()
"""
    quiet = [sys.executable, "-W", "ignore", "-c", script]
    subprocess.run(quiet, check=True, timeout=600, env={**os.environ, "FARKV_KERNEL": ""})


def test_the_main_thread_shares_the_threads_of_torch() -> None:
    script = """
import os, pathlib, threading, torch
from farkv.kernels.native import Rows, load_native
from farkv.kernels.native_abi import find_openmp
from farkv.math.logits import Logits
count = lambda: len(os.listdir('/proc/self/task'))
torch.set_num_threads(3)
kernels, rows, q = load_native(), Rows(torch.ones(1, 6, 300, 32), 16, 16), torch.ones(1, 6, 1, 16)
attend = lambda: bool((kernels.attend(q, rows, Logits(1.0), positions=None, n=300) == 1).all())
torch.ones(1 << 22).add_(1)
before = count()
assert attend()
assert (count() == before) == (find_openmp() is not None), (before, count())
found = []
other = threading.Thread(target=lambda: found.append(attend()))
other.start(), other.join()
assert found == [True] and attend()
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("counts threads by /proc")
    quiet = [sys.executable, "-W", "ignore", "-c", script]
    subprocess.run(quiet, check=True, timeout=600, env={**os.environ, "FARKV_KERNEL": ""})


def test_gather_into_runs(kernels: Native) -> None:
    data, out = torch.randn(2, 3, 50, 7), torch.zeros(6, 9, 7)
    positions = torch.stack([torch.randperm(50)[:5] for _ in range(6)])
    kernels.gather(data, torch.arange(6).repeat_interleave(5), positions.view(-1), out[:, :5])
    assert torch.equal(out[:, :5], data.view(6, 50, 7).gather(1, positions[..., None].expand(-1, -1, 7)))
    assert not out[:, 5:].any()
    with pytest.raises(CacheStateError, match="room for these rows"):
        kernels.gather(data, torch.arange(6), positions[:, 0].contiguous(), out[:, :5])


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ctypes.Structure):
        _fields_ = (("n", ctypes.c_int64),)

    native_abi.load_library.cache_clear()
    monkeypatch.setattr(native_abi, "GatherArgs", Other)
    with pytest.raises(ConfigError, match="built from these sources"):
        native_abi.load_library()
