"""What the process takes, and what the model's weights are of it. In: a model. Out: bytes."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from farkv.hf.packed import PackedLinear
from farkv.receipt import Rss


def measure_rss(model: nn.Module) -> Rss:
    """Return the most memory that the process had so far, and the bytes of a model's weights, wherever they are."""
    return Rss(find_peak(), count_weights(model))


def find_peak() -> int | None:
    """Return the peak of the resident set of this process in bytes, None where the system does not say."""
    try:
        # Linux also tells getrusage, but counts there what the parent had when it started this process.
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None
    # In KiB, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_weights(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, shared ones once; those that are elsewhere (meta) count none."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    own = {id(buffer) for module in packed for buffer in module.buffers(recurse=False)}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own and not t.is_meta}
    return sum(t.nbytes for t in tensors.values()) + sum(module.count_bytes() for module in packed)
