"""The decode path: no host sync, no Python loop over heads. A scan of the source, and a run that fails on a sync."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import farkv
from farkv.methods import InfiniGen, Method, Oracle, Random, Window
from tests.models import forward, make_model, make_prompt

SOURCE = Path(farkv.__file__).parent
FOLDERS = ("per_token", "per_prompt", "store", "methods", "hf", "kernels")
SYNCS = {"item", "tolist", "synchronize", "nonzero", "cpu", "numpy"}
# (file, function, call): why it may be there.
ALLOWED = {
    ("store/rows.py", "select", "tolist"): "beam search itself waits for the device here",
    ("store/transfer.py", "_stage", "synchronize"): "one side stream, waited for by the link's own thread",
    ("hf/layer.py", "batch_select_indices", "cpu"): "the user's own call, not a step",
    ("methods/padding.py", "count", "tolist"): "once per pass, where something is padded",
    ("methods/indexed.py", "select", "tolist"): "the store has waited for them already",
    ("methods/indexed.py", "take_fitted", "tolist"): "once per session",
    ("per_prompt/sample.py", "add_block", "nonzero"): "once per block of a prompt that was read in passes",
    ("hf/verify.py", "after", "tolist"): "verified steps are not timed",
    ("hf/identity.py", "identify_model", "numpy"): "once, at attach",
    ("hf/identity.py", "digest_weights", "numpy"): "the same",
    ("store/transfer.py", "_copy_missing", "nonzero"): "of host memory, by the link's own thread",
    ("store/transfer.py", "_copy", "nonzero"): "the same",
    ("methods/spill.py", "choose_kept", "nonzero"): "once per eviction of many records",
    ("methods/keep.py", "mark", "cpu"): "one curve per layer, at the end of a prompt without a plan",
    ("methods/keep.py", "mark", "numpy"): "the same",
    ("methods/fast_choice.py", "share_early", "tolist"): "of a padded batch on a CPU",
    ("methods/fast_choice.py", "share_late", "tolist"): "the same",
    ("store/hot.py", "find", "nonzero"): "of host memory, by the link's own thread",
    ("store/hot.py", "keep", "nonzero"): "of host memory, once per eviction of many records",
    ("store/hot.py", "select", "cpu"): "the store has waited for these numbers already",
    ("kernels/gpu.py", "_wait", "synchronize"): "a measurement of bandwidth",
}
# These work on host memory alone, whatever the model's device is: nothing there waits for one.
HOST = {f"store/{name}.py" for name in ("disk", "frames", "header", "paged", "pages", "reader", "saved")}
# Once per answer or file, outside the forward passes.
OUTSIDE = {f"hf/{name}.py" for name in ("ask", "load", "losses", "measure", "report", "session")} | {
    "methods/planning.py"
}


def calls_of(path: Path) -> list[tuple[str, str, str]]:
    """Return (file, innermost function, method) of every method call in a file."""
    found, name = [], str(path.relative_to(SOURCE))

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found.append((name, function, node.func.attr))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text()), "")
    return found


def files() -> list[Path]:
    return [p for folder in FOLDERS for p in sorted((SOURCE / folder).glob("*.py"))]


def test_no_call_waits_for_the_device_unless_it_says_why() -> None:
    found = {c for p in files() for c in calls_of(p) if c[2] in SYNCS and c[0] not in OUTSIDE | HOST}
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) - found == set(), "allowed, but no longer there"


def test_no_python_loop_over_heads() -> None:
    words = ("heads", "n_heads", "kv_heads", "n_groups", "groups", "Hkv", "batch")
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.For | ast.comprehension):
                names = {n.id for n in ast.walk(node.iter) if isinstance(n, ast.Name)}
                assert not names & set(words), f"{path.name}: {ast.unparse(node.iter)}"


def test_only_the_door_and_the_demo_know_transformers() -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE).parts[0]
        if where in {"hf", "demo", "cli", "bench"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "transformers"], path


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


def test_a_decode_step_allocates_no_rows_where_they_are_reserved() -> None:
    model, ids = make_model("llama"), make_prompt(2, tokens=70)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
        cache = far.new_cache(tokens=90, batch=2)
        forward(model, ids, cache)
        recipe = cache.engine
        rows = [r.data for r in recipe.store.pool.values()] + [i.rows.data for i in recipe.index.values()]
        places = [r.data_ptr() for r in rows if r is not None]
        for t in range(15):
            forward(model, ids[:, t : t + 1], cache)
        rows = [r.data for r in recipe.store.pool.values()] + [i.rows.data for i in recipe.index.values()]
        assert places == [r.data_ptr() for r in rows if r is not None]
