"""What the native kernels refuse before C is entered: every argument of every entry point, wrong in every way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from farkv.errors import CacheStateError
from farkv.kernels.native import Native, list_native, load_native
from farkv.math.logits import Logits

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
from kernel_misuse import WRONG, call, make_right  # noqa: E402

pytestmark = pytest.mark.skipif(not list_native(), reason="the native library was not built")


@pytest.fixture(scope="module")
def kernels() -> Native:
    found = load_native() or Native(list_native()[0])
    for entry in WRONG:
        # What the changes start from is right.
        call(found, entry, make_right(entry))
    return found


@pytest.mark.parametrize(("entry", "name"), [(entry, name) for entry, changes in WRONG.items() for name in changes])
def test_an_argument_that_does_not_fit_is_refused_in_words(kernels: Native, entry: str, name: str) -> None:
    given = make_right(entry)
    WRONG[entry][name](given)
    with pytest.raises(CacheStateError, match=r"expected|out of range"):
        call(kernels, entry, given)


def test_a_message_names_what_was_got(kernels: Native) -> None:
    given = make_right("select")
    given["taken"] = given["taken"][:, :1]
    with pytest.raises(CacheStateError, match=r"positions of every KV head, \(2, 3\), got torch.int64 \(2, 1, 5\)"):
        call(kernels, "select", given)


def test_no_records_are_no_mistake(kernels: Native) -> None:
    select, attend = make_right("select"), make_right("attend")
    assert kernels.select(**select | {"cap": 0}).shape == (2, 3, 0)
    assert kernels.select(**select | {"taken": select["taken"][..., :0]}).shape == (2, 3, 6)
    nothing = {"n": 0, "tail": 0, "positions": None, "sinks": None, "logits": Logits(1.0)}
    assert not kernels.attend(**attend | nothing).any()
