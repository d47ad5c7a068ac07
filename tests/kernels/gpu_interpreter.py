"""The GPU kernels where a test can run them: on the GPU if there is one, else in Triton's interpreter on the CPU.

Whether Triton interprets is decided when a kernel is decorated, that is, when its module is imported: the variable is
set for that moment alone. Triton's own library (tl.sum and the like) is decorated when Triton is imported, which torch
and transformers do long before, in whatever order pytest imports the files of one process; so that library is loaded
once more, and so are our kernels if they were there. Nothing else of the suite runs a Triton kernel.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import pytest
import torch

# Without Triton there is nothing to test; the interpreters of older ones stumble over the NumPy of today.
pytest.importorskip("triton", minversion="3.7" if not torch.cuda.is_available() else None)

# On a machine with a GPU these are its tests (`pytest -m gpu`), with sizes of another order.
HAS_GPU = torch.cuda.is_available()
MARKS = [pytest.mark.gpu] if HAS_GPU else []
LARGER = 97 if HAS_GPU else 1
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SMALL = dict(select=64, attend=16, gather=8, programs=3)


def call_faster() -> None:
    """Let a kernel call a helper without searching all of Triton's language for what to replace, as every call does.

    The launch has replaced it already, and what only the library's helpers see stays replaced after the first call.
    """
    from triton.runtime import interpreter

    seen: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in seen:
            seen.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def make_gpu() -> Any:
    from farkv.kernels.gpu import Blocks, Gpu

    if DEVICE.type == "cuda":
        return Gpu()
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        # Triton imports gluon by itself at the first launch, and asks for the variable then.
        importlib.import_module("triton.experimental.gluon")
        for name in ("standard", "random"):
            importlib.reload(importlib.import_module(f"triton.language.{name}"))
        importlib.reload(importlib.import_module("triton.language"))
        call_faster()
        for name in ("tables", "select", "attend", "gather"):
            known = f"farkv.kernels.gpu_{name}" in sys.modules
            module = importlib.import_module(f"farkv.kernels.gpu_{name}")
            if known:
                importlib.reload(module)
        return Gpu(Blocks(**SMALL), interpreted=True)
    finally:
        del os.environ["TRITON_INTERPRET"]


GPU = make_gpu()
