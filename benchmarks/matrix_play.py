"""What one model does with our caches, beside what it does with its own: a row of docs/supported.md.

In: a tiny model. Out: a word per column: "equal" (bit for bit), "refused: ..." (one of our errors), "plain: no: ..."
(the model alone cannot do it), or "FAULT: ...".
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from matrix_models import FIRST, LAST, make_model
from rows import Row
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import farkv
from farkv.errors import FarKVError
from farkv.hf import handle  # noqa: F401  # what a fork would import later may have changed by then
from farkv.hf.layer import FarLayer
from farkv.methods import Full, InfiniGen

TOKENS, NEW = 24, 4
NEAR = "8MiB"
# What is attached: a method, and a near limit.
WAYS: dict[str, tuple[Any, str | None]] = {
    "full": (Full(), None),
    "infinigen": (InfiniGen(fraction=1.0), None),
    "full near": (Full(), NEAR),
    "infinigen near": (InfiniGen(fraction=1.0), NEAR),
}
# Where an ordinary cache is played with as well.
ORDINARY = ("full", "infinigen near")
# Columns of a row: what was played in which ways.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "full": (("full",), ("calls", "generate")),
    "infinigen": (("infinigen",), ("calls", "generate")),
    "near": (("full near", "infinigen near"), ("calls", "generate")),
    "padded": (tuple(WAYS), ("padded",)),
    "beams": (tuple(WAYS), ("beams",)),
}
EQUAL, REFUSED, UNABLE, FAULT = "equal", "refused", "plain: no", "FAULT"


def make_prompt(batch: int, padding: int = 0) -> dict[str, Tensor]:
    """Return ids and mask; the first sequence starts with `padding` tokens that say nothing."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST, LAST, (batch, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :padding] = mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def call_model(model: PreTrainedModel, cache: Any) -> list[Tensor]:
    """Return the logits of a prompt, a token, three tokens at once and a token, by calls."""
    ids, made, at = make_prompt(1)["input_ids"].repeat(1, 2), [], 0
    for n in (TOKENS, 1, 3, 1):
        out = model(input_ids=ids[:, at : at + n], past_key_values=cache, use_cache=True)
        made.append(out.logits)
        at += n
    return made


def write(model: PreTrainedModel, cache: Any, prompt: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Return the logits and tokens that `generate` makes."""
    out = model.generate(
        **prompt, past_key_values=cache, max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return [*out.logits, out.sequences]


PLAYS: dict[str, Callable[[PreTrainedModel, Any], list[Tensor]]] = {
    "calls": call_model,
    "generate": lambda model, cache: write(model, cache, make_prompt(1)),
    "padded": lambda model, cache: write(model, cache, make_prompt(2, padding=5)),
    "beams": lambda model, cache: write(model, cache, make_prompt(1), num_beams=2),
}


def choose_plain_cache(model: PreTrainedModel) -> Callable[[], Any]:
    """Return what makes a model's ordinary cache: Hugging Face's, or nothing where the model takes its own alone."""
    for make in (lambda: DynamicCache(config=model.config), lambda: None):
        for name in ("calls", "generate"):
            with contextlib.suppress(Exception):
                play(name, model, make())
                return make
    return lambda: None


def describe(error: BaseException) -> str:
    """Return an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def play(name: str, model: PreTrainedModel, cache: Any) -> list[Tensor]:
    """Play with a cache; what is drawn is drawn alike."""
    torch.manual_seed(3)
    with torch.no_grad():
        return PLAYS[name](model, cache)


def is_same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Say whether two plays made the same bits."""
    pairs = zip(one, other, strict=True)
    return len(one) == len(other) and all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs
    )


def measure_off(one: list[Tensor], other: list[Tensor]) -> float:
    """Return by how much the numbers of two plays differ."""
    pairs = [(a.float(), b.float()) for a, b in zip(one, other, strict=False) if a.shape == b.shape]
    return max(((a - b).abs().nan_to_num(nan=9e9).max().item() for a, b in pairs), default=float("nan"))


def play_plain(model: PreTrainedModel, ordinary: Callable[[], Any]) -> dict[str, list[Tensor] | str]:
    """Return what a model makes by itself, with an ordinary cache; why not, where it cannot."""
    found: dict[str, list[Tensor] | str] = {}
    for name in PLAYS:
        try:
            found[name] = play(name, model, ordinary())
        except Exception as error:
            found[name] = f"{UNABLE}: {describe(error)}"
    able = [name for name, made in found.items() if not isinstance(made, str)][:1]
    for name in able:
        if not is_same(play(name, model, ordinary()), found[name]):
            return dict.fromkeys(PLAYS, f"{UNABLE}: differs from itself")
    return found


def judge(name: str, model: PreTrainedModel, cache: Callable[[], Any], expected: list[Tensor] | str) -> str:
    """Return how a play compares with the plain one."""
    if isinstance(expected, str):
        return expected
    try:
        ours = cache()
        made = play(name, model, ours)
    except FarKVError as error:
        return f"{REFUSED}: {describe(error)}"
    except Exception as error:
        return f"{FAULT}: {name}: {describe(error)}"
    if not is_same(made, expected):
        return f"{FAULT}: {name}: off by {measure_off(made, expected):.3g}"
    # What an ordinary cache counts is the model's own business; so is what one counts that has no attention.
    length = TOKENS + (5 if name == "calls" else NEW - 1)
    layers = [] if ours is None else ours.layers
    lengths = [layer.get_seq_length() for layer in layers if isinstance(layer, FarLayer)]
    if any(found != length for found in lengths):
        return f"{FAULT}: {name}: layers hold {lengths} tokens of {length}"
    return EQUAL


@contextlib.contextmanager
def listening() -> Any:
    """Collect the warnings of our own log."""
    heard: list[str] = []
    log, handler = logging.getLogger("farkv"), logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    log.addHandler(handler)
    try:
        yield heard
    finally:
        log.removeHandler(handler)


def play_way(
    model: PreTrainedModel, way: str, plain: dict[str, Any], ordinary: Callable[[], Any], row: Row
) -> dict[str, str]:
    """Return what every play says in one way; an ordinary cache's under "ordinary"."""
    method, near = WAYS[way]
    try:
        far = farkv.attach(model, method, near=near)
    except FarKVError as error:
        return dict.fromkeys(PLAYS, f"{REFUSED}: {describe(error)}")
    except Exception as error:
        return dict.fromkeys(PLAYS, f"{FAULT}: attach: {describe(error)}")
    with far:
        row["managed"] = len(far.managed)
        row["kinds"] = dict(Counter("managed" if i in far.managed else k for i, k in enumerate(far.layer_types)))
        found = {name: judge(name, model, far.new_cache, plain[name]) for name in PLAYS}
        # Behind ours, which may have left hooks of a way that looks ahead.
        names = PLAYS if way in ORDINARY else ()
        others = [judge(name, model, ordinary, plain[name]) for name in names]
    return found | {"ordinary": combine(others or [EQUAL])}


def combine(words: list[str]) -> str:
    """Return the worst of several words; that the plain model cannot do a thing only where it can do none of them."""
    for start in (FAULT, REFUSED, EQUAL):
        if chosen := [word for word in words if word.startswith(start)]:
            return chosen[0]
    return words[0]


def make_row(name: str, attention: str = "") -> Row:
    """Return the row of a model, that runs on the attention of a name or on its own choice."""
    row: Row = {"model": name}
    try:
        model = make_model(name, attention)
        model.generation_config.eos_token_id = None
    except Exception as error:
        return row | {"built": f"{UNABLE}: {describe(error)}"}
    row |= {"class": type(model).__name__, "built": EQUAL, "parameters": sum(p.numel() for p in model.parameters())}
    row["attention"] = model.config.get_text_config(decoder=True)._attn_implementation
    ordinary = choose_plain_cache(model)
    plain = play_plain(model, ordinary)
    row["plain"] = {name: made if isinstance(made, str) else EQUAL for name, made in plain.items()}
    with listening() as heard:
        found = {way: play_way(model, way, plain, ordinary, row) for way in WAYS}
    # The model is as it was, detached or refused.
    after = [judge(name, model, ordinary, plain[name]) for name in ("calls", "generate")]
    row["ordinary"] = combine([*(cells.pop("ordinary", EQUAL) for cells in found.values()), *after])
    for column, (ways, names) in COLUMNS.items():
        row[column] = combine([found[way][name] for way in ways for name in names])
    row["notes"] = list(dict.fromkeys(heard))
    row["cells"] = found
    return row
