"""The thread that brings records near is there before it is needed."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CapacityError
from farkv.methods import InfiniGen
from farkv.store.link import Link
from farkv.store.worker import Worker
from tests.models import forward, make_model, make_prompt


def refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_system_without_threads_is_told_at_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make_model("llama"), make_prompt(1)["input_ids"]
    before = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(CapacityError, match=r"the system refuses it \(can't start new thread\); allow"):
            farkv.attach(model, InfiniGen(fraction=0.4), near="1MiB")
    assert before == {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    with farkv.attach(model, InfiniGen(fraction=0.4), near="1MiB") as far:
        cache = far.new_cache()
        monkeypatch.setattr(threading.Thread, "start", refuse)
        for ids in (prompt, prompt[:, :1]):
            forward(model, ids, cache)


def test_links_of_one_model_share_it_and_do_their_work_in_order() -> None:
    worker, done = Worker(), []
    links = [Link(torch.device("cpu"), worker) for _ in range(2)]
    names: set[str] = set()

    def work(i: int) -> Any:
        def run() -> None:
            names.add(threading.current_thread().name)
            done.append(i)

        return run

    for i in range(20):
        links[i % 2].submit(work(i))
    for link in links:
        link.drain()
    assert done == list(range(20))
    assert len(names) == 1
    assert copy.deepcopy(worker) is worker
