"""How a row of `golden_rows.py` is run: the ways to go through a text and its answer.

In: a `Row` and an empty folder. Out: tokens, logits and the receipt, or the error that refused it. Public API alone.
"""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from golden_models import QUESTION, VOCAB, Row, list_facts, make_model, make_text, measure_profile, write_plan
from torch import Tensor
from typer.testing import CliRunner

import farkv
from farkv.cli.commands import app
from farkv.errors import CacheStateError, FarKVError

NEW_TOKENS, N_ASKED = 12, 3


class Played(NamedTuple):
    """What came of it: new tokens of every sequence, logits of every step, the receipt, the error that ended it."""

    tokens: list[list[int]]
    logits: list[Tensor]
    receipt: dict[str, Any] | None = None
    error: list[str] | None = None


class Stage(NamedTuple):
    """An attached model, and what it is to do."""

    far: Any
    row: Row
    session: Path

    @property
    def model(self) -> Any:
        """Return the model."""
        return self.far.model

    def read(self, seed: int = 1) -> Any:
        """Return a cache that has read a text in one pass."""
        cache = self.far.new_cache(**self.row.cache)
        self.model(input_ids=make_text(self.row, seed)["input_ids"], past_key_values=cache)
        return cache

    def feed(self, cache: Any, ids: Tensor, n: int, mask: Tensor | None = None) -> Played:
        """Feed tokens one by one, then `n` greedy ones, none of them padding; the logits are those of all of them.

        Args:
            mask: of the tokens that were read, where some are padding.
        """
        logits: list[Tensor] = []
        fed = list(ids.split(1, 1))
        while len(logits) < ids.shape[1] + n:
            more: dict[str, Tensor] = {}
            if mask is not None:
                more = {"position_ids": mask.sum(-1, keepdim=True)}
                more["attention_mask"] = mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits.append(self.model(input_ids=fed[len(logits)], past_key_values=cache, **more).logits[:, -1])
            if len(logits) >= ids.shape[1]:
                fed.append(logits[-1][:, 1:].argmax(-1, keepdim=True) + 1)
        return Played(torch.cat(fed[ids.shape[1] :], 1).tolist(), logits)


def ask(batch: int = 1, seed: int = 9) -> Tensor:
    """Return a question that is fed token by token."""
    return torch.randint(1, VOCAB, (batch, N_ASKED), generator=torch.Generator().manual_seed(seed))


def add(*parts: Played) -> Played:
    """Return runs one after the other as one."""
    return Played([row for part in parts for row in part.tokens], [step for part in parts for step in part.logits])


def generate(stage: Stage) -> tuple[Played, Any]:
    """Let Hugging Face generate."""
    row, text = stage.row, make_text(stage.row)
    cache = stage.far.new_cache(**row.cache)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, **row.generate}
    # Padding's embedding is zero: its query scores all records alike, and any choice is as good.
    options |= {"suppress_tokens": [0]}
    out = stage.model.generate(**text, past_key_values=cache, return_dict_in_generate=True, **options)
    return Played(out.sequences[:, row.text[1] :].tolist(), list(out.logits)), cache


def resume(stage: Stage) -> tuple[Played, Any]:
    """Ask a saved text."""
    cache = farkv.load_cache(stage.session, stage.model, **stage.row.cache)
    return stage.feed(cache, ask(), NEW_TOKENS), cache


def lengthen(stage: Stage) -> tuple[Played, Any]:
    """Read on after a saved text, save both over it, ask that."""
    first = farkv.load_cache(stage.session, stage.model, **stage.row.cache)
    stage.model(input_ids=make_text(stage.row, 2)["input_ids"][:, :90], past_key_values=first)
    first.save(stage.session)
    return resume(stage)


def save(stage: Stage) -> tuple[Played, Any]:
    """Save what was read under the row's own limits, and ask it."""
    stage.read().save(stage.session)
    return resume(stage)


def crop(stage: Stage) -> tuple[Played, Any]:
    """Answer, take the answer and the end of the text back, go on until what came instead has left the window."""
    cache = stage.read()
    first = stage.feed(cache, ask(), 6)
    cache.crop(-30)
    return add(first, stage.feed(cache, ask(seed=3), 24)), cache


def fork(stage: Stage) -> tuple[Played, Any]:
    """Ask one text two questions, each of a copy; the receipt is the second copy's."""
    cache = stage.read()
    first = stage.feed(copy.deepcopy(cache), ask(), 6)
    twin = copy.deepcopy(cache)
    return add(first, stage.feed(twin, ask(seed=3), 6)), twin


def reset(stage: Stage) -> tuple[Played, Any]:
    """Read one text, forget it, read another in the same cache."""
    cache = stage.read()
    first = stage.feed(cache, ask(), 6)
    cache.reset()
    stage.model(input_ids=make_text(stage.row, 2)["input_ids"], past_key_values=cache)
    return add(first, stage.feed(cache, ask(seed=3), 6)), cache


def join(stage: Stage) -> tuple[Played, Any]:
    """Read two texts of different lengths, then answer them as one batch."""
    tokens = stage.row.text[1]
    cache, short = stage.read(), stage.far.new_cache(**stage.row.cache)
    stage.model(input_ids=make_text(stage.row, 2)["input_ids"][:, : tokens // 2], past_key_values=short)
    cache.join(short)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, : tokens - tokens // 2] = 0
    return stage.feed(cache, ask(2), 6, mask), cache


WAYS: dict[str, Callable[[Stage], tuple[Played, Any]]] = {
    way.__name__: way for way in (generate, resume, lengthen, save, crop, fork, reset, join)
}


def write_session(row: Row, path: Path, options: dict[str, Any]) -> None:
    """Save the row's text as it is read without limits."""
    free = {key: value for key, value in options.items() if key in ("quant", "profile", "kernel")}
    with farkv.attach(make_model(row.model), *row.methods, **free) as far:
        Stage(far, row, path).read().save(path)


def run_command(row: Row, folder: Path) -> Played:
    """Ask the demo model with `farkv run`, which announces its prompts; the answer is in the receipt."""
    (folder / "facts.py").write_text(list_facts()[: row.text[1]])
    options = [f"--{name}={value}" for name, value in {**row.attach, **row.generate}.items()]
    if row.plan:
        options.append(f"--plan={write_plan(row, folder / 'plan.json')}")
    named = [text.replace("FOLDER", str(folder)) for text in [*row.methods, *options]]
    fixed = ["--json", f"--max-new-tokens={NEW_TOKENS}", f"--file={folder / 'facts.py'}"]
    done = CliRunner().invoke(app, ["run", QUESTION, *fixed, *named])
    if done.exception is not None:
        raise done.exception
    return Played([], [], json.loads(done.stdout))


def play(row: Row, folder: Path) -> Played:
    """Run a row; a refusal leaves the error, and the receipt of the cache that was refused if there was one."""
    far = None
    try:
        if row.way == "command":
            return run_command(row, folder)
        options = make_options(row, folder)
        if row.way in ("resume", "lengthen"):
            write_session(row, folder / "text.farkv", options)
        with farkv.attach(make_model(row.model), *row.methods, **options) as far:
            played, cache = WAYS[row.way](Stage(far, row, folder / "text.farkv"))
            return played._replace(receipt=far.receipt(cache).to_dict())
    except Exception as error:
        if not isinstance(error, FarKVError):
            traceback.print_exc()
        said = [type(error).__name__, str(error).replace(str(folder), "FOLDER")]
    try:
        receipt = None if far is None else far.receipt().to_dict()
    except CacheStateError:
        receipt = None
    return Played([], [], receipt, said)


def make_options(row: Row, folder: Path) -> dict[str, Any]:
    """Return what a row gives to `attach`."""
    options = dict(row.attach)
    if "disk" in options:
        options["disk"] = f"{folder}/pages:{options['disk']}"
    if row.profile:
        options["profile"] = measure_profile(row.model)
    if row.plan:
        options["plan"] = write_plan(row, folder / "plan.json")
    return options
