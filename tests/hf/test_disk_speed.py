"""An answer depends on what is on the disk, and not on how fast the disk is."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.methods import InfiniGen
from farkv.store.far import pages as pages_module
from farkv.store.far.pages import NumberedPages
from tests.models import VOCAB, forward, make_model, make_prompt

STEPS = 6


@pytest.mark.parametrize(
    ("family", "host", "source"),
    # gemma3's first managed layer is not the model's first: its fetch precedes the pass's admission.
    [("llama", "150KiB", "attn"), ("gemma3", "100KiB", None)],
)
def test_slow_reads_give_the_same_logits_and_read_the_same_pages(
    family: str, host: str, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages_module, "MOST_TOKENS", 8)
    model, ids = make_model(family), make_prompt(1, 300)["input_ids"]
    known = torch.randint(1, VOCAB, (1, STEPS + 1), generator=torch.Generator().manual_seed(3))
    read, plain_read, delay = list[int](), NumberedPages.read, 0.0

    def read_slowly(self: NumberedPages, numbers: torch.Tensor, *args: Any) -> None:
        read.append(len(numbers))
        if threading.current_thread() is not threading.main_thread():
            time.sleep(delay)
        plain_read(self, numbers, *args)

    monkeypatch.setattr(NumberedPages, "read", read_slowly)
    found = []
    for turn, delay in enumerate((0.0, 0.02)):  # noqa: B007  # read_slowly reads it
        folder = tmp_path / str(turn)
        method = InfiniGen(fraction=0.3, source=source)
        with torch.no_grad(), farkv.attach(model, method, disk=str(folder), host=host) as far:
            cache = far.new_cache()
            for part in ids.split(60, 1):
                forward(model, part, cache)
            read.clear()
            logits = [forward(model, known[:, i : i + 1], cache) for i in range(STEPS + 1)]
            found.append((torch.cat(logits, 1), sum(read)))
    assert found[0][1] > 0
    for logits, n_read in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert n_read == found[0][1]
