"""The decode path: no host sync, no work that grows with heads or sequences. A scan of the source, and runs."""

from __future__ import annotations

import ast
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import farkv
from farkv.engine import bytes_recent
from farkv.methods import METHODS as TABLE
from farkv.methods import Full, Indexer, InfiniGen, Method, Oracle, Random, Window
from farkv.store import link
from tests.models import forward, make_model, make_prompt

SOURCE = Path(farkv.__file__).parent
FOLDERS = ("math", "engine", "methods", "store", "hf", "kernels", "session")
SYNCS = {"item", "tolist", "synchronize", "nonzero", "cpu", "numpy"}
# (file, function, call): why it may be there.
ALLOWED = {
    ("engine/bank.py", "select", "tolist"): "the store has waited for these numbers already",
    ("engine/budget.py", "list_own", "tolist"): "of a padded batch, where reads vary on a CPU",
    ("engine/choose.py", "_vary", "tolist"): "where reads vary, on a CPU",
    ("engine/evict.py", "_score_prompt", "cpu"): "one curve per layer, at the end of a prompt without a plan",
    ("engine/evict.py", "_score_prompt", "numpy"): "the same",
    ("engine/fast_choice.py", "choose_late", "tolist"): "of a padded batch on a CPU",
    ("engine/fast_choice.py", "split_early", "tolist"): "the same",
    ("engine/fast_choice.py", "choose_varied", "tolist"): "where reads vary, on a CPU",
    ("engine/fast_choice.py", "vary_one", "tolist"): "the same",
    ("engine/padding.py", "count", "tolist"): "once per pass, where something is padded",
    ("engine/pool_policy.py", "choose_kept", "nonzero"): "once per eviction of many records",
    ("hf/exact.py", "run", "cpu"): "for a streamer, as generate does",
    ("hf/identity.py", "digest_tensors", "numpy"): "where weights are new, or changed",
    ("hf/identity.py", "identify_model", "numpy"): "the same",
    ("hf/indexed.py", "narrow_one", "nonzero"): "below a model's budget; its own indexer waits for as much",
    ("hf/layer.py", "batch_select_indices", "cpu"): "the user's own call, not a step",
    ("hf/verify.py", "after", "tolist"): "verified steps are not timed",
    ("math/lookup.py", "find_continuation", "nonzero"): "once a round of drafts, which waits for its tokens anyway",
    ("math/lookup.py", "find_continuation", "tolist"): "the same",
    ("kernels/gpu.py", "_wait", "synchronize"): "a measurement of bandwidth",
    ("kernels/native_pages.py", "check_pages", "tolist"): "of host memory, by the link's own thread",
    ("kernels/ways.py", "_check_varied", "tolist"): "of host memory",
    ("math/sampling.py", "make_seeds", "numpy"): "of host memory: nothing is drawn on a device",
    ("math/sample.py", "add_block", "nonzero"): "once per block of a prompt that was read in passes",
    ("methods/index_tensors.py", "take_tensors", "tolist"): "once per session",
    ("methods/layer_fit.py", "measure", "tolist"): "once per look for drift",
    ("methods/layer_fit.py", "select", "tolist"): "the store has waited for them already",
    ("store/near/recently_used.py", "give_sets_back", "synchronize"): "another cache needs the memory, once",
    ("store/far/rows.py", "select", "tolist"): "beam search itself waits for the device here",
    ("store/link.py", "_copy", "nonzero"): "of host memory, by the link's own thread",
    ("store/link.py", "_copy_missing", "nonzero"): "the same",
    ("store/link.py", "_fetch_pages", "nonzero"): "of host memory: a CPU alone fetches this way",
    ("store/link.py", "_stage", "synchronize"): "one side stream, waited for by the link's own thread",
    ("store/near/recently_used.py", "find", "nonzero"): "of host memory, by the link's own thread",
    ("store/near/recently_used.py", "keep", "nonzero"): "of host memory, once per eviction of many records",
    ("store/near/recently_used.py", "select", "cpu"): "the store has waited for these numbers already",
}
# These work on host memory alone, whatever the model's device is: nothing there waits for one.
HOST = {f"store/far/{name}.py" for name in ("page_cache", "page_reader", "page_rows")}
# Once per answer or file, outside the forward passes.
OUTSIDE = {"hf/ask.py", "hf/session.py"}


def calls_of(path: Path) -> list[tuple[str, str, str]]:
    """Return (file, innermost function, method) of every method call in a file, and of every `open`."""
    found, name = [], str(path.relative_to(SOURCE))

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found.append((name, function, node.func.attr))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            found.append((name, function, "open"))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text()), "")
    return found


def files() -> list[Path]:
    return [p for folder in FOLDERS for p in sorted((SOURCE / folder).rglob("*.py"))]


def test_no_call_waits_for_the_device_unless_it_says_why() -> None:
    all_found = {c for p in files() for c in calls_of(p) if c[2] in SYNCS}
    assert {c[0] for c in all_found} >= OUTSIDE | HOST, "excepted, but it waits nowhere"
    found = {c for c in all_found if c[0] not in OUTSIDE | HOST}
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) - found == set(), "allowed, but no longer there"


def test_only_the_door_and_the_demo_know_transformers() -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE).parts[0]
        if where in {"hf", "demo", "measure", "cli", "bench"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "transformers"], path


# What reads or writes by a name, but through the one file helper.
BY_NAME = {
    "open", "write_text", "write_bytes", "read_text", "read_bytes", "mkstemp", "NamedTemporaryFile", "TemporaryFile",
    "mkdir", "symlink_to", "hardlink_to", "rename", "save_file", "unlink", "rmtree",
}  # fmt: skip
HELPERS = {"files.py", "names.py"}
BY_NAME_ALLOWED = {
    ("bench/fill.py", "find_available_bytes", "read_text"): "of /proc",
    ("calibrate/processor.py", "read_fields", "read_text"): "of /proc",
    ("cli/boundary.py", "end_output", "open"): "of /dev/null",
    ("cli/texts.py", "read_stream", "open"): "what the caller has opened",
    ("demo/filler.py", "read_sources", "read_text"): "the interpreter's own library",
    ("evals/public/read.py", "read_records", "open"): "a descriptor of the helper's",
    ("hf/gguf_header.py", "read_header", "open"): "a descriptor of the helper's",
    ("hf/load_gguf.py", "standing_alone", "symlink_to"): "into a folder of its own, which goes again",
    ("hf/rss.py", "find_peak", "read_text"): "of /proc",
    ("hf/session.py", "read_session_text", "open"): "of a session",
    ("measure/part.py", "delete", "unlink"): "a name alone goes, never what it leads to",
    ("session/file.py", "_read_tensor", "open"): "a descriptor of the helper's",
    ("session/load.py", "open_text", "open"): "of a session",
}


def test_nothing_is_read_or_written_by_a_name_but_by_the_file_helper() -> None:
    found: set[tuple[str, str, str]] = set()
    for path in sorted(SOURCE.rglob("*.py")):
        found |= {call for call in calls_of(path) if call[2] in BY_NAME and call[0] not in HELPERS}
    assert found - set(BY_NAME_ALLOWED) == set()
    assert set(BY_NAME_ALLOWED) - found == set(), "allowed, but no longer there"


class NoSync(TorchDispatchMode):
    """Fails where a tensor's value is read by Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


METHODS: list[Method] = [
    InfiniGen(fraction=0.3),
    InfiniGen(fraction=0.3, alpha=2.0),
    InfiniGen(fraction=0.3, top_p=0.5),
    InfiniGen(fraction=0.45, paper=True),
    InfiniGen(fraction=1.0),
    Window(fraction=0.3),
    Random(fraction=0.3),
    Oracle(fraction=0.3),
]


# One of every name in the table, and what differs by an option.
ALL = [
    *METHODS,
    *(row.config(fraction=0.3) for name, row in TABLE.items() if name not in ("infinigen", "full", "indexer")),
    Full(),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_decode_step_reads_no_value_back(method: Method) -> None:
    model, ids = make_model("llama"), make_prompt(2, tokens=70)["input_ids"]
    with farkv.attach(model, method) as far:
        cache = far.new_cache(tokens=80, batch=2)
        forward(model, ids, cache)
        # The first estimate of every layer is compared with the probe's.
        forward(model, ids[:, :1], cache)
        with NoSync():
            for t in range(1, 4):
                forward(model, ids[:, t : t + 1], cache)


def test_the_guard_itself_works() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        torch.ones(1).item()


def find_rows(engine: Any) -> list[int]:
    """Return where records and index are in memory, layer by layer."""
    rows = [*engine.store.pool.values(), *(fit.index.rows for fit in engine.selector.fits.values())]
    return [r.data.data_ptr() for r in rows]


def test_a_decode_step_allocates_no_rows_where_they_are_reserved() -> None:
    model, ids = make_model("llama"), make_prompt(2, tokens=70)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
        cache = far.new_cache(tokens=90, batch=2)
        forward(model, ids, cache)
        places = find_rows(cache.engine)
        for t in range(15):
            forward(model, ids[:, t : t + 1], cache)
        assert find_rows(cache.engine) == places


# --- no loop over heads or sequences ----------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """Notes every operation that is dispatched on a thread."""

    def __init__(self, noted: list[str]):
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.noted.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def count_work(link: Any) -> Iterator[Counter[str]]:
    """Count the operations of this thread and of the link's, and the calls and iterations of farkv's own code."""
    noted: list[str] = []
    submit = link.submit

    def submit_counted(work: Any) -> Any:
        def run() -> Any:
            with Counted(noted), profiled(note):
                return work()

        return submit(run)

    def note(frame: Any, event: str, argument: Any) -> None:
        # A generator's every value is a call, a kernel's every use one of its wrapper.
        if event == "call" and frame.f_code.co_filename.startswith(str(SOURCE)):
            noted.append(f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}")

    counts = Counter[str]()
    link.submit = submit_counted
    try:
        with Counted(noted), profiled(note):
            yield counts
            link.drain()
    finally:
        del link.submit
    counts.update(noted)


@contextmanager
def profiled(note: Any) -> Iterator[None]:
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def count_steps(method: Method, near: str | None, kv_heads: int, batch: int) -> Counter[str]:
    """Return what three decode steps do."""
    family = "qwen4_exp" if isinstance(method, Indexer) else "llama"
    model = make_model(family, head_dim=8, num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads)
    ids = make_prompt(batch, tokens=70)["input_ids"]
    with farkv.attach(model, method, near=near) as far:
        cache = far.new_cache(tokens=80, batch=batch)
        forward(model, ids, cache)
        forward(model, ids[:, :1], cache)
        with count_work(cache.engine.store.link) as counts:
            for t in range(1, 4):
                forward(model, ids[:, t : t + 1], cache)
    assert sum(counts.values()) > 300
    return counts


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("method", ALL, ids=repr)
def test_a_step_does_as_much_for_many_heads_and_sequences_as_for_few(
    method: Method, near: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is near already is looked for one way, what is missing another: which it is depends on the data.
    monkeypatch.setattr(bytes_recent, "LEAST_SLOTS", math.inf)
    # Few bytes are copied at once, many on the worker's thread: here all are.
    monkeypatch.setattr(link, "INLINE_BYTES", 0)
    # Which heads draw depends on the prompt: here all do.
    monkeypatch.setattr("farkv.methods.gains.LEAST_HEADS", 1)
    monkeypatch.setattr("farkv.methods.gains.find_gains", lambda seen, *_: torch.ones(seen.keys.shape[:2]))
    check_growth(method, near)


def test_nor_does_a_recently_used_set_do_more() -> None:
    """Of what is chosen at random some is near, and some is missing."""
    check_growth(Random(fraction=0.3), "1MiB")


@pytest.mark.skipif(not hasattr(transformers, "Qwen4ExpTextConfig"), reason="no model with an indexer of blocks")
@pytest.mark.parametrize("near", [None, "1MiB"])
def test_a_step_does_as_much_for_many_heads_where_the_model_chooses(near: str | None) -> None:
    # Its own indexer goes sequence by sequence; we do not go head by head.
    few, many = (count_steps(Indexer(), near, kv_heads=n, batch=2) for n in (2, 8))
    assert many - few == Counter()


def check_growth(method: Method, near: str | None) -> None:
    few = count_steps(method, near, kv_heads=2, batch=2)
    assert count_steps(method, near, kv_heads=8, batch=2) - few == Counter()
    assert count_steps(method, near, kv_heads=2, batch=4) - few == Counter()
